"""Figures of a run over hosts, from the samples of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from crossdock.cli.bench.over_hosts import HostSample, HostsJob, predicted_s, slowest
from crossdock.cli.hosts.network import bits_per_s
from crossdock.cost import Op


@dataclass(frozen=True, kw_only=True)
class HostFigure:
    """One operation's figures, with the names of the JSON lines; milliseconds of the slowest rank.

    Args:
        median_ms, p10_ms, p90_ms, best_ms: of the calls.
        link_bytes: that the fullest host sent over its link in a call, headers of packets included.
        bound_bytes: the least: one row for each token and foreign node, with metadata and places.
        bound_ms: their time at the link's rate.
        tcp_ms, tcp_best_ms: plain TCP for as many bytes, both directions at once.
        flat_ms: the same exchange by ``all_to_all_single`` on gloo, which sends a row to each rank.
        predicted_ms: by the cost model.
    """

    picks: str
    op: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    best_ms: float
    link_bytes: int
    bound_bytes: int
    bound_ms: float
    tcp_ms: float
    tcp_best_ms: float
    flat_ms: float
    predicted_ms: float


def host_figures(job: HostsJob, ranks: Sequence[Sequence[HostSample]]) -> list[HostFigure]:
    """One figure for each operation, from all ranks' samples."""
    return [_figure(job, of_ranks) for of_ranks in zip(*ranks, strict=True)]


def _figure(job: HostsJob, samples: Sequence[HostSample]) -> HostFigure:
    first = samples[0]
    p10, median, p90 = slowest([sample.ours_s for sample in samples]) * 1e3
    bound = max(sample.bound_bytes for sample in samples)
    return HostFigure(
        picks=first.picks,
        op=first.op,
        median_ms=float(median),
        p10_ms=float(p10),
        p90_ms=float(p90),
        best_ms=_best([sample.ours_s for sample in samples]) * 1e3,
        link_bytes=round(max(sample.num_bytes for sample in samples)),
        bound_bytes=bound,
        bound_ms=bound / (bits_per_s(job.config.rate) / 8) * 1e3,
        tcp_ms=float(slowest([sample.tcp_s for sample in samples])[1]) * 1e3,
        tcp_best_ms=_best([sample.tcp_s for sample in samples]) * 1e3,
        flat_ms=float(slowest([sample.flat_s for sample in samples])[1]) * 1e3,
        predicted_ms=predicted_s(cast("Op", first.op), job.config, job.loads[first.picks]) * 1e3,
    )


def _best(ranks: Sequence[Sequence[float]]) -> float:
    """The fastest call, by its last rank."""
    return float(min(max(of_call) for of_call in zip(*ranks, strict=True)))
