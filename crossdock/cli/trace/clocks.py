"""Ranks' clocks, made one: those of a host are the same, others are compared by the exchanges that made the buffer.

Nobody leaves an exchange before all have come. So if rank a left one at 5 by its clock, and rank b came to it at 7 by
its own, b's clock is ahead of a's by 2 at least; and the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def shifts(clocks: Sequence[Clock]) -> list[int]:
    """What to add to the times of each clock, so that all are on the first one's.

    >>> a = Clock("a", "x", "1", 0, 0, [(0, 5), (6, 9)])
    >>> b = Clock("b", "y", "1", 0, 0, [(1002, 1006), (1006, 1009)])  # 1000 ahead
    >>> shifts([a, a._replace(process="c"), b])
    [0, 0, -1000]
    """
    known: dict[int, int] = {0: 0}
    while len(known) < len(clocks):
        found = {
            i: shift for i in range(len(clocks)) if i not in known and (shift := _by(i, clocks, known)) is not None
        }
        if not found:
            i = next(i for i in range(len(clocks)) if i not in known)
            found = {i: (clocks[0].t - clocks[0].unix) - (clocks[i].t - clocks[i].unix)}
        known |= found
    return [known[i] for i in range(len(clocks))]


def _by(i: int, clocks: Sequence[Clock], known: dict[int, int]) -> int | None:
    """The shift by what is known of another part of its process, of its buffer or of its machine, in this order."""
    clock = clocks[i]
    for j, shift in known.items():
        if clocks[j].process == clock.process:
            return shift
    for j, shift in known.items():
        if clocks[j].buffer == clock.buffer:
            least, most = _bounds(clocks[j], clock)
            if clocks[j].boot == clock.boot and least <= 0 <= most:
                return shift
            return shift + (least + most) // 2
    for j, shift in known.items():
        if clocks[j].boot == clock.boot:
            return shift
    return None


def _bounds(a: Clock, b: Clock) -> tuple[int, int]:
    """The least and the most that must be added to b's times to have a's."""
    pairs = list(zip(a.met, b.met, strict=False))
    if not pairs:
        return 0, 0
    least = max(came_a - left_b for (came_a, _), (_, left_b) in pairs)
    most = min(left_a - came_b for (_, left_a), (came_b, _) in pairs)
    return least, most
