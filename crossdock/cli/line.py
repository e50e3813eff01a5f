"""A common start for timed calls: all ranks of a host begin at one agreed instant.

A barrier releases its last rank first and wakes the others one by one, over gloo within milliseconds: the time of the
first rank's call would include waiting for the last rank. Here the ranks agree on an instant shortly after the last
arrival, wake up before it, and are running on their core when it comes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from ctypes import Array, c_double

_LEAD_S = 1e-3
"""Seconds from the last arrival to the start: enough for a sleeping rank to wake, also when ranks share cores."""
_SPIN_S = 200e-6
"""Seconds before the start in which a rank keeps its core: one that yields may not get it back in time."""
_NAP_S = 50e-6
"""Seconds that an early rank sleeps between looks, so that it takes no core from a rank in its timed call."""

_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


def shared_moments(num_ranks: int, allocate: Callable[[type[c_double], int], Array[c_double]]) -> Array[c_double]:
    """The memory that the ranks of a ``StartingLine`` share: 2 * ``num_ranks`` doubles.

    Args:
        allocate: allocates shared memory, such as a multiprocessing context's ``RawArray``.
    """
    return allocate(c_double, 2 * num_ranks)


class StartingLine:
    """One rank's side of the common start.

    Args:
        moments: ``shared_moments``: the time of each rank's arrival; successive turns use the two halves alternately.
            A rank can arrive for turn n + 2 only after all ranks have arrived for n + 1 and thus have read turn n.
        rank: this rank.
    """

    def __init__(self, moments: Array[c_double], rank: int) -> None:
        self._moments = moments
        self._rank = rank
        self._num_ranks = len(moments) // 2
        self._turn = 0
        self._last_start = 0.0

    def wait(self) -> float:
        """Returns at the agreed start, in seconds of ``time.perf_counter()``; the same on all ranks. Collective.

        All processes of a host share that clock. An arrival belongs to this turn if it is later than the last start: no
        rank arrives before that start, and the entries of two turns ago are earlier.
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
