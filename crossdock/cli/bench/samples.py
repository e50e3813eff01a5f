"""One rank's measurements, as sent to the process that computes the figures."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One operation's samples on one rank, in seconds per call.

    num_bytes, link_bytes: see ``Case``.
    copy_bytes: bytes to compare with the bandwidth of copies (``Limits.copy``), counted in the same way.
    write_bytes: bytes to compare with ``Limits.write``.
    host_s: seconds inside single eager calls with no work queued; empty on CPUs, where calls wait for peers.
    calls: each sample is the mean of this many calls back to back.
    num_sms: SMs of the operation; None on CPUs.
    baseline_s: the baseline's samples; empty without a baseline.
    """

    op: str
    wire: str
    num_bytes: int
    link_bytes: int
    copy_bytes: int
    ours_s: list[float]
    baseline_s: list[float]
    write_bytes: int = 0
    host_s: list[float] = field(default_factory=list)
    calls: int = 1
    num_sms: int | None = None


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Bytes that this rank moved while all others did the same, and seconds from the common start to its end."""

    num_bytes: int
    seconds: list[float]
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class OnGpu:
    """The GPU as a rank sees it."""

    visible_sms: int
    """SMs that the rank may use; under MPS possibly a part of the GPU's."""
    launch: str
    destinations: int
    """Destinations of each row in the measurement of ``Limits.write``: a token's average in a dispatch."""


@dataclass(frozen=True, kw_only=True)
class RankSamples:
    """All measurements of one rank. ``copies`` and the like hold one entry per way; the fastest is the limit."""

    samples: list[Sample]
    copies: list[Moved]
    writes: list[Moved] = field(default_factory=list)
    stores: list[Moved] = field(default_factory=list)
    loads: list[Moved] = field(default_factory=list)
    """Over the link to the next rank; empty where ranks share a GPU."""
    sweep: list[Sample] = field(default_factory=list)
    """Pairs of dispatch and combine, one per number of SMs."""
    trips_s: list[float] = field(default_factory=list)
    """Seconds of one-way trips of a word between all ranks; empty on CPUs."""
    gpu: OnGpu | None = None
