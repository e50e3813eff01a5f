"""Rows as DeepEP's programs bring them: bfloat16, or values with scales, of whatever format.

Letters: T tokens here, H hidden, Q scale words of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.compat.deep_ep.engine import plain
from crossdock.errors import ConfigError
from crossdock.wire import Bf16, Opaque, Quantized, Wire

Rows = Tensor | tuple[Tensor, Tensor]


def read(x: object) -> tuple[Tensor, Tensor | None]:
    """Data [T, H] and scales [T, Q], or None, as values.

    Raises:
        ConfigError: it is neither bfloat16 rows nor a pair of data and scales.
    """
    if isinstance(x, Tensor):
        if x.dtype != torch.bfloat16 or x.dim() != 2:
            raise no_rows(x)
        return plain(x) if x.requires_grad else x, None
    if not (isinstance(x, tuple) and len(x) == 2 and all(isinstance(part, Tensor) for part in x)):
        raise no_rows(x)
    data, scales = x
    if data.dim() != 2 or scales.dim() != 2 or len(data) != len(scales) or scales.element_size() != 4:
        raise ConfigError(
            f"x is a pair of {data.dtype} {list(data.shape)} and {scales.dtype} {list(scales.shape)}; pass data "
            f"[tokens, columns] and scales [tokens, words] of 4 bytes each (float32, or int32 of four exponents)"
        )
    return plain(data), plain(scales)


def bad_picks(topk_idx: Tensor) -> ConfigError:
    """What to raise where picks are no matrix of integers."""
    return ConfigError(
        f"topk_idx is {topk_idx.dtype} {list(topk_idx.shape)}; pass int64 [tokens, picks], -1 for no pick"
    )


def no_rows(x: object) -> ConfigError:
    """What to raise where something is no rows."""
    what = f"a {x.dtype} tensor {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    return ConfigError(f"x is {what}; pass bfloat16 [tokens, hidden], or a pair (data, scales) such as FP8 rows are")


def wire_of(data_dtype: torch.dtype, hidden: int, scales: tuple[int, torch.dtype] | None, *, packed: int = 1,
            column_major: bool = False) -> Wire:  # fmt: skip
    """The native format of rows whose bits are the caller's matter.

    Args:
        scales: scale words of a row, and their dtype.
        packed: values in one element of data.
    """
    if scales is None:
        return Bf16()
    num_words, dtype = scales
    return Opaque(
        dtype=data_dtype,
        values_per_element=packed,
        block=block_of(hidden, num_words),
        scale_dtype=dtype,
        column_major=column_major,
    )


def block_of(hidden: int, num_words: int) -> int:
    """Values per scale word, so that a row of ``hidden`` values has that many words, or as few more as there can be.

    What a word stands for is the caller's matter, so any such block will do.

    Raises:
        ConfigError: there are more words than values, or none.

    >>> [-(-hidden // block_of(hidden, words)) for hidden, words in ((7168, 56), (2880, 23), (7168, 14), (10, 6))]
    [56, 23, 14, 10]
    """
    if not 1 <= num_words <= hidden:
        raise ConfigError(
            f"{num_words} scale words for rows of {hidden} values; pass at least one, and at most one per value"
        )
    return hidden if num_words == 1 else (hidden - 1) // (num_words - 1)


def as_native(data: Tensor, scales: Tensor | None, wire: Wire, hidden: int) -> Tensor | Quantized:
    """What a native dispatch takes: with as many scale words as the wire has."""
    if scales is None:
        return data
    if (missing := wire.num_scales(hidden) - scales.shape[1]) > 0:
        scales = torch.nn.functional.pad(scales.view(torch.int32), (0, missing)).view(scales.dtype)
    return Quantized(data, scales)


def as_given(rows: Tensor | Quantized, num_words: int | None = None) -> Rows:
    """What a DeepEP dispatch gives: with as many scale words as were brought."""
    if isinstance(rows, Tensor):
        return rows
    data, scale = rows
    if num_words is not None and num_words < scale.shape[1]:
        scale = scale[:, :num_words] if scale.stride(1) != 1 else scale[:, :num_words].contiguous()
    return data, scale
