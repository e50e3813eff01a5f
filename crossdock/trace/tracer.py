"""The parts of a buffer that is traced: a turn, a consent and a queue that write down what they do."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from crossdock.backends.base import Backend, Counters, Outcome, RowTimes
from crossdock.backends.nodes.consent import NodesConsent
from crossdock.connect import Connected
from crossdock.consent import Consent, Missing, Steps, Waiting, Word
from crossdock.errors import ConfigError
from crossdock.pending import CallKind, CallQueue, Owner, Pending
from crossdock.spec import Spec
from crossdock.trace.calls import TracedCall, name_of, told
from crossdock.trace.part import Part, StampedGroup, now, open_problem
from crossdock.transport.base import Group, ProcessGroup
from crossdock.transport.nodes import NodesTransport
from crossdock.turn import Turn
from crossdock.version import __version__

Result = TypeVar("Result")
_VERBS = {"__init__": "Buffer"}
"""What a method is called in a trace, where not by its name."""


class Tracer:
    """Makes a connection's parts ones that write down what they do.

    Args:
        folder: for the file of this rank's part.
        members: the ranks that meet.
    """

    def __init__(self, folder: str | os.PathLike[str], members: Group) -> None:
        self.members = StampedGroup(members)
        """To be met through, so that clocks are compared."""
        self._folder = folder
        self._ranks = list(range(members.size))
        self._launched_by = 0
        if isinstance(members, ProcessGroup):
            self._ranks = dist.get_process_group_ranks(members.process_group)
            if dist.get_world_size() > members.size:  # what says that groups without a common rank are of one run
                self._launched_by = os.getppid()

    def check(self) -> None:
        """Makes the folder. Raises ConfigError where that cannot be done, or files of it not be written."""
        if (problem := open_problem(self._folder)) is not None:
            raise ConfigError(problem)

    def queue(self, parts: Connected, *, depth: int, number: int, timeout_s: float) -> TracedQueue:
        """The queue of the connection's calls; its consent is watched from here on."""
        header = {
            "crossdock": __version__,
            "buffer": f"{number:016x}",
            "ranks": self._ranks,
            "launched_by": self._launched_by,
            "met": self.members.met,
        }
        if isinstance(parts.transport, NodesTransport):
            header["node_size"] = parts.transport.node_size
        part = Part(self._folder, self.members.rank, header)
        return TracedQueue(part, parts, depth=depth, timeout_s=timeout_s)


class TracedTurn(Turn):
    """A turn that writes down which method held it, from when to when, and what left it."""

    def __init__(self, left_by: Callable[[BaseException], None], part: Part) -> None:
        super().__init__(left_by)
        self.call: list[int] | None = None
        """The call that was begun or waited for in it."""
        self.is_last = False
        self._part = part
        self._verb, self._began = "", 0

    def __enter__(self) -> TracedTurn:
        super().__enter__()
        if self._depth == 1:
            name = sys._getframe(1).f_code.co_name  # noqa: SLF001 - documented, in spite of its name
            self._verb, self._began, self.call = _VERBS.get(name, name), now(), None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._depth == 1:
                self._leave(error)
        finally:
            super().__exit__(kind, error, traceback)

    def _leave(self, error: BaseException | None) -> None:
        line: dict[str, Any] = {"is": "verb", "name": self._verb, "t": [self._began, now()]}
        if self.call is not None:
            line["call"] = self.call
        if error is not None:
            line["error"] = told(error)
        self._part.add(line)
        self._part.flush()
        if self.is_last:
            self._part.close()


class Notes:
    """What queue and consent tell each other of the calls that they write down."""

    def __init__(self) -> None:
        self.driven: TracedCall | None = None
        """The call whose steps are being taken, or were last."""
        self.posted: dict[int, int] = {}
        """When words were given of calls that have not been started yet."""
        self.times: RowTimes | None = None
        """When the call has moved rows, as its backend says; None where the device moves them."""


class TracedConsent(Consent):
    """A consent of hosts that notes when words are given and seen, and when rows are in place."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.notes = Notes()

    def post(self, sequence: int, word: Word) -> None:
        """See Consent."""
        t = now()  # before it is posted: clocks are compared by it
        super().post(sequence, word)
        call = self.notes.driven
        if call is not None and call.sequence == sequence:
            call.posted = t
        else:
            self.notes.posted[sequence] = t

    def words(self, sequence: int, own: Word) -> Steps[Sequence[Word]]:
        """See Consent."""
        steps, call, left = super().words(sequence, own), self._call, set(self._peers)
        if self.notes.times is not None:  # before words are seen nothing of a call has moved
            self.notes.times.begin()
        while True:
            try:
                missing = next(steps)
            except StopIteration as stop:
                call.words |= dict.fromkeys(left, now())
                call.looks(None)
                words: Sequence[Word] = stop.value
                return words
            if len(missing.peers) < len(left):
                call.words |= dict.fromkeys(left.difference(missing.peers), now())
                left.intersection_update(missing.peers)
            yield missing

    def signal(self, sequence: int) -> None:
        """See Consent."""
        super().signal(sequence)
        self._call.signalled = now()

    def arrivals(self, sequence: int, words: Sequence[Word], *, from_all: bool) -> Waiting:
        """See Consent."""
        call = self._call
        yield from super().arrivals(sequence, words, from_all=from_all)
        call.looks(None)
        call.arrived = now()

    @property
    def _call(self) -> TracedCall:
        assert self.notes.driven is not None, "steps that no queue takes"
        return self.notes.driven


class TracedNodesConsent(TracedConsent, NodesConsent):
    """The same among several nodes."""


class TracedQueue(CallQueue):
    """A queue that writes down what becomes of calls, and whom they wait for."""

    def __init__(self, part: Part, parts: Connected, *, depth: int, timeout_s: float) -> None:
        super().__init__(parts.consent, parts.transport, depth=depth, timeout_s=timeout_s)
        self.turn = self._traced_turn = TracedTurn(self.left_by, part)
        self._part = part
        self._times = RowTimes(parts.transport.num_ranks)
        self._notes = parts.consent.notes if isinstance(parts.consent, TracedConsent) else Notes()

    def lay(self, spec: Spec, backend: Backend) -> None:
        """A Spec has been laid over the connection."""
        if backend.time_rows(self._times):
            self._notes.times = self._times
        self._part.add({"is": "spec", "t": now(), "spec": str(spec), "num_experts": spec.num_experts})

    def end(self, loads: Sequence[tuple[int, Tensor]], wait_s: Sequence[float]) -> None:
        """The connection is being closed; what it has counted, on CUDA all that is known of waits and loads.

        Args:
            loads: of each Spec, its number of experts and the picks of each local one.
        """
        counted = {"loads": [[num, picks.tolist()] for num, picks in loads], "wait_s": list(wait_s)}
        self._part.add({"is": "end", "t": now(), "unix": time.time_ns(), **counted})
        self._traced_turn.is_last = True

    def start(
        self,
        kind: CallKind,
        sequence: int,
        steps: Steps[Outcome[Any]],
        finish: Callable[[Any], Result] | None = None,
        held: tuple[object, ...] = (),
        owner: Owner | None = None,
        counters: Counters | None = None,
    ) -> Pending[Result]:
        """See CallQueue."""
        call = TracedCall(self._part, kind, sequence, self._notes.posted.pop(sequence, 0), held)
        self._traced_turn.call = call.name
        return super().start(kind, sequence, self._watched(call, steps, owner), finish, held, owner, counters)

    def forget(self, pending: Pending[Any]) -> None:
        """See CallQueue."""
        self._traced_turn.call = name_of(pending.sequence)
        super().forget(pending)

    def _watched(self, call: TracedCall, steps: Steps[Outcome[Any]], owner: Owner | None) -> Steps[Outcome[Any]]:
        """The same steps, of which it is written down what they miss."""
        try:
            while True:
                self._notes.driven = call
                try:
                    missing = next(steps)
                except StopIteration as stop:
                    outcome: Outcome[Any] = stop.value
                    call.done(outcome, None if owner is None else owner.spec, self._notes.times)
                    return outcome
                call.looks(missing)
                yield missing
        except BaseException as error:
            call.void(error)
            raise
        finally:
            steps.close()

    def _wait(self, call: Pending[Any], missing: Missing, patience: Any) -> None:
        if self._notes.driven is not None:
            self._notes.driven.waits(missing)
        super()._wait(call, missing, patience)

    def _fail(self, error: Exception | str) -> None:
        why = told(error) if isinstance(error, Exception) else {"text": error}
        self._part.add({"is": "failed", "t": now(), "error": why})
        self._part.flush()
        self._notes.posted.clear()
        super()._fail(error)
