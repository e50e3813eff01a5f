"""Ranks' clocks, made one: those of a host are the same, others are compared by what the ranks have told each other.

Nobody sees a word before it was posted. So if rank a has posted one at 5 by its clock, and rank b has seen it at 7 by
its own, b's clock is ahead of a's by 2 at most; and the other way round. The same holds of the exchanges that made the
buffer, which nobody leaves before all have come. Clocks are taken to run equally fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Clock(NamedTuple):
    """What is known of the clock of a part. Nanoseconds."""

    process: str
    boot: str
    """Processes of one start of one machine have one clock, unless the system gives some another."""
    buffer: str
    t: int
    unix: int
    """The same moment by the clock on the wall."""
    met: Sequence[Sequence[int]]
    """When its rank came to each exchange of ranks, and when it left."""
    rank: int = 0
    """In the buffer's group."""
    calls: Mapping[tuple[int, ...], tuple[int, Mapping[int, int]]] = {}
    """Of each call, when its rank posted its word, 0 if that is unknown, and when it saw that of each peer."""


UNKNOWN = 1 << 62


class Fit(NamedTuple):
    """What to add to a clock's times, and how far that may be from what is true; UNKNOWN: nobody knows."""

    shift: int
    within: int


def shifts(clocks: Sequence[Clock]) -> list[int]:
    """What to add to the times of each clock, so that all are on the first one's.

    >>> a = Clock("a", "x", "1", 0, 0, [(0, 5), (6, 9)])
    >>> b = Clock("b", "y", "1", 0, 0, [(1002, 1006), (1006, 1009)])  # 1000 ahead
    >>> shifts([a, a._replace(process="c"), b])
    [0, 0, -1000]
    """
    return [fit.shift for fit in fits(clocks)]


def fits(clocks: Sequence[Clock]) -> list[Fit]:
    """The same, with bounds. Each clock is compared with that whose own fit leaves the least in doubt."""
    known: dict[int, Fit] = {0: Fit(0, 0)}
    best: dict[int, Fit] = {}
    newest = 0
    while len(known) < len(clocks):
        for i in range(len(clocks)):
            if i in known or (step := _step(clocks[newest], clocks[i])) is None:
                continue
            fit = Fit(known[newest].shift + step.shift, known[newest].within + step.within)
            if i not in best or fit.within < best[i].within:
                best[i] = fit
        if not best:  # nothing but the clock on the wall
            i = next(i for i in range(len(clocks)) if i not in known)
            best[i] = Fit((clocks[0].t - clocks[0].unix) - (clocks[i].t - clocks[i].unix), UNKNOWN)
        newest = min(best, key=lambda i: best[i].within)
        known[newest] = best.pop(newest)
    return [known[i] for i in range(len(clocks))]


def _step(a: Clock, b: Clock) -> Fit | None:
    """What to add to b's times to have a's; None where nothing is known of the two."""
    if a.process == b.process:
        return Fit(0, 0)
    if a.buffer == b.buffer:
        least, most = _bounds(a, b)
        if a.boot == b.boot and least <= 0 <= most:
            return Fit(0, 0)
        if most < UNKNOWN:
            return Fit((least + most) // 2, abs(most - least) // 2)
    return Fit(0, 0) if a.boot == b.boot else None


def _bounds(a: Clock, b: Clock) -> tuple[int, int]:
    """The least and the most that must be added to b's times to have a's."""
    least = [came_a - left_b for (came_a, _), (_, left_b) in zip(a.met, b.met, strict=False)]
    most = [left_a - came_b for (_, left_a), (came_b, _) in zip(a.met, b.met, strict=False)]
    for call in a.calls.keys() & b.calls.keys():
        (posted_a, seen_a), (posted_b, seen_b) = a.calls[call], b.calls[call]
        if posted_a and a.rank in seen_b:
            least.append(posted_a - seen_b[a.rank])
        if posted_b and b.rank in seen_a:
            most.append(seen_a[b.rank] - posted_b)
    return max(least, default=-UNKNOWN), min(most, default=UNKNOWN)
