"""How many rows a routing makes of a token: over the rail, and to ranks. Expected, drawn, or counted in recorded picks.

Letters: S steps, T tokens of all ranks, K top-k, E experts, L local experts, P ranks, U ranks of a node, N nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossdock.routing import group_limited_topk
from crossdock.spec import Spec, Topology, check_experts

_SAMPLES = 4096
"""Tokens that are drawn of a group-limited gate: means of rows are then within 1 % of those of 100,000."""
_SEED = 1


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What one token becomes, on average over tokens, and how unevenly that falls on ranks.

    Picks that fall on each node and rank alike are assumed where a row's way is worked out: of the nodes that a token
    visits 1 / N is its own. What a recording does otherwise is in its skews.

    Args:
        nodes: nodes that hold one of the token's experts, its own among them.
        ranks: ranks that do.
        picks: picks that are none of -1.
        skew_out: what the busiest rank sends or receives over the rail, in units of the mean of all ranks.
        skew_up: the same of the links of its node.
    """

    nodes: float
    ranks: float
    picks: float
    skew_out: float = 1.0
    skew_up: float = 1.0


def ranks_per_token(spec: Spec, num_ranks: int) -> float:
    """Expected number of ranks that hold one of a token's K picks: ``P * (1 - C(E - L, K) / C(E, K))``.

    >>> round(ranks_per_token(Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=1), 8), 2)
    5.29
    """
    others = spec.num_experts - spec.num_local_experts(num_ranks)
    return num_ranks * (1 - math.comb(others, spec.num_topk) / math.comb(spec.num_experts, spec.num_topk))


def uniform_rows(spec: Spec, topology: Topology) -> Rows:
    """Of picks that are distinct and all equally likely; exact.

    >>> spec = Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=1)
    >>> round(uniform_rows(spec, Topology(num_ranks=64, scale_up=8)).nodes, 2)
    5.29
    """
    check_experts(spec.num_experts, topology.num_ranks)
    return Rows(
        nodes=ranks_per_token(spec, topology.num_nodes),
        ranks=ranks_per_token(spec, topology.num_ranks),
        picks=spec.num_topk,
    )


def group_limited_rows(spec: Spec, topology: Topology, *, num_topk_groups: int, num_groups: int | None = None) -> Rows:
    """Of a gate that picks from each token's best groups alone (``group_limited_topk``), with random scores; drawn.

    Args:
        num_topk_groups: groups that a token may visit.
        num_groups: that the experts form; None: one for each node, and no limit where there are no more nodes than a
            token may visit.

    Raises:
        ConfigError: the sizes do not fit together.

    >>> spec = Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=1)
    >>> round(group_limited_rows(spec, Topology(num_ranks=64, scale_up=8), num_topk_groups=4).nodes, 1)
    4.0
    """
    num_groups = num_groups or max(topology.num_nodes, num_topk_groups)
    if num_groups == num_topk_groups:
        return uniform_rows(spec, topology)
    generator = torch.Generator().manual_seed(_SEED)
    scores = torch.randn(_SAMPLES, spec.num_experts, generator=generator, dtype=torch.float32, device="cpu")
    picks = group_limited_topk(scores, spec.num_topk, num_groups=num_groups, num_topk_groups=num_topk_groups).topk_idx
    nodes, ranks = (
        _visited(picks.numpy(), spec.num_experts, parts) for parts in (topology.num_nodes, topology.num_ranks)
    )
    return Rows(nodes=float(nodes.mean()), ranks=float(ranks.mean()), picks=spec.num_topk)


def recorded_rows(picks: npt.NDArray[Any], spec: Spec, topology: Topology) -> Rows:
    """Of recorded picks, int [T, K] or [S, T, K] with the tokens of all ranks, -1 for no pick: rank r brought tokens
    ``r * T / P`` to ``(r + 1) * T / P - 1`` of a step. Skews are the mean of the steps'.

    Raises:
        ConfigError: the experts do not fit the ranks.

    >>> spec = Spec(num_experts=4, num_topk=1, hidden=8, max_tokens=1)
    >>> recorded_rows(np.array([[0], [0], [0], [3]]), spec, Topology(num_ranks=4, scale_up=2))
    Rows(nodes=1.0, ranks=1.0, picks=1.0, skew_out=2.0, skew_up=2.0)
    """  # noqa: D205 - which tokens are whose belongs to their shape
    check_experts(spec.num_experts, topology.num_ranks)
    steps = np.asarray(picks).reshape(-1, *picks.shape[-2:])
    num_tokens, num_ranks = steps.shape[1], topology.num_ranks
    ends = [num_tokens * (rank + 1) // num_ranks for rank in range(num_ranks)]
    sources = np.searchsorted(ends, np.arange(num_tokens), side="right")
    nodes = ranks = filled = 0.0
    skews = []
    for step in steps:
        nodes += float(_visited(step, spec.num_experts, topology.num_nodes).mean())
        ranks += float(_visited(step, spec.num_experts, num_ranks).mean())
        filled += float((step >= 0).sum(1).mean())
        skews.append(_skews(step, sources, spec, topology))
    mean = 1 / len(steps)
    out, up = np.mean(skews, axis=0).tolist()
    return Rows(nodes=nodes * mean, ranks=ranks * mean, picks=filled * mean, skew_out=out, skew_up=up)


def _visited(picks: npt.NDArray[Any], num_experts: int, num_parts: int) -> npt.NDArray[np.int64]:
    """[T]: in how many of equal parts of the experts each token has picks."""
    parts = np.sort(np.where(picks < 0, -1, picks // (num_experts // num_parts)), axis=1)
    first = np.concatenate([np.ones((len(parts), 1), bool), parts[:, 1:] != parts[:, :-1]], axis=1)
    counts: npt.NDArray[np.int64] = (first & (parts >= 0)).sum(axis=1)
    return counts


def _skews(
    picks: npt.NDArray[Any], sources: npt.NDArray[np.int64], spec: Spec, topology: Topology
) -> tuple[float, float]:
    """The busiest rank over ``Rows``' mean, over the rail and over the links of a node, of one step on two hops."""
    shape = topology.num_nodes, topology.node_size
    to_nodes = _matrix(picks, sources, spec, topology, topology.num_nodes).reshape(*shape, topology.num_nodes)
    to_ranks = _matrix(picks, sources, spec, topology, topology.num_ranks).reshape(*shape, *shape)
    own, same = np.arange(topology.num_nodes), np.arange(topology.node_size)
    most_tokens = int(np.bincount(sources).max()) / len(sources)
    nodes, ranks = (int(matrix.sum()) * most_tokens for matrix in (to_nodes, to_ranks))  # of a rank with most tokens
    to_nodes[own, :, own] = 0  # [N, U, N]: rows of rank (n, u) over the rail to its peer on node m
    to_ranks[:, same, :, same] = 0  # [N, U, N, U]: rows of (n, u) that its peer (m, u) passes on to (m, v)
    over_rail = max(to_nodes.sum(axis=2).max(), to_nodes.sum(axis=0).max())
    over_link = max(to_ranks.sum(axis=(0, 3)).max(), to_ranks.sum(axis=(0, 1)).max())

    def skew(busiest: int, rows: float, parts: int) -> float:
        mean = rows * (1 - 1 / parts)
        return float(busiest / mean) if mean else 1.0

    return skew(over_rail, nodes, topology.num_nodes), skew(over_link, ranks, topology.node_size)


def _matrix(
    picks: npt.NDArray[Any], sources: npt.NDArray[np.int64], spec: Spec, topology: Topology, num_parts: int
) -> npt.NDArray[np.int64]:
    """[P, parts]: tokens of each rank with a pick in each part of the experts."""
    parts = np.sort(np.where(picks < 0, num_parts, picks // (spec.num_experts // num_parts)), axis=1)
    first = np.concatenate([np.ones((len(parts), 1), bool), parts[:, 1:] != parts[:, :-1]], axis=1)
    cells = (sources[:, None] * (num_parts + 1) + parts)[first]
    counts = np.bincount(cells, minlength=topology.num_ranks * (num_parts + 1))
    matrix: npt.NDArray[np.int64] = counts.reshape(topology.num_ranks, num_parts + 1)[:, :-1].copy()
    return matrix
