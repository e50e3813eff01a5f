"""A rank's measurement of each case: checks the result, eagerly and in a graph, then times it if it is right."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.cases import CACHED, OPENERS, STEP
from benchmarks.recipe import Case, Recipe, Turn
from crossdock.cli.bench.config import Job
from crossdock.cli.bench.measure import WrongRows
from crossdock.cli.world import Member

_CALLS, _WARM_UPS, _LEADS = 10, 2, 4
"""Calls per sample, back to back; untimed samples before the timed ones; replays of a graph before the timed one."""
_SLOW_S, _MOST_S, _FEWEST = 0.05, 5.0, 3
"""Seconds per call above which a sample is one call; seconds for a figure; samples that it takes at least."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The jobs of one library, in order."""

    peer: str
    jobs: list[Job]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Percentiles of the slowest rank (largest median), in microseconds."""

    median: float
    p10: float
    p90: float


@dataclass(kw_only=True)
class Row:
    """The figures of one operation.

    waits: whether host time includes a wait for the device or for peers.
    why: the reason why figures are missing.
    times_cached: a training step's time in bf16 dispatches on a cached plan.
    """

    op: str
    eager_us: Figure | None = None
    graph_us: Figure | None = None
    host_us: Figure | None = None
    waits: bool = False
    times_cached: float | None = None
    why: str = ""
    is_wrong: bool = False


def measure(member: Member, work: Work) -> None:
    """Reports (job number, row) of each case by ``member.tell``. A wrong result gives a row; other failures raise."""
    device = torch.device("cpu") if work.peer == "gloo" else member.device
    cached_us: dict[str, float] = {}
    for number, job in enumerate(work.jobs):
        layout, recipe = str(job.spec.layout), Recipe(member, job, device)
        with OPENERS[work.peer](recipe) as cases:
            for case in cases:
                row = _Bench(member, device, job.repeats).row(case)
                figure = row.graph_us or row.eager_us
                if figure and row.op == CACHED and job.spec.wire.dtype == torch.bfloat16:
                    cached_us[layout] = figure.median
                elif figure and row.op == STEP and layout in cached_us:
                    row.times_cached = figure.median / cached_us[layout]
                member.tell(number, row)


@dataclass
class _Bench:
    member: Member
    device: torch.device
    repeats: int

    def row(self, case: Case) -> Row:
        row, turn = Row(op=case.op, waits=case.waits), case.ready()
        if why := self._wrong(case, (case.checked or turn.run)()):
            return Row(op=case.op, why=why, is_wrong=True)
        if self.device.type == "cuda" and case.in_graph:
            if why := self._wrong_in_graph(case, row):
                return Row(op=case.op, why=f"in a graph: {why}", is_wrong=True)
            if not row.why:
                row.graph_us = self._graph(case.ready(), row)
        turn = case.ready()
        calls = self._settle(turn)
        row.eager_us = self._figure(lambda: _played(turn, calls, self._clock()))
        row.host_us = self._figure(lambda: self._host(turn))
        return row

    def _wrong_in_graph(self, case: Case, row: Row) -> str | None:
        turn = case.ready()
        issue = case.checked or turn.run
        graph, result = self._captured(lambda: [issue() for _ in range(2)][-1], row)
        if graph is None:
            return None
        graph.replay()
        return self._wrong(case, result)

    def _graph(self, turn: Turn, row: Row) -> Figure | None:
        """Time per call in a graph of ten calls: by events around the graph, or within it if calls alternate."""
        clock = _Events(external=True) if turn.alternates else _Clock()
        graph, seconds = self._captured(lambda: _played(turn, _CALLS, clock), row)
        if graph is None:
            return None

        def batch() -> Callable[[], float]:
            for _ in range(_LEADS):  # so that all hosts have launched the timed replay before it starts
                graph.replay()
            whole = _played(Turn(graph.replay), 1, _Events())
            return seconds if turn.alternates else lambda: whole() / _CALLS

        return self._figure(batch)

    def _captured(self, issue: Callable[[], Any], row: Row) -> tuple[torch.cuda.CUDAGraph | None, Any]:
        """A graph of ``issue`` and its result. If a rank cannot capture it: (None, None) on all, and ``row.why``."""
        graph, result, why = torch.cuda.CUDAGraph(), None, None
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                result = issue()
        except Exception as error:  # noqa: BLE001 - a library that cannot be captured may say so in any way
            why = f"no graph: {_line(error)}"
        row.why = next((told for told in self._all(why) if told), "")
        return (None, None) if row.why else (graph, result)

    def _host(self, turn: Turn) -> Callable[[], float]:
        """Host time of one call while no rank has queued work."""
        if turn.before is not None:
            turn.before()
        self._meet()
        began = time.perf_counter()
        result = turn.call()
        seconds = time.perf_counter() - began
        del result  # freed after the clock has been read
        if turn.after is not None:
            turn.after()
        return lambda: seconds

    def _settle(self, turn: Turn) -> int:
        """Calls per sample, from the time of one call; also limits ``repeats``. The same on all ranks."""
        turn.run()
        self._meet()
        began = time.perf_counter()
        turn.run()
        self._synchronize()
        seconds: float = max(self._all(time.perf_counter() - began))
        calls = 1 if seconds > _SLOW_S else _CALLS
        self.repeats = min(self.repeats, max(_FEWEST, int(_MOST_S / (seconds * calls))))
        return calls

    def _figure(self, batch: Callable[[], Callable[[], float]]) -> Figure:
        """The figure of batches that all ranks begin together.

        Args:
            batch: issues a batch and returns a function for its seconds, valid after synchronisation.
        """
        samples = []
        for _ in range(_WARM_UPS + self.repeats):
            self._meet()
            seconds = batch()
            self._synchronize()
            samples.append(seconds())
        slowest = max(self._all(samples[_WARM_UPS:]), key=np.median)
        p10, median, p90 = (float(value) for value in np.percentile(slowest, (10, 50, 90)) * 1e6)
        return Figure(median=median, p10=p10, p90=p90)

    def _wrong(self, case: Case, result: Any) -> str | None:
        """The error of the first rank whose result is wrong; None if all are right. Collective."""
        why = None
        try:
            case.check(result)
        except WrongRows as error:
            why = _line(error).partition(";")[0]
        return next((told for told in self._all(why) if told), None)

    def _all(self, mine: Any) -> list[Any]:
        """The values of all ranks, by rank. Collective."""
        told: list[Any] = [None] * self.member.num_ranks
        dist.all_gather_object(told, mine)
        return told

    def _meet(self) -> None:
        self._synchronize()
        self.member.line.wait()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _clock(self) -> _Clock:
        return _Events() if self.device.type == "cuda" else _Clock()


class _Clock:
    """Time stamps of the host."""

    def stamp(self) -> Any:
        return time.perf_counter()

    def between(self, first: Any, last: Any) -> float:
        """Seconds between two stamps that have passed."""
        return float(last - first)


class _Events(_Clock):
    """Time stamps of the GPU; external events become nodes of a captured graph."""

    def __init__(self, *, external: bool = False) -> None:
        self._external = external

    def stamp(self) -> Any:
        event = torch.cuda.Event(enable_timing=True, external=self._external)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1e3


def _played(turn: Turn, calls: int, clock: _Clock) -> Callable[[], float]:
    """Issues calls and returns a function for the seconds per call.

    Two stamps enclose all calls. A call that alternates with others has stamps of its own, and the time between two
    stamps with no call in between is subtracted.
    """
    if not turn.alternates:
        begin = clock.stamp()
        for _ in range(calls):
            turn.call()
        end = clock.stamp()
        return lambda: clock.between(begin, end) / calls
    spans = []
    for _ in range(calls):
        if turn.before is not None:
            turn.before()
        empty, begin = clock.stamp(), clock.stamp()
        turn.call()
        spans.append((empty, begin, clock.stamp()))
        if turn.after is not None:
            turn.after()
    return lambda: sum(clock.between(begin, end) - clock.between(empty, begin) for empty, begin, end in spans) / calls


def _line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
