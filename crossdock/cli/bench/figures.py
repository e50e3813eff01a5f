"""Reported figures from the ranks' samples: the slowest rank's median, beside the limit of the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crossdock.cli.bench.samples import Moved, RankSamples, Sample


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One operation's figures, with the names of the JSON lines.

    median_us, p10_us, p90_us: percentiles over the samples of the slowest rank (largest median), in microseconds per
        call; a sample is the mean of ``calls`` calls.
    bytes: payload that this rank receives (dispatch) or sends (combine): rows and scales, including rows to itself.
    link_bytes: the part of ``bytes`` that comes from, or goes to, other ranks.
    limit_us: on CPUs, the time of all ranks' rows at the copy bandwidth of this run, each row read once and written
        once (combine: each returned row read once, each result written once). On GPUs, see ``Limits``: memory or link,
        whichever takes longer.
    is_link: whether that is the link's time.
    floor_us: ``limit_us`` plus two one-way trips of a word, measured in the same run; None on CPUs.
    num_sms: SMs of each rank's operation; None on CPUs.
    host_us: median time inside one eager call with no work queued, of the slowest rank's; None on CPUs.
    baseline_us: median of the same exchange by ``all_to_all_single`` on its own slowest rank; None without a baseline.
    """

    op: str
    wire: str
    median_us: float
    p10_us: float
    p90_us: float
    calls: int
    bytes: int
    link_bytes: int
    limit_us: float
    floor_us: float | None
    num_sms: int | None
    baseline_us: float | None
    is_link: bool = False
    host_us: float | None = None

    @property
    def gigabytes_per_s(self) -> float:
        """The slowest rank's payload over its median, in GB/s."""
        return self.bytes / self.median_us / 1e3

    @property
    def of_limit(self) -> float:
        """``limit_us`` / ``median_us``; 1 at the limit."""
        return self.limit_us / self.median_us

    @property
    def speedup(self) -> float | None:
        """``baseline_us`` / ``median_us``; None without a baseline."""
        return None if self.baseline_us is None else self.baseline_us / self.median_us


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bandwidths in bytes per second that all ranks reach together in this run; the fastest way to move each.

    copy: bandwidth of copies; the limit of combine, and on CPUs of dispatch. A copied byte counts once on CPUs, twice
        on GPUs (read and written).
    write: bandwidth of rows read once and written to several destinations, in bytes written; the limit of dispatch on
        GPUs. None on CPUs.
    trip_s: seconds of a one-way trip of a word between all ranks, median of the slowest rank; None on CPUs.
    store, load: of each rank alone, the bandwidth of copies to and from the next rank's memory while all ranks do the
        same; None where ranks share a GPU.
    """

    copy: float
    write: float | None
    trip_s: float | None = None
    store: float | None = None
    load: float | None = None

    @property
    def link(self) -> float | None:
        """Bandwidth of a rank's link in each direction: that of stores or of loads, whichever is more."""
        return None if self.store is None or self.load is None else max(self.store, self.load)


def limits_of(ranks: Sequence[RankSamples]) -> Limits:
    """The limits from all ranks' samples: bytes of all ranks over the time of the last one, median over repeats.

    >>> both = [Moved(num_bytes=4, seconds=[1.0, 2.0, 3.0]), Moved(num_bytes=4, seconds=[4.0, 4.0, 4.0])]
    >>> limits_of([RankSamples(samples=[], copies=[moved]) for moved in both])
    Limits(copy=2.0, write=None, trip_s=None, store=None, load=None)
    """
    writes, trips = [rank.writes for rank in ranks], [rank.trips_s for rank in ranks]
    stores, loads = [rank.stores for rank in ranks], [rank.loads for rank in ranks]
    return Limits(
        copy=_fastest([rank.copies for rank in ranks]),
        write=_fastest(writes) if writes[0] else None,
        trip_s=max(float(np.median(trip)) for trip in trips) if trips[0] else None,
        store=_fastest(stores) / len(ranks) if stores[0] else None,
        load=_fastest(loads) / len(ranks) if loads[0] else None,
    )


def figures(samples: Sequence[Sequence[Sample]], limit: Limits) -> list[Figure]:
    """One figure per operation, from the samples of all ranks.

    >>> sample = Sample(
    ...     op="dispatch",
    ...     wire="bf16",
    ...     num_bytes=4000,
    ...     link_bytes=2000,
    ...     copy_bytes=4000,
    ...     ours_s=[1e-6, 2e-6, 3e-6],
    ...     baseline_s=[8e-6, 8e-6, 9e-6],
    ... )
    >>> (figure,) = figures([[sample]], Limits(copy=4e9, write=None))
    >>> round(figure.median_us, 6), round(figure.limit_us, 6), round(figure.speedup, 6)
    (2.0, 1.0, 4.0)
    """
    return [_figure(of_ranks, limit) for of_ranks in zip(*samples, strict=True)]


def _fastest(ranks: Sequence[Sequence[Moved]]) -> float:
    return max(_bandwidth(way) for way in zip(*ranks, strict=True))


def _bandwidth(ranks: Sequence[Moved]) -> float:
    until_last = np.max([moved.seconds for moved in ranks], axis=0)
    return sum(moved.num_bytes for moved in ranks) / float(np.median(until_last))


def _figure(samples: Sequence[Sample], limit: Limits) -> Figure:
    slowest = max(samples, key=lambda sample: float(np.median(sample.ours_s)))
    p10, median, p90 = np.percentile(slowest.ours_s, (10, 50, 90)) * 1e6
    limit_s = sum(sample.copy_bytes for sample in samples) / limit.copy
    if limit.write is not None:
        limit_s += sum(sample.write_bytes for sample in samples) / limit.write
    link_s = max(sample.link_bytes for sample in samples) / limit.link if limit.link else 0.0
    is_link, limit_s = link_s > limit_s, max(link_s, limit_s)
    has_baseline = all(sample.baseline_s for sample in samples)
    return Figure(
        op=slowest.op,
        wire=slowest.wire,
        median_us=float(median),
        p10_us=float(p10),
        p90_us=float(p90),
        calls=slowest.calls,
        bytes=slowest.num_bytes,
        link_bytes=slowest.link_bytes,
        limit_us=limit_s * 1e6,
        floor_us=None if limit.trip_s is None else (limit_s + 2 * limit.trip_s) * 1e6,
        num_sms=slowest.num_sms,
        baseline_us=max(float(np.median(s.baseline_s)) for s in samples) * 1e6 if has_baseline else None,
        is_link=is_link,
        host_us=max(float(np.median(s.host_s)) for s in samples) * 1e6 if all(s.host_s for s in samples) else None,
    )
