"""Scores that load some experts more than others; DeepEP's test programs import it from ``deep_ep.utils.gate``.

Letters: T tokens, E experts, L experts of a rank, K picks per token, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def get_unbalanced_scores(
    num_tokens: int,
    num_experts: int,
    num_ranks: int,
    num_topk: int,
    unbalanced_ratio: float = 1.0,
    precise: bool | int = False,
    *_: Any,
) -> Tensor:
    """float32 [T, E], all positive, by whose K largest the first rank gets more tokens than each of the others.

    Args:
        unbalanced_ratio: how many times as many; 1 is balanced.
        precise: so many, of these very tokens, and as many to each of the others, where ``num_ranks_of_token`` says
            that there is a way. Else in the mean, roughly.
    """
    device = torch.get_default_device()
    scores = torch.rand(num_tokens, num_experts, dtype=torch.float32, device=device) + 1e-6
    num_local = num_experts // num_ranks
    if precise and (width := num_ranks_of_token(num_ranks, num_topk, num_local, unbalanced_ratio)):
        return scores + 2 * _picks_at(
            _ranks_of_tokens(num_tokens, num_ranks, width, unbalanced_ratio), scores, num_topk
        )
    if unbalanced_ratio > 1 and num_ranks > 1:
        share = min(1.0, unbalanced_ratio * num_topk / (num_ranks - 1 + unbalanced_ratio))
        is_hot = torch.rand(num_tokens, dtype=torch.float32, device=device) < share
        best = torch.randint(0, num_local, (num_tokens,), dtype=torch.int64, device=device)
        scores[torch.arange(num_tokens, dtype=torch.int64, device=device), best] += 2.0 * is_hot
    return scores


def num_ranks_of_token(num_ranks: int, num_topk: int, num_local: int, ratio: float) -> int:
    """The most ranks that each token can go to, so that the first gets ``ratio`` times the others' tokens; 0: none can.

    >>> num_ranks_of_token(8, 8, 32, 4.0), num_ranks_of_token(8, 8, 1, 2.0)
    (2, 0)
    """
    least = max(1, -(-num_topk // num_local))
    most = min(num_topk, num_ranks, int((num_ranks - 1) / ratio) + 1)
    return most if least <= most else 0


def _ranks_of_tokens(num_tokens: int, num_ranks: int, width: int, ratio: float) -> Tensor:
    """Gives bool [T, R]: ``width`` ranks of each token, the first one for its share, the others in turn."""
    device = torch.get_default_device()
    num_first = min(num_tokens, round(num_tokens * width * ratio / (ratio + num_ranks - 1)))
    goes = torch.zeros(num_tokens, num_ranks, dtype=torch.bool, device=device)
    if num_ranks == 1:
        return ~goes
    goes[torch.randperm(num_tokens, dtype=torch.int64, device=device)[:num_first], 0] = True
    left = width - goes[:, 0].to(torch.int64)  # how many others each token goes to
    begins = left.cumsum(0) - left + torch.randint(0, num_ranks - 1, (1,), dtype=torch.int64, device=device)
    for turn in range(width):
        other = 1 + (begins + turn) % (num_ranks - 1)
        goes[torch.arange(num_tokens, dtype=torch.int64, device=device), other] |= turn < left
    return goes


def _picks_at(goes: Tensor, scores: Tensor, num_topk: int) -> Tensor:
    """float32 [T, E]: 1 for K experts of each token, of all ranks that it goes to and of no others."""
    num_tokens, num_ranks = goes.shape
    place = scores.view(num_tokens, num_ranks, -1).argsort(dim=2).argsort(dim=2)  # of an expert among its rank's
    turn = place + scores.view(num_tokens, num_ranks, -1) / 2  # all ranks' first experts, then their second ones
    turn = turn.masked_fill(~goes.unsqueeze(2), float("inf")).view(num_tokens, -1)
    chosen = turn.topk(num_topk, dim=1, largest=False).indices
    return torch.zeros_like(scores).scatter_(1, chosen, 1.0)
