"""Sums of rows in float32, in a fixed order, on CPUs.

Letters: T sums, J most terms of a sum, N source rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

CHUNK_ROWS = 32
"""Rows summed at a time: 7168 float32 sums and what is added to them stay in a core's second-level cache."""


def sum_rows(
    source: Float[Tensor, "N H"],
    terms: Int64[Tensor, "T J"],
    *,
    out: Float[Tensor, "T H"],
    weights: Float32[Tensor, "T J"] | None = None,
    bias: Float[Tensor, "T H"] | Float[Tensor, "H"] | None = None,
) -> None:
    """Writes ``cast(w0 * source[terms[t, 0]] + w1 * source[terms[t, 1]] + ... + bias[t])`` into ``out[t]``.

    Every product and every sum is rounded to float32 by itself (no fused multiply-add), from left to right, then cast
    once. Terms of -1 count for nothing and stand behind the others; a sum of none is 0.

    >>> out = torch.empty(2, 1)
    >>> sum_rows(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[2, 0], [1, -1]]), out=out)
    >>> out.tolist()
    [[5.0], [2.0]]
    """
    num_sums, num_terms = terms.shape
    scratch = _Scratch(min(CHUNK_ROWS, num_sums), source.shape[1], source.dtype, out.dtype)
    # torch adds two rows of one format in float32 and casts once: half the passes over the rows.
    is_pair = num_terms == 2 and weights is None and bias is None and source.dtype == out.dtype
    for chunk in _chunks(terms, weights):
        target = out[chunk.sums] if chunk.order is None else scratch.result[: chunk.order.size]
        if is_pair:
            _add_pair(source, chunk, scratch, target)
        else:
            target.copy_(_accumulate(source, chunk, scratch, bias, target.shape[0]))
        if chunk.order is not None:
            torch.index_select(target, 0, torch.from_numpy(np.argsort(chunk.order)), out=out[chunk.sums])


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Some of the sums, the longest first, so that the j-th terms belong to the first ``lengths[j]`` of them."""

    sums: slice
    order: npt.NDArray[np.int64] | None  # None: all have as many terms, and stay in their order
    terms: npt.NDArray[np.int64]  # [J, sums]
    weights: npt.NDArray[np.float32] | None  # [J, sums]
    lengths: list[int]  # [J]


class _Scratch:
    """What a chunk needs beside its result."""

    def __init__(self, num_rows: int, hidden: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        self.rows = torch.empty(num_rows, hidden, dtype=dtype)
        self.products = torch.empty(num_rows, hidden)
        self.sums = torch.empty(num_rows, hidden)
        self.result = torch.empty(num_rows, hidden, dtype=out_dtype)


def _chunks(terms: Tensor, weights: Tensor | None) -> Iterator[_Chunk]:
    columns = np.ascontiguousarray(terms.numpy().T)
    weight_columns = None if weights is None else np.ascontiguousarray(weights.numpy().T)
    num_terms, num_sums = columns.shape
    degrees = (columns >= 0).sum(axis=0)
    for start in range(0, num_sums, CHUNK_ROWS):
        sums = slice(start, min(start + CHUNK_ROWS, num_sums))
        degree, idx = degrees[sums], columns[:, sums]
        w = None if weight_columns is None else weight_columns[:, sums]
        order, lengths = None, [degree.size] * num_terms
        if degree.min() < num_terms:
            order = np.argsort(-degree, kind="stable")
            lengths = [int((degree > j).sum()) for j in range(num_terms)]
            idx, w = idx[:, order], None if w is None else w[:, order]
        yield _Chunk(sums=sums, order=order, terms=idx, weights=w, lengths=lengths)


def _accumulate(source: Tensor, chunk: _Chunk, scratch: _Scratch, bias: Tensor | None, num_sums: int) -> Tensor:
    """The chunk's sums in float32, [sums, H], in the chunk's order."""
    sums = scratch.sums[:num_sums]
    if not chunk.lengths:
        sums.zero_()
    for j, length in enumerate(chunk.lengths):
        rows = _gather(source, chunk.terms[j, :length], scratch.rows)
        if chunk.weights is not None:
            w = torch.from_numpy(np.ascontiguousarray(chunk.weights[j, :length]))
            rows = scratch.products[:length].copy_(rows).mul_(w.unsqueeze(1))
        if j == 0:
            sums[:length].copy_(rows)
            sums[length:].zero_()
        else:
            sums[:length].add_(rows)
    if bias is not None:
        rows = bias if bias.dim() == 1 else bias[chunk.sums]
        sums.add_(rows if chunk.order is None or bias.dim() == 1 else rows[torch.from_numpy(chunk.order)])
    return sums


def _add_pair(source: Tensor, chunk: _Chunk, scratch: _Scratch, target: Tensor) -> None:
    """The chunk's sums of at most two rows, cast, into ``target``."""
    firsts, pairs = chunk.lengths
    first = _gather(source, chunk.terms[0, :firsts], target)
    target[firsts:].zero_()
    torch.add(first[:pairs], _gather(source, chunk.terms[1, :pairs], scratch.rows), out=target[:pairs])


def _gather(source: Tensor, idx: npt.NDArray[np.int64], into: Tensor) -> Tensor:
    return torch.index_select(source, 0, torch.from_numpy(np.ascontiguousarray(idx)), out=into[: idx.size])
