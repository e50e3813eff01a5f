"""A mixture of experts in one process, and what clients build of it: experts by number, gradients by autograd.

Letters: T tokens, K picks per token, E experts, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.compat.batches import NUM_LOCAL


def expert(x: Tensor, number: int) -> Tensor:
    """What an expert makes of rows [R, H]: whole numbers of whole numbers, so that sums are exact."""
    return x * (number % 3 + 1) + (number + 1)


def dense(x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
    """The layer's output [T, H] in float32, with gradients."""
    out = 0.0 * x.float() + 0.0 * topk_weights.sum()
    for k in range(topk_idx.shape[1]):
        for number in topk_idx[:, k].unique().tolist():
            if number >= 0:
                is_here = (topk_idx[:, k] == number).unsqueeze(1)
                out = out + (topk_weights[:, k : k + 1] * expert(x.float(), number)).where(is_here, 0.0)
    return out


def local_output(rows: Tensor, local_idx: Tensor, weights: Tensor, rank: int) -> Tensor:
    """What a rank makes of compact rows: the weighted sum of its experts for each, bfloat16 [N, H], with gradients."""
    out = 0.0 * rows.float() + 0.0 * weights.sum()
    for k in range(local_idx.shape[1]):
        for e in range(NUM_LOCAL):
            is_here = (local_idx[:, k] == e).unsqueeze(1)
            out = out + (weights[:, k : k + 1] * expert(rows.float(), rank * NUM_LOCAL + e)).where(is_here, 0.0)
    return out.to(torch.bfloat16)


def grouped_output(rows: Tensor, ends: list[tuple[int, int]], rank: int) -> Tensor:
    """What a rank makes of expanded rows: each expert of its own, from (begin, end) of each; NaN between them."""
    parts, at = [], 0
    for e, (begin, end) in enumerate(ends):
        parts.append(torch.full((begin - at, rows.shape[1]), float("nan"), dtype=rows.dtype))
        parts.append(expert(rows[begin:end].float(), rank * NUM_LOCAL + e).to(rows.dtype))
        at = end
    parts.append(torch.full((rows.shape[0] - at, rows.shape[1]), float("nan"), dtype=rows.dtype))
    return torch.cat(parts)
