"""From what the ranks measured to what is reported: the slowest rank's median, and the limit beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crossdock.cli.bench.measure import RankSamples, Sample


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One operation's result; its fields are those of a JSON line.

    median_us, p10_us, p90_us: of the rank whose median is largest, each call as that rank sees it.
    bytes: payload that this rank receives (dispatch) or sends (combine): rows and scales, its own included.
    link_bytes: the part of it that comes from, or goes to, other ranks.
    limit_us: all ranks' rows, each read once and written once (combine: each returned row read once, each result
        written once), at the copy bandwidth of this run.
    baseline_us: the same exchange by ``all_to_all_single`` on gloo, the median of its own slowest rank.
    """

    op: str
    wire: str
    median_us: float
    p10_us: float
    p90_us: float
    bytes: int
    link_bytes: int
    limit_us: float
    baseline_us: float

    @property
    def gigabytes_per_s(self) -> float:
        """Payload of the slowest rank over its median."""
        return self.bytes / self.median_us / 1e3

    @property
    def of_limit(self) -> float:
        """1 when the operation is as fast as a copy."""
        return self.limit_us / self.median_us

    @property
    def speedup(self) -> float:
        """How many times faster than the baseline."""
        return self.baseline_us / self.median_us


def copy_bandwidth(ranks: Sequence[RankSamples]) -> float:
    """Bytes per second that all ranks together copy, each byte counted once, from start to the last rank's end."""
    until_last = np.max([rank.copy_s for rank in ranks], axis=0)
    return sum(rank.copied_bytes for rank in ranks) / float(np.median(until_last))


def figures(ranks: Sequence[RankSamples]) -> list[Figure]:
    """One figure per operation, from all ranks' samples.

    >>> sample = Sample(
    ...     op="dispatch",
    ...     wire="bf16",
    ...     num_bytes=4000,
    ...     link_bytes=2000,
    ...     copy_bytes=4000,
    ...     ours_s=[1e-6, 2e-6, 3e-6],
    ...     baseline_s=[8e-6, 8e-6, 9e-6],
    ... )
    >>> (figure,) = figures([RankSamples(samples=[sample], copied_bytes=4000, copy_s=[1e-6])])
    >>> round(figure.median_us, 6), round(figure.limit_us, 6), round(figure.speedup, 6)
    (2.0, 1.0, 4.0)
    """
    bandwidth = copy_bandwidth(ranks)
    return [_figure(samples, bandwidth) for samples in zip(*(rank.samples for rank in ranks), strict=True)]


def _figure(samples: Sequence[Sample], bandwidth: float) -> Figure:
    slowest = max(samples, key=lambda sample: float(np.median(sample.ours_s)))
    p10, median, p90 = np.percentile(slowest.ours_s, (10, 50, 90)) * 1e6
    return Figure(
        op=slowest.op,
        wire=slowest.wire,
        median_us=float(median),
        p10_us=float(p10),
        p90_us=float(p90),
        bytes=slowest.num_bytes,
        link_bytes=slowest.link_bytes,
        limit_us=sum(sample.copy_bytes for sample in samples) / bandwidth * 1e6,
        baseline_us=max(float(np.median(sample.baseline_s)) for sample in samples) * 1e6,
    )
