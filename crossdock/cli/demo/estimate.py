"""How long the demo will still take: from what its stages take on one machine, then from what they took here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

READ, START, TRAIN = "reading Python's source", "starting the ranks", "training"
HOLD_OUT, WRITE = "reading held-out text", "writing text"
REPEAT, WRITE_AGAIN = "repeating the first steps in one process", "writing the same text in one process"
STAGES = (READ, START, TRAIN, HOLD_OUT, WRITE, REPEAT, WRITE_AGAIN)
"""In the order in which they come."""

_DOUBT_S = 5.0
"""What a stage of a moment says is little: the factor is as if so much had gone as expected before."""


def expected(*, num_ranks: int, num_steps: int, num_replayed: int, num_cores: int) -> dict[str, float]:
    """Seconds of each stage, as two cores of an EPYC took them for 4 ranks, scaled by cores and ranks.

    Ranks that have a core each run beside each other; of those that share one, the tokens are the same, and waking each
    other up takes more.

    >>> few, many = (expected(num_ranks=4, num_steps=n, num_replayed=10, num_cores=2) for n in (10, 220))
    >>> few[TRAIN] < many[TRAIN], few[START] == many[START]
    (True, True)
    """
    at_once = min(num_ranks, num_cores)
    crowd = num_ranks / at_once
    step_s = 0.35 / at_once + 0.035 * crowd
    return {
        READ: 0.5,
        START: 2.5 + 1.5 * crowd,
        TRAIN: num_steps * step_s,
        HOLD_OUT: 4 * step_s,
        WRITE: 2.0 + 3.0 * crowd,
        REPEAT: num_replayed * 0.2,
        WRITE_AGAIN: 3.0,
    }


class Estimate:
    """Seconds that are left, at any moment, also while a stage says nothing.

    What is behind tells how much slower or faster this machine is than expected, and what is ahead is scaled by that.
    Of a stage that says how far it is, the rest goes on at its own pace.

    Args:
        expected_s: of each stage, in their order.
        clock: seconds; anything that only grows.

    >>> now = 0.0
    >>> estimate = Estimate({"a": 10.0, "b": 20.0}, clock=lambda: now)
    >>> estimate.begin("a")
    >>> estimate.left_s()
    30.0
    >>> now = 25.0  # twice as long as expected, and doubt of 5
    >>> estimate.begin("b")
    >>> estimate.left_s()
    40.0
    >>> now = 30.0
    >>> estimate.reach(0.5)
    >>> estimate.left_s()
    5.0
    """

    def __init__(self, expected_s: Mapping[str, float], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._expected_s = dict(expected_s)
        self._clock = clock
        self._ahead = list(expected_s)
        self._behind_s = 0.0
        self._expected_behind_s = 0.0
        self._stage: str | None = None
        self._began = self._reached_at = clock()
        self._fraction = 0.0

    @property
    def stage(self) -> str:
        """That which is under way; the first before anything has begun."""
        return self._stage or self._ahead[0]

    def begin(self, stage: str) -> None:
        """The stage has begun, and so those before it are over. Of one that is under way, nothing changes."""
        if stage == self._stage:
            return
        now = self._clock()
        if self._stage is not None:
            self._behind_s += now - self._began
            self._expected_behind_s += self._expected_s[self._stage]
        while stage in self._ahead:
            self._ahead.pop(0)
        self._stage, self._began, self._reached_at, self._fraction = stage, now, now, 0.0

    def reach(self, fraction: float) -> None:
        """So much of the stage, from 0 to 1, is done."""
        self._fraction, self._reached_at = fraction, self._clock()

    def left_s(self) -> float:
        """Until the end of the last stage; never negative."""
        now, scale = self._clock(), self._scale()
        ahead_s = sum(self._expected_s[stage] for stage in self._ahead) * scale
        if self._stage is None:
            return ahead_s
        if self._fraction > 0:
            whole_s = (self._reached_at - self._began) / self._fraction
        else:
            whole_s = self._expected_s[self._stage] * scale
        return ahead_s + max(0.0, whole_s - (now - self._began))

    def share(self) -> float:
        """Of all the time, what has passed."""
        passed_s = self._behind_s + (self._clock() - self._began if self._stage is not None else 0.0)
        return passed_s / max(passed_s + self.left_s(), 1e-9)

    def _scale(self) -> float:
        return (self._behind_s + _DOUBT_S) / (self._expected_behind_s + _DOUBT_S)
