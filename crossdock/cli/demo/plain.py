"""The same Mixture-of-Experts block in one process, in plain torch: what the expert-parallel one is compared with.

Nothing here is the library's. Parameters have the names that ``crossdock.nn`` gives them, so that one set of values
serves both.

Letters: T tokens, H hidden, E experts, K top-k, F intermediate.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn
from torch.nn import functional

from crossdock.cli.demo.model import Shape


class PlainGate(nn.Module):
    """DeepSeek-V3's gate: of each token's best groups the best experts; the bias decides and does not weigh."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.zeros(shape.num_experts, shape.hidden))
        self.register_buffer("bias", torch.zeros(shape.num_experts))
        self.bias: Tensor

    def forward(self, x: Float32[Tensor, "T H"]) -> tuple[Int64[Tensor, "T K"], Float32[Tensor, "T K"]]:
        scores = functional.linear(x, self.weight).sigmoid()
        grouped = (scores + self.bias).view(len(x), self.shape.num_groups, -1)  # [T, groups, E / groups]
        group_scores = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(2)
        worst = group_scores.topk(self.shape.num_groups - self.shape.num_topk_groups, dim=1, largest=False).indices
        candidates = grouped.scatter(1, worst.unsqueeze(2).expand(-1, -1, grouped.shape[2]), -torch.inf)
        topk_idx = candidates.flatten(1).topk(self.shape.num_topk, dim=1).indices
        weights = scores.gather(1, topk_idx)
        return topk_idx, weights / weights.sum(1, keepdim=True)


class PlainExperts(nn.Module):
    """The weights of all experts: SwiGLU, ``w2 (silu(w1 x) * w3 x)``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(shape.num_experts, shape.intermediate, shape.hidden))
        self.w2 = nn.Parameter(torch.zeros(shape.num_experts, shape.hidden, shape.intermediate))
        self.w3 = nn.Parameter(torch.zeros(shape.num_experts, shape.intermediate, shape.hidden))


class PlainMoE(nn.Module):
    """One expert after the other, each on the tokens that picked it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = PlainGate(shape)
        self.experts = PlainExperts(shape)
        self.num_tokens_per_expert = torch.zeros(shape.num_experts, dtype=torch.int64)
        """Of the last call."""

    def forward(self, x: Float32[Tensor, "*lead H"]) -> Float32[Tensor, "*lead H"]:
        tokens = x.flatten(0, -2)
        topk_idx, weights = self.gate(tokens)
        self.num_tokens_per_expert = topk_idx.flatten().bincount(minlength=self.gate.shape.num_experts)
        out = torch.zeros_like(tokens)
        w1, w2, w3 = self.experts.w1, self.experts.w2, self.experts.w3
        for expert in range(len(w1)):
            token, pick = (topk_idx == expert).nonzero(as_tuple=True)
            rows = tokens[token]
            y = (functional.silu(rows @ w1[expert].T) * (rows @ w3[expert].T)) @ w2[expert].T
            out.index_add_(0, token, y * weights[token, pick].unsqueeze(1))
        return out.view_as(x)
