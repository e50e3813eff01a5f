"""A Hugging Face model made expert-parallel: each rank keeps its experts, the logits stay those of the original.

    $ torchrun --nproc-per-node 2 examples/hugging_face.py
    mixtral: 73,728 parameters of experts, 36,864 on each rank; logits within 1e-05: True; same text: True
    qwen3_moe: 49,152 parameters of experts, 24,576 on each rank; logits within 1e-05: True; same text: True

The models are small and random, made from their configurations; nothing is downloaded. Every rank reads sequences of
its own. Wants transformers 5 (`pip install 'crossdock[examples]'`), whose models keep a block's experts in two stacks.
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import crossdock as cd
from crossdock import autograd
from crossdock.nn import grouped_mm

VOCABULARY, HIDDEN, INTERMEDIATE, NUM_EXPERTS, NUM_TOPK = 64, 32, 48, 8, 2
NUM_SEQUENCES, LENGTH, NUM_WRITTEN = 3, 7, 5
TOLERANCE = 1e-5


class LocalExperts(nn.Module):
    """This rank's part of a block's experts, in the place of the whole: the block calls it as it called that.

    Args:
        experts: of the block: ``gate_up_proj`` [E, 2 F, H], ``down_proj`` [E, H, F], ``act_fn``.
        buffer: that carries the tokens, for all blocks of the model.
    """

    def __init__(self, experts: nn.Module, buffer: cd.Buffer) -> None:
        super().__init__()
        first, end = (NUM_EXPERTS * rank // buffer.topology.num_ranks for rank in (buffer.rank, buffer.rank + 1))
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj[first:end].clone())
        self.down_proj = nn.Parameter(experts.down_proj[first:end].clone())
        self.act_fn = experts.act_fn
        self.buffer = buffer

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [T, H] with their picks and weights [T, K] to their sums [T, H]. Collective."""
        recv = autograd.dispatch(self.buffer, hidden_states, top_k_index)
        counts = recv.num_tokens_per_expert
        gate, up = grouped_mm(recv.x, self.gate_up_proj, counts).chunk(2, dim=-1)
        y = grouped_mm(self.act_fn(gate) * up, self.down_proj, counts)
        return autograd.combine(self.buffer, y, recv.plan, weights=top_k_weights.float())


def parallelize(model: PreTrainedModel, buffer: cd.Buffer) -> PreTrainedModel:
    """Puts `LocalExperts` into all blocks of a model; in place."""
    for module in list(model.modules()):
        experts = getattr(module, "experts", None)
        if experts is not None and hasattr(experts, "gate_up_proj"):
            module.experts = LocalExperts(experts, buffer)
    return model


def models() -> dict[str, PreTrainedModel]:
    """The same on all ranks."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_experts_per_tok": NUM_TOPK, "initializer_range": 0.2}
    sizes |= {"eos_token_id": None, "bos_token_id": None}
    mixtral = MixtralConfig(num_local_experts=NUM_EXPERTS, intermediate_size=INTERMEDIATE, **sizes)
    qwen = Qwen3MoeConfig(num_experts=NUM_EXPERTS, moe_intermediate_size=INTERMEDIATE * 2 // 3, head_dim=8, **sizes)
    return {"mixtral": MixtralForCausalLM(mixtral).eval(), "qwen3_moe": Qwen3MoeForCausalLM(qwen).eval()}


def num_parameters_of_experts(model: nn.Module) -> int:
    """All that are here."""
    return sum(value.numel() for name, value in model.named_parameters() if ".experts." in name)


@torch.no_grad()
def compare(name: str, original: PreTrainedModel, buffer: cd.Buffer) -> None:
    """Logits of both on this rank's sequences, and the text that they write. Collective; rank 0 prints."""
    local = parallelize(copy.deepcopy(original), buffer)
    generator = torch.Generator().manual_seed(buffer.rank)
    tokens = torch.randint(VOCABULARY, (NUM_SEQUENCES, LENGTH), generator=generator)
    difference = (local(tokens).logits - original(tokens).logits).abs().max()
    options = {"max_new_tokens": NUM_WRITTEN, "do_sample": False, "pad_token_id": 0}
    attention = torch.ones_like(tokens)
    written = [model.generate(tokens, attention_mask=attention, **options) for model in (local, original)]
    agrees = torch.tensor([difference <= TOLERANCE, torch.equal(*written)]).int()
    dist.all_reduce(agrees, dist.ReduceOp.MIN)  # on all ranks
    if buffer.rank == 0:
        print(
            f"{name}: {num_parameters_of_experts(original):,} parameters of experts, "
            f"{num_parameters_of_experts(local):,} on each rank; logits within {TOLERANCE}: {bool(agrees[0])}; "
            f"same text: {bool(agrees[1])}",
            flush=True,
        )


def main() -> None:
    """What each process runs."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)  # ranks of one host share its cores
    spec = cd.Spec(
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        hidden=HIDDEN,
        max_tokens=NUM_SEQUENCES * (LENGTH + NUM_WRITTEN),
        wire=cd.Fp32(),
        layout=cd.Expanded(),
    )
    with cd.Buffer(None, spec) as buffer:
        for name, original in models().items():
            compare(name, original, buffer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
