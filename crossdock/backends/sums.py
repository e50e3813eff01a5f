"""Sums of rows in float32, in a fixed order, on CPUs.

Letters: T sums, J most terms of a sum, N source rows, H hidden.
"""

from __future__ import annotations

import numpy as np
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
    hidden = source.shape[1]
    chunk = min(CHUNK_ROWS, max(num_sums, 1))
    rows = torch.empty(chunk, hidden, dtype=source.dtype)
    acc = torch.empty(chunk, hidden)
    wide = torch.empty(chunk, hidden)
    result = torch.empty(chunk, hidden, dtype=out.dtype)
    columns = terms.numpy().T
    weight_columns = None if weights is None else weights.numpy().T
    degrees = (columns >= 0).sum(axis=0)
    for start in range(0, num_sums, chunk):
        stop = min(start + chunk, num_sums)
        here = slice(start, stop)
        degree = degrees[here]
        # Longest sums first, so that the j-th terms of a chunk belong to its first n sums.
        order = None if (degree == num_terms).all() else np.argsort(-degree, kind="stable")
        sums = acc[: stop - start]
        if num_terms == 0:
            sums.zero_()
        for j in range(num_terms):
            n = stop - start if order is None else int((degree > j).sum())
            idx = columns[j, here] if order is None else columns[j, here][order[:n]]
            gathered = torch.index_select(source, 0, torch.from_numpy(np.ascontiguousarray(idx)), out=rows[:n])
            if weight_columns is not None:
                w = weight_columns[j, here] if order is None else weight_columns[j, here][order[:n]]
                wide[:n].copy_(gathered)
                gathered = wide[:n].mul_(torch.from_numpy(np.ascontiguousarray(w)).unsqueeze(1))
            if j == 0:
                sums[:n].copy_(gathered)
                sums[n:].zero_()
            elif n:
                sums[:n].add_(gathered)
        back = None if order is None else torch.from_numpy(np.argsort(order))
        if bias is not None:
            add = bias[here] if bias.dim() == 2 else bias
            sums.add_(add if order is None or bias.dim() == 1 else add[torch.from_numpy(order)])
        if back is None:
            out[here].copy_(sums)
        else:
            cast = result[: stop - start].copy_(sums)
            torch.index_select(cast, 0, back, out=out[here])
