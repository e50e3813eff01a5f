"""What a rank was doing when: named spans of time, and which rows went where."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from crossdock.buffer import Buffer
from crossdock.connection import Connection
from crossdock.plan import Plan
from crossdock.received import Received
from crossdock.spec import Spec
from crossdock.wire import Quantized

_AT_A_TIME = 2
"""Steps in a row that a trace shows."""


class Span(NamedTuple):
    """Something one rank did. Seconds of ``time.perf_counter()``, which is one clock for all processes of a host."""

    name: str
    step: int
    start: float
    end: float
    waited_s: float
    """How much of it was waiting for peers."""


class Watch:
    """Collects the spans of one rank; a span may lie within another.

    Args:
        settle: returns when all that was begun is done. On a GPU ``torch.cuda.synchronize``: work is counted where it
            is begun, at the price of the overlap that a program without a watch would have.
    """

    def __init__(self, settle: Callable[[], object] = lambda: None) -> None:
        self.spans: list[Span] = []
        self.step = 0
        self._settle = settle

    def now(self) -> float:
        """When all that was begun is done."""
        self._settle()
        return time.perf_counter()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What runs in the block, under that name."""
        start = self.now()
        yield
        self.add(name, start)

    def add(self, name: str, start: float, waited_s: float = 0.0) -> None:
        """What began at ``start`` and has just ended."""
        self.spans.append(Span(name, self.step, start, self.now(), waited_s))


def steps_to_show(spans: Sequence[Sequence[Span]]) -> list[tuple[float, float]]:
    """When steps in a row began on the first of ranks and ended on the last: a trace of all steps is large.

    >>> steps_to_show([[Span("step", step, 2.0 * step, 2.0 * step + 1, 0.0) for step in range(100)]])
    [(0.0, 3.0), (100.0, 103.0), (196.0, 199.0)]
    """
    steps = [[span for span in of_rank if span.name == "step"] for of_rank in spans]
    num = len(steps[0])
    starts = sorted({0, num // 2, max(0, num - _AT_A_TIME)})
    ends = [min(start + _AT_A_TIME, num) - 1 for start in starts]
    return [
        (min(of_rank[start].start for of_rank in steps), max(of_rank[end].end for of_rank in steps))
        for start, end in zip(starts, ends, strict=True)
    ]


class WatchedBuffer(Buffer):
    """A buffer whose calls are spans of a watch, and which notes how many rows each new plan sends where."""

    def __init__(self, connection: Connection, spec: Spec, watch: Watch) -> None:
        super().__init__(connection, spec)
        self._watch = watch
        self._noted: list[Tensor] = []

    def dispatch(self, x: Tensor | Quantized, routing: Tensor | Plan, **options: Any) -> Received:
        with self._watched("dispatch"):
            recv = super().dispatch(x, routing, **options)
        if not isinstance(routing, Plan):
            self._noted.append(recv.plan.counts)
        return recv

    def combine(self, *args: Any, **options: Any) -> Any:
        with self._watched("combine"):
            return super().combine(*args, **options)

    def take_counts(self) -> list[Tensor]:
        """int64 [P, W] of each new plan since the last call: first the rows from each rank for each expert.

        For experts of all ranks, the same on all; over nodes, for those of this node.
        """
        noted, self._noted = self._noted, []
        return noted

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        before, start = self.stats.wait_s, self._watch.now()
        yield
        # A rank may wait for several peers at once, so their waits must not be added up; the longest is all but a
        # little of it, because one peer is the last.
        self._watch.add(name, start, float((self.stats.wait_s - before).max()))
