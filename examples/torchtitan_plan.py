"""A model parallelised as torchtitan does it: one plan for the experts, FSDP for the rest, made on the meta device.

    $ torchrun --nproc-per-node 2 examples/torchtitan_plan.py
    blocks.0.norm.weight: [16], here [8]
    blocks.0.moe.gate.weight: [8, 16], here [4, 16]
    blocks.0.moe.experts.w1: [8, 32, 16], here [4, 32, 16]
    blocks.0.moe.experts.w2: [8, 16, 32], here [4, 16, 32]
    blocks.0.moe.experts.w3: [8, 32, 16], here [4, 32, 16]
    step  0  loss 2.081  norm 0.112
    step 10  loss 0.723  norm 0.204
    step 20  loss 0.235  norm 0.164
    one process has the same losses: True

Both meshes have the same ranks, as torchtitan's expert parallelism borrows those of data parallelism: "fsdp" shards
what all tokens use, "ep" splits the experts. Nothing is allocated before each rank's part is known.
"""

import gc
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import crossdock as cd
from crossdock.nn import ExpertParallel, Gate, GroupedExperts, ShardExperts

NUM_TOKENS, NUM_EXPERTS, NUM_TOPK, HIDDEN, INTERMEDIATE = 128, 8, 2, 16, 32
NUM_STEPS, MAX_NORM = 21, 1.0


class Block(nn.Module):
    """A residual around one mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        gate = Gate(HIDDEN, NUM_EXPERTS, NUM_TOPK, score="sigmoid")
        self.moe = ExpertParallel(gate, GroupedExperts(NUM_EXPERTS, HIDDEN, INTERMEDIATE))

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        for block in self.blocks:
            x = block(x)
        return x


def parallelize(model: Model, fsdp: DeviceMesh, ep: DeviceMesh, buffer: cd.Buffer) -> None:
    """Splits a model that is on the meta device, and gives it memory for this rank's part alone."""
    for block in model.blocks:
        parallelize_module(block, ep, {"moe": ShardExperts(buffer)})
        fully_shard(block, mesh=fsdp, ignored_params=set(block.moe.experts.parameters()))
    model.to_empty(device=fsdp.device_type)


def train(model: nn.Module, batch: tuple[Tensor, Tensor], num_ranks: int) -> Iterator[tuple[float, float]]:
    """The mean loss of all ranks' tokens and the norm of all gradients, step by step; the same for one process."""
    named = list(model.named_parameters())
    experts = [p for name, p in named if ".experts." in name]
    others = [p for name, p in named if ".experts." not in name]
    # Two groups, here and below: no operation takes DTensors of two meshes at once.
    optimizer = torch.optim.AdamW([{"params": experts}, {"params": others}], lr=0.01)
    x, target = batch
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        for parameter in experts:
            parameter.grad /= num_ranks  # FSDP has averaged the others'; experts have the sum of all ranks' tokens
        norm = clip((experts, others))
        optimizer.step()
        total = loss.detach().clone()
        if num_ranks > 1:
            dist.all_reduce(total)
        yield float(total) / num_ranks, norm


def clip(groups: tuple[list[nn.Parameter], ...]) -> float:
    """Scales gradients to MAX_NORM at most, as torchtitan does with experts: a norm for each group, and of both."""
    norms = [nn.utils.get_total_norm([p.grad for p in group]) for group in groups]
    total = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, MAX_NORM, total)
    return float(total)


def main() -> None:
    """What each process runs."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)  # ranks of one host share its cores
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    fsdp = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("fsdp",))
    ep = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("ep",))
    torch.manual_seed(0)  # the same on all ranks
    whole = Model()
    x = torch.randn(NUM_TOKENS, HIDDEN)
    target = x.roll(1, dims=1) * x.sign()
    spec = cd.Spec(
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        hidden=HIDDEN,
        max_tokens=NUM_TOKENS // num_ranks,
        wire=cd.Fp32(),
        layout=cd.Expanded(),
    )
    with torch.device("meta"):
        model = Model()
    with cd.Buffer(ep, spec) as buffer:
        parallelize(model, fsdp, ep, buffer)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, whole.state_dict(), options=options)  # from a checkpoint, where there is one
        if rank == 0:
            for name, parameter in model.blocks[0].named_parameters():
                print(f"blocks.0.{name}: {list(parameter.shape)}, here {list(parameter.to_local().shape)}", flush=True)
        own = x.chunk(num_ranks)[rank], target.chunk(num_ranks)[rank]
        losses = []
        for step, (loss, norm) in enumerate(train(model, own, num_ranks)):
            losses.append(loss)
            if rank == 0 and step % 10 == 0:
                print(f"step {step:2}  loss {loss:.3f}  norm {norm:.3f}", flush=True)
    if rank == 0:
        alone = [loss for loss, _ in train(whole, (x, target), num_ranks=1)]
        agree = all(abs(one - other) <= 1e-4 * other for one, other in zip(losses, alone, strict=True))
        print("one process has the same losses:", agree)
    del model  # and with it what holds the buffer, before the group goes
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
