"""Trains two mixture-of-experts layers whose experts are spread over ranks; one Buffer serves both.

    $ python examples/train.py
    step  0  loss 2.082
    step 10  loss 0.761
    step 20  loss 0.273
    step 30  loss 0.129

It starts two processes itself; under torchrun (`torchrun --nproc-per-node 4 examples/train.py`) it uses those. The
batch is sliced over the ranks, and the loss is the mean over all of it, so the number of ranks changes rounding alone.
"""

import gc
import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import crossdock as cd
from crossdock.nn import ExpertParallel, Gate, GroupedExperts, ShardExperts

NUM_TOKENS, NUM_EXPERTS, NUM_TOPK, HIDDEN, INTERMEDIATE = 128, 8, 2, 16, 32
NUM_STEPS = 31


class Block(nn.Module):
    """A residual around one mixture of experts, made whole: all experts, no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        gate = Gate(HIDDEN, NUM_EXPERTS, NUM_TOPK, score="sigmoid")
        self.moe = ExpertParallel(gate, GroupedExperts(NUM_EXPERTS, HIDDEN, INTERMEDIATE))

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return x + self.moe(self.norm(x))


def train() -> None:
    """What each process runs."""
    torch.set_num_threads(1)  # ranks of one host share its cores
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same model and data on all ranks
    model = nn.Sequential(Block(), Block())
    x = torch.randn(NUM_TOKENS, HIDDEN)
    target = x.roll(1, dims=1) * x.sign()
    x, target = x.chunk(num_ranks)[rank], target.chunk(num_ranks)[rank]

    mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("ep",))
    spec = cd.Spec(
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        hidden=HIDDEN,
        max_tokens=NUM_TOKENS // num_ranks,
        wire=cd.Fp32(),
        layout=cd.Expanded(),
    )
    with cd.Buffer(mesh, spec) as buffer:
        for block in model:
            parallelize_module(block, mesh, {"moe": ShardExperts(buffer)})  # each rank keeps its experts
        experts = [p for name, p in model.named_parameters() if ".experts." in name]
        replicated = [p for name, p in model.named_parameters() if ".experts." not in name]
        optimizer = torch.optim.AdamW([{"params": experts}, {"params": replicated}], lr=0.01)  # DTensors apart

        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            loss = (model(x) - target).square().sum() / (NUM_TOKENS * HIDDEN)  # this rank's part of the mean
            loss.backward()
            for parameter in replicated:  # experts' gradients are complete
                dist.all_reduce(parameter.grad)
            optimizer.step()
            for block in model:
                load = block.moe.take_load()
                dist.all_reduce(load)
                block.moe.gate.balance(load, rate=0.001)
            total = loss.detach().clone()
            dist.all_reduce(total)
            if rank == 0 and step % 10 == 0:
                print(f"step {step:2}  loss {total:.3f}", flush=True)


def start(rank: int, num_ranks: int, store: str) -> None:
    """A process that this program has started itself."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    train()
    gc.collect()  # autograd's cycles hold the buffer, and it the group, whose threads must end before Python does
    dist.destroy_process_group()


def main() -> None:
    """Under torchrun, one rank; else starts two."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        train()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(start, args=(2, f"{folder}/store"), nprocs=2)


if __name__ == "__main__":
    main()
