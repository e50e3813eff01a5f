"""Inputs of all ranks, the same on each, and what comes of them by definition: plain loops over picks.

Letters: R ranks, T tokens of a rank, K picks per token, E experts, L local experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_LOCAL = 3


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What each rank brings."""

    num_ranks: int
    x: list[Tensor]  # bfloat16 [T, H] each
    topk_idx: list[Tensor]  # int64 [T, K] each, some -1
    topk_weights: list[Tensor]  # float32 [T, K] each

    @property
    def num_experts(self) -> int:
        return NUM_LOCAL * self.num_ranks

    def home(self, expert: int) -> int:
        return expert // NUM_LOCAL if expert >= 0 else -1

    def pairs(self, rank: int) -> list[tuple[int, int]]:
        """(source, token) of each row that comes to a rank, one for each token that has a pick there."""
        return [
            (s, t)
            for s, idx in enumerate(self.topk_idx)
            for t, picks in enumerate(idx.tolist())
            if any(self.home(e) == rank for e in picks)
        ]

    def counts(self, rank: int) -> list[int]:
        """Picks of each local expert."""
        picked = torch.cat([idx.flatten() for idx in self.topk_idx])
        return [int((picked == rank * NUM_LOCAL + e).sum()) for e in range(NUM_LOCAL)]

    def rows(self, rank: int, expert: int) -> list[tuple[int, int, int]]:
        """(source, token, pick) of each row of a local expert."""
        return [
            (s, t, k)
            for s, idx in enumerate(self.topk_idx)
            for t, picks in enumerate(idx.tolist())
            for k, e in enumerate(picks)
            if e == rank * NUM_LOCAL + expert
        ]

    def local(self, rank: int, source: int, token: int) -> list[int]:
        """A token's picks as a rank sees them: local ids, -1 for those of other ranks."""
        picks = self.topk_idx[source][token].tolist()
        return [e - rank * NUM_LOCAL if self.home(e) == rank else -1 for e in picks]

    def num_homes(self, source: int) -> Tensor:
        """To how many ranks each token goes, [T]."""
        homes = [{self.home(e) for e in picks} - {-1} for picks in self.topk_idx[source].tolist()]
        return torch.tensor([len(each) for each in homes], dtype=torch.int64)


def make_batch(num_ranks: int, *, num_topk: int = 3, hidden: int = 128, tokens: list[int] | None = None, seed=0):
    """Whole numbers, whose sums are exact in bfloat16; some ranks bring more than others, the last one nothing."""
    g = torch.Generator().manual_seed(seed + 17 * num_ranks)
    if tokens is None:
        tokens = [5 + 2 * rank for rank in range(num_ranks)]
        if num_ranks > 1:
            tokens[-1] = 0
    x, idx, weights = [], [], []
    num_experts = NUM_LOCAL * num_ranks
    for num_tokens in tokens:
        x.append(torch.randint(-8, 9, (num_tokens, hidden), generator=g).to(torch.bfloat16))
        picks = torch.rand(num_tokens, num_experts, generator=g).topk(num_topk, 1).indices
        picks[torch.rand(num_tokens, num_topk, generator=g) < 0.2] = -1
        if num_tokens > 1:
            picks[1] = -1
        idx.append(picks)
        weights.append(torch.randint(1, 5, (num_tokens, num_topk), generator=g).float() / 4)
    return Batch(num_ranks=num_ranks, x=x, topk_idx=idx, topk_weights=weights)


def fp8_rows(x: Tensor, num_words: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows as a client casts them by itself, whatever the scales mean."""
    words = num_words or -(-x.shape[1] // 128)
    scales = torch.arange(x.shape[0] * words, dtype=torch.float32).view(x.shape[0], words) + 0.5
    return x.to(torch.float8_e4m3fn), scales
