"""A starting line: all ranks of a host begin at one instant that they agreed on.

A barrier lets its last rank go first and wakes the others later, one after the other, and over gloo that takes
milliseconds: the first rank's call would be charged with waiting for the last. Here the ranks agree on an instant a
little later than the last arrival, wake up before it, and hold their core when it comes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from ctypes import Array, c_double

_LEAD_S = 1e-3
"""From the last arrival to the start: a rank that naps is awake by then, also when ranks share cores."""
_SPIN_S = 200e-6
"""A rank that yields its core this shortly before the start may not have it back in time."""
_NAP_S = 50e-6
"""A rank that is early sleeps, so that it takes no core from one that is still in its timed call."""

_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


def shared_moments(num_ranks: int, allocate: Callable[[type[c_double], int], Array[c_double]]) -> Array[c_double]:
    """What the ranks of a line share, in memory from ``allocate`` (a multiprocessing context's ``RawArray``)."""
    return allocate(c_double, 2 * num_ranks)


class StartingLine:
    """One rank's place on the line.

    Args:
        moments: ``shared_moments``: when each rank arrived, by turns in one half and in the other. A rank can arrive
            for turn n + 2 only after all have arrived for n + 1, and so have read turn n.
        rank: this rank.
    """

    def __init__(self, moments: Array[c_double], rank: int) -> None:
        self._moments = moments
        self._rank = rank
        self._num_ranks = len(moments) // 2
        self._turn = 0
        self._last_start = 0.0

    def wait(self) -> float:
        """Returns at the agreed start and gives it, in ``time.perf_counter()``'s seconds, the same on all ranks.

        That clock is one for all processes of a host. A moment is of this turn when it is later than the last start:
        nobody arrives before that, and the moments that lie there from two turns ago are earlier.
        """
        first = self._turn % 2 * self._num_ranks
        self._moments[first + self._rank] = time.perf_counter()
        while min(arrived := self._moments[first : first + self._num_ranks]) <= self._last_start:
            time.sleep(_NAP_S)
        self._turn += 1
        self._last_start = max(arrived) + _LEAD_S
        while (left_s := self._last_start - time.perf_counter()) > 0:
            if left_s > _SPIN_S:
                _yield()
        return self._last_start
