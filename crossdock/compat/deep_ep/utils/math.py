"""Arithmetic that DeepEP's test programs import from ``deep_ep.utils.math``.

Letters: T tokens, H hidden, E experts, K picks per token, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 128
_PER_WORD = 4
_E4M3_MAX = 448.0
_MIN_AMAX = 1e-4


def ceil_div(a: int, b: int) -> int:
    """The quotient a / b, rounded up.

    >>> ceil_div(5, 2)
    3
    """
    return -(-a // b)


def align(a: int, b: int) -> int:
    """The smallest multiple of b that is not less than a.

    >>> align(5, 4)
    8
    """
    return ceil_div(a, b) * b


def safe_div(a: float, b: float) -> float:
    """The quotient a / b, or 0 where b is 0."""
    return a / b if b else 0.0


def calc_diff(x: Tensor, y: Tensor) -> float:
    """How far two tensors are from being the same, relative to their sizes: 0 for equal ones.

    One minus the ratio of twice their inner product to the sum of their squares, both moved away from 0 by 1.
    """
    a, b = x.double() + 1, y.double() + 1
    squares = (a * a + b * b).sum()
    return 0.0 if not squares else float(1 - 2 * (a * b).sum() / squares)


def count_bytes(*tensors: Any) -> int:
    """Bytes of tensors, also of those in tuples and lists; of None none."""
    total = 0
    for each in tensors:
        if isinstance(each, (tuple, list)):
            total += count_bytes(*each)
        elif each is not None:
            total += each.numel() * each.element_size()
    return total


def hash_tensor(x: Tensor) -> int:
    """A number of all bits: equal tensors have the same."""
    flat = x.contiguous().reshape(-1).view(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return int(padded.view(torch.int64).sum())


def inplace_unique(x: Tensor, num_slots: int) -> None:
    """Each row's different values that are not negative, those that come most often first, then -1; in place.

    Args:
        x: int64 [T, K], values below ``num_slots``.

    >>> rows = torch.tensor([[2, 0, 2, -1], [1, 1, 1, 1]])
    >>> inplace_unique(rows, 3)
    >>> rows.tolist()
    [[2, 0, -1, -1], [1, -1, -1, -1]]
    """
    counts = torch.zeros(x.shape[0], num_slots + 1, dtype=torch.int64, device=x.device)
    places = x.where(x >= 0, num_slots)
    counts.scatter_add_(1, places, torch.ones_like(places))
    most, values = counts[:, :num_slots].sort(dim=1, descending=True, stable=True)
    width = min(num_slots, x.shape[1])
    x.fill_(-1)
    x[:, :width] = values[:, :width].where(most[:, :width] > 0, -1)


def create_grouped_scores(scores: Tensor, group_idx: Tensor, num_groups: int) -> Tensor:
    """Scores [T, E] that are 0 outside of each token's groups of experts.

    Args:
        group_idx: [T, groups of a token]; experts are in ``num_groups`` groups of neighbours.
    """
    num_tokens, num_experts = scores.shape
    is_in = torch.zeros(num_tokens, num_groups, dtype=torch.bool, device=scores.device).scatter_(1, group_idx, True)
    return (scores.view(num_tokens, num_groups, -1) * is_in.unsqueeze(2)).view(num_tokens, num_experts)


def per_token_cast_to_fp8(
    x: Tensor, round_scale: bool = False, use_ue8m0: bool = False, gran_k: int = _BLOCK, **_: Any
) -> tuple[Tensor, Tensor]:
    """e4m3 rows [T, H] and their scales, one for each ``gran_k`` values: float32, or int32 of four exponents.

    Args:
        round_scale: scales are powers of two.
        use_ue8m0: scales are their exponents, four in an int32.
    """
    num_tokens, hidden = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -hidden % gran_k)).view(num_tokens, -1, gran_k)
    scales = padded.abs().amax(dim=2).clamp(min=_MIN_AMAX) / _E4M3_MAX
    if round_scale or use_ue8m0:
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    data = (padded / scales.unsqueeze(2)).to(torch.float8_e4m3fn).view(num_tokens, -1)[:, :hidden].contiguous()
    if not use_ue8m0:
        return data, scales
    exponents = (scales.view(torch.int32) >> 23).to(torch.uint8)
    return data, torch.nn.functional.pad(exponents, (0, -exponents.shape[1] % _PER_WORD)).view(torch.int32)


def per_token_cast_back(data: Tensor, scales: Tensor, gran_k: int = _BLOCK, **_: Any) -> Tensor:
    """bfloat16 rows of e4m3 rows and their scales, float32 or int32 of four exponents; any leading dimensions."""
    if not data.numel():
        return data.to(torch.bfloat16)
    *lead, hidden = data.shape
    num_blocks = ceil_div(hidden, gran_k)
    if scales.dtype == torch.int32:  # whatever shape their words have been given, the bytes of a row are together
        exponents = (
            scales.clone(memory_format=torch.contiguous_format).view(torch.uint8).reshape(*lead, -1)[..., :num_blocks]
        )
        scales = (exponents.to(torch.int32) << 23).view(torch.float32)
    padded = torch.nn.functional.pad(data.float(), (0, -hidden % gran_k)).view(*lead, num_blocks, gran_k)
    wide = (padded * scales.reshape(*lead, num_blocks, 1)).view(*lead, num_blocks * gran_k)
    return wide[..., :hidden].to(torch.bfloat16)
