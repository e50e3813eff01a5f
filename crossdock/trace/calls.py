"""What a trace tells of one call, gathered while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crossdock.backends.base import Arrived, Batch, Outcome, RowTimes
from crossdock.backends.nodes.plan import NodePlan
from crossdock.consent import CALL_MASK, EPOCH_SHIFT, Missing
from crossdock.pending import CallKind
from crossdock.plan import Hop, HostPlan
from crossdock.spec import Spec
from crossdock.trace.part import Part, now

_SAY_NS = 1_000_000_000
"""A rank that waits says so as often."""


class TracedCall:
    """One call. Times are ``time.perf_counter_ns``, 0 for what has not been.

    Args:
        part: where its lines go.
        posted: when its word was.
        held: its inputs.
    """

    def __init__(self, part: Part, kind: CallKind, sequence: int, posted: int, held: tuple[object, ...]) -> None:
        self._part = part
        self.kind, self.sequence = str(kind), sequence
        self.name = name_of(sequence)
        self.began, self.posted = now(), posted
        self.words: dict[int, int] = {}
        """When each peer's word was seen."""
        self.signalled = self.arrived = 0
        """When rows of this rank were in place at peers, and theirs here."""
        self._plan = next((value for value in held if isinstance(value, (HostPlan, NodePlan))), None)
        self._is_wide = any(value.unquantized for value in held if isinstance(value, Batch))
        self._wait: _Wait | None = None

        part.add({"is": "start", "call": self.name, "kind": self.kind, "t": self.began, "posted": posted})

    def waits(self, missing: Missing) -> None:
        """The host is about to wait."""
        t = now()
        wait = self._wait
        if wait is None:
            self._wait = wait = _Wait(missing, t)
        elif t < wait.said + _SAY_NS:
            self._part.flush()
            return
        else:
            wait.said = t
            self._part.add({"is": "waiting", **wait.line(self.name), "t": [wait.began, t]})
        self._part.flush()

    def looks(self, missing: Missing | None) -> None:
        """The host has looked again: what is still missing, None when nothing of what it waited for is."""
        wait = self._wait
        if wait is None:
            return
        if missing is not None and missing.what == wait.what and len(missing.peers) == len(wait.left):
            return
        t = now()
        if missing is not None and missing.what == wait.what:
            wait.come([peer for peer in wait.left if peer not in missing.peers], t)
            return
        wait.come(wait.left, t)
        self._end_wait(t)

    def done(self, outcome: Outcome[Any], spec: Spec | None, times: RowTimes | None) -> None:
        """It is at its end; ``times`` are those of its rows."""
        self.looks(None)
        line = self._line(now())
        if times is not None:
            of_rows = {"move_ns": times.move_ns if any(times.move_ns) else (), "put": times.put, "landed": times.landed}
            line |= {name: what for name, what in of_rows.items() if what}
        result, is_dispatch = outcome[0], isinstance(outcome[0], Arrived)
        plan, self._plan = result.plan if isinstance(result, Arrived) else self._plan, None
        if isinstance(plan, (HostPlan, NodePlan)) and spec is not None:
            line |= self._rows(plan, spec, is_dispatch=is_dispatch)
        elif isinstance(result, Arrived) and result.plan.num_rows is not None:
            line["num_rows"] = result.plan.num_rows
        self._part.add(line)

    def void(self, error: BaseException) -> None:
        """It has failed, or was given up."""
        t, self._plan = now(), None
        self._end_wait(t)
        why = {} if isinstance(error, GeneratorExit) else {"error": told(error)}
        self._part.add({**self._line(t), "void": True, **why})

    def _end_wait(self, t: int) -> None:
        wait, self._wait = self._wait, None
        if wait is not None:
            self._part.add({"is": "wait", **wait.line(self.name), "t": [wait.began, t]})

    def _line(self, t: int) -> dict[str, Any]:
        line = {
            "is": "call",
            "call": self.name,
            "kind": self.kind,
            "t": [self.began, t],
            "posted": self.posted,
            "words": self.words,
        }
        if self.signalled:
            line["signalled"] = self.signalled
        if self.arrived:
            line["arrived"] = self.arrived
        return line

    def _rows(self, plan: HostPlan | NodePlan, spec: Spec, *, is_dispatch: bool) -> dict[str, Any]:
        """Rows to each peer and from each, bytes of one, and of a dispatch the picks of each local expert."""
        if isinstance(plan, NodePlan):
            there, here = plan.rows_by_peer(spec.num_slot_rows(plan.counts.shape[0]))
        else:
            hop = plan.hops[0] if is_dispatch else plan.back
            if is_dispatch and spec.is_staged and plan.pairs is not None:
                hop = plan.pairs
            there, here = _rows_of(hop)
        wide = spec.hidden * spec.combine_dtype.itemsize
        if not is_dispatch:
            return {"sent": here, "got": there, "row_bytes": wide}
        if self._is_wide:
            return {"sent": there, "got": here, "row_bytes": wide}
        experts = {"experts": plan.num_tokens_per_expert.tolist(), "num_experts": spec.num_experts}
        return {"sent": there, "got": here, "row_bytes": spec.row_bytes(), **experts}


class _Wait:
    """A host's wait for peers, each of which comes at its own time; without peers, for its device."""

    def __init__(self, missing: Missing, t: int) -> None:
        self.what = missing.what
        self.began = self.said = t
        self.left: Sequence[int] = missing.peers
        self.came: dict[int, int] = {}

    def come(self, peers: Sequence[int], t: int) -> None:
        self.came |= dict.fromkeys(peers, t)
        self.left = [peer for peer in self.left if peer not in self.came]

    def line(self, call: list[int]) -> dict[str, Any]:
        return {"call": call, "what": self.what, "came": self.came, "missing": list(self.left)}


def name_of(sequence: int) -> list[int]:
    """A call as lines name it: its epoch, and its number in it."""
    return [sequence >> EPOCH_SHIFT, sequence & CALL_MASK]


def told(error: BaseException) -> dict[str, Any]:
    """An error as lines have it; ``rank`` is whom it is about."""
    about = {"rank": error.rank} if isinstance(getattr(error, "rank", None), int) else {}  # type: ignore[attr-defined]
    return {"type": type(error).__name__, "text": str(error), **about}


def _rows_of(hop: Hop) -> tuple[list[int], list[int]]:
    """Rows that this rank sends to each peer of a hop, and those that it receives from each, in the order of peers."""
    by_peer = hop.counts.view(len(hop.peers), len(hop.peers), -1).sum(2)
    there: list[int] = by_peer[hop.own].tolist()
    here: list[int] = by_peer[:, hop.own].tolist()
    return there, here
