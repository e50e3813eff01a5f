"""What one rank has measured, as it travels to the process that makes figures of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One operation on one rank; seconds per call, as this rank sees it.

    num_bytes, link_bytes: see ``Case``.
    copy_bytes: bytes to hold against the bandwidth of copies, counted as that is.
    write_bytes: bytes to hold against the bandwidth of rows that are read once and written to several places.
    calls: each figure is the mean of so many calls in a row.
    num_sms: those that the operation is given; None on CPUs.
    baseline_s: empty where there is none.
    """

    op: str
    wire: str
    num_bytes: int
    link_bytes: int
    copy_bytes: int
    ours_s: list[float]
    baseline_s: list[float]
    write_bytes: int = 0
    calls: int = 1
    num_sms: int | None = None


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Bytes that a rank moves while all others do the same, and seconds from the start to this rank's end."""

    num_bytes: int
    seconds: list[float]
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class OnGpu:
    """What a rank saw of its GPU."""

    visible_sms: int
    """Under MPS a part of the GPU's."""
    launch: str
    destinations: int
    """That each row was written to for the write limit: those of a token in a dispatch, on average."""


@dataclass(frozen=True, kw_only=True)
class RankSamples:
    """What one rank measured. Of several ways to copy or to write, the fastest is the limit."""

    samples: list[Sample]
    copies: list[Moved]
    writes: list[Moved] = field(default_factory=list)
    sweep: list[Sample] = field(default_factory=list)
    """Dispatches and combines with other numbers of SMs, in pairs."""
    trips_s: list[float] = field(default_factory=list)
    """One-way trips of a word between all ranks; none on CPUs."""
    gpu: OnGpu | None = None
