"""Sums of rows on CPUs: float32, in a fixed order.

Letters: T sums, n terms of all sums, N source rows, H hidden.
"""

from __future__ import annotations

import functools
import warnings

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from crossdock.plan import Terms

_CHUNK_VALUES = 32 * 7168
"""Values summed at a time: the float32 sums and their terms fit in a core's L2 cache."""


def sum_rows(
    source: Float[Tensor, "N H"],
    terms: Terms,
    *,
    dtype: torch.dtype,
    weights: Float32[Tensor, "n"] | None = None,
    bias: Float[Tensor, "T H"] | Float[Tensor, "H"] | None = None,
    out: Float[Tensor, "T H"] | None = None,
) -> Float[Tensor, "T H"]:
    """``cast(0 + w0 * source[i0] + w1 * source[i1] + ... + bias)`` for each sum; ``terms`` has its rows ``i``.

    Terms are added from left to right. Each product and each sum is rounded to float32 (no fused multiply-add), and the
    result is cast to ``dtype`` once.

    Args:
        weights: one per term; None: no product.
        bias: one row per sum, or one for all.
        out: where to write the sums, of that dtype; None: a new tensor.

    >>> terms = Terms(torch.tensor([0, 2, 3]), torch.tensor([2, 0, 1]))
    >>> sum_rows(torch.tensor([[1.0], [2.0], [4.0]]), terms, dtype=torch.float32).tolist()
    [[5.0], [2.0]]
    """
    if weights is None and bias is None and source.dtype == dtype and _sparse_sums_are_ours(dtype):
        sums = _sparse_sums(source, terms)
        return sums if out is None else out.copy_(sums)
    if out is None:
        out = torch.empty(terms.offsets.shape[0] - 1, source.shape[1], dtype=dtype, device="cpu")
    return _plain_sums(source, terms, out, weights, bias)


def chunk_rows(hidden: int) -> int:
    """Rows summed at a time, at least 32."""
    return max(32, _CHUNK_VALUES // hidden)


def _sparse_sums(source: Tensor, terms: Terms) -> Tensor:
    """Unweighted sums as the product of a sparse matrix of ones and ``source``: reads each row once, copies none."""
    matrix = _matrix(terms, num_rows=source.shape[0], dtype=source.dtype)
    sums: Tensor = torch.sparse.mm(matrix, source, "sum")
    return sums


def _matrix(terms: Terms, *, num_rows: int, dtype: torch.dtype) -> Tensor:
    """A one for each term: [T, N]."""
    ones = torch.ones(terms.rows.shape[0], dtype=dtype, device="cpu")
    shape = (terms.offsets.shape[0] - 1, num_rows)
    return torch.sparse_csr_tensor(
        terms.offsets, terms.rows, ones, shape, dtype=dtype, device="cpu", check_invariants=False
    )


def _plain_sums(source: Tensor, terms: Terms, out: Tensor, weights: Tensor | None, bias: Tensor | None) -> Tensor:
    """The definition of the sums, into ``out``: gather, multiply, add."""
    offsets, rows = terms.offsets.numpy(), terms.rows.numpy()
    lengths = np.diff(offsets)
    num_rows = chunk_rows(source.shape[1])
    for start in range(0, lengths.size, num_rows):
        here = slice(start, min(start + num_rows, lengths.size))
        # Longest sums first: the sums that have a j-th term are then the first ones of the chunk.
        order = np.argsort(-lengths[here], kind="stable")
        firsts, ordered = offsets[here][order], lengths[here][order]
        sums = torch.zeros(order.size, source.shape[1], dtype=torch.float32, device="cpu")
        for j in range(int(ordered.max())):
            nth = firsts[: int((ordered > j).sum())] + j
            gathered = torch.index_select(source, 0, torch.from_numpy(rows[nth]))
            if weights is not None:
                gathered = gathered.to(torch.float32) * weights[torch.from_numpy(nth)].unsqueeze(1)
            sums[: nth.size].add_(gathered)
        sums = sums[torch.from_numpy(np.argsort(order))]
        if bias is not None:
            sums += bias[here] if bias.dim() == 2 else bias
        out[here] = sums
    return out


@functools.cache
def _sparse_sums_are_ours(dtype: torch.dtype) -> bool:
    """Whether this torch's sparse product gives the bits of ``_plain_sums`` for a dtype.

    Found out at the first sum, not at import: it starts torch's threads, and a child that is forked from a process that
    has them hangs in the next product.
    """
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 40)) * 2.0 ** rng.integers(-10, 10, (64, 1))
    source = torch.from_numpy(values.astype(np.float32)).to(dtype)
    terms = Terms(torch.from_numpy(np.arange(0, 65, 8)), torch.from_numpy(rng.integers(64, size=64)))
    try:
        sums = _sparse_sums(source, terms)
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(sums, _plain_sums(source, terms, torch.empty_like(sums), None, None))


def _hear_that_it_is_beta() -> None:
    """Makes the first sparse matrix of the process, of which torch warns once: at import, where nothing else runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _matrix(Terms.of(np.zeros((1, 1), dtype=np.int64)), num_rows=1, dtype=torch.float32)


_hear_that_it_is_beta()
