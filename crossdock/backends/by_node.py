"""Sums in two steps: of each token's rows on one node, cast, then of these over nodes (``reduce="node"``).

Letters: T tokens here, K top-k, N nodes, n (token, node) pairs, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from crossdock.backends.sums import sum_rows
from crossdock.plan import Terms

Numbers = npt.NDArray[np.signedinteger]


class NodeTerms(NamedTuple):
    """Which rows each (token, node) pair sums, and which pairs each token sums."""

    of_pairs: Terms
    """n sums of rows: tokens ascending, and of each token its nodes ascending."""
    of_tokens: Terms
    """T sums of pairs."""

    @staticmethod
    def of(rows: Numbers, nodes: Numbers, *, num_nodes: int) -> NodeTerms:
        """From tables [T, K] of row numbers, in the order in which a node sums them, and of these rows' nodes.

        Entries with a negative row are no terms.

        >>> terms = NodeTerms.of(np.array([[7, 4, 5]]), np.array([[1, 0, 1]]), num_nodes=2)
        >>> [part.tolist() for part in terms.of_pairs], [part.tolist() for part in terms.of_tokens]
        ([[0, 1, 3], [4, 7, 5]], [[0, 2], [0, 1]])
        """
        is_there = (nodes[:, None, :] == np.arange(num_nodes)[:, None]) & (rows >= 0)[:, None, :]  # [T, N, K]
        has_rows = is_there.any(axis=2)
        table = np.where(is_there, rows[:, None, :], -1)[has_rows]  # [n, K]
        pairs = np.where(has_rows, np.cumsum(has_rows).reshape(has_rows.shape) - 1, -1)
        return NodeTerms(Terms.of(table), Terms.of(pairs))


def sum_by_node(
    source: Float[Tensor, "R H"],
    terms: NodeTerms,
    *,
    dtype: torch.dtype,
    weights: Float32[Tensor, "m"] | None = None,
    bias: Tensor | None = None,
    out: Float[Tensor, "T H"] | None = None,
) -> Float[Tensor, "T H"]:
    """``cast(0 + cast(sum of node 0) + cast(sum of node 1) + ... + bias)`` for each token, in float32.

    Args:
        weights: one for each term of the pairs; None: no product.
        bias: [T, H] or [H].
        out: where to write the sums; None: a new tensor.
    """
    partial = sum_rows(source, terms.of_pairs, dtype=dtype, weights=weights)
    return sum_rows(partial, terms.of_tokens, dtype=dtype, bias=bias, out=out)
