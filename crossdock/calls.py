"""What a call does from its first word to its result: the walk of a row through words, plan and backend.

Letters: T tokens here, H hidden, R rows received, L local experts, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.base import Arrived, Backend, Batch, Event, Metadata, RowCount
from crossdock.consent import PUSHED, Consent, Steps, Word
from crossdock.layout import Expanded, Padded
from crossdock.plan import Plan
from crossdock.received import LazyMetadata, Received
from crossdock.slots import ReceiveSlots


@dataclass(kw_only=True)
class Call:
    """A call that has been taken: its number, this rank's word for it, and what posts it, if that had to wait."""

    sequence: int
    word: Word
    num_sms: int | None = None
    at_once: bool = False
    """Whether it is waited for where it is started."""
    is_fused: bool = False
    """Whether the backend does it as a whole."""
    post: Callable[[], None] | None = None
    event: Event | None = None
    """The end of its work, once all of that has been issued; None where it is done when it returns."""
    held: tuple[object, ...] = ()
    """What its work reads, kept for as long as it may."""


class Calls:
    """One rank's calls: begins them, and makes the steps that a ``CallQueue`` drives to the result."""

    def __init__(self, consent: Consent, backend: Backend, slots: ReceiveSlots, arena: Arena, *, debug: bool) -> None:
        self._consent = consent
        self._backend = backend
        self._slots = slots
        self._arena = arena
        self._spec = arena.spec
        self._debug = debug
        self._slot_rows = arena.spec.num_slot_rows(arena.topology.num_ranks)
        self._num_combines = 0

    def begin(
        self,
        word: Word,
        topk_idx: Tensor | None,
        *,
        is_next: bool,
        at_once: bool = False,
        is_fused: bool = False,
        num_sms: int | None = None,
    ) -> Call:
        """Takes the next sequence number and gives this rank's word (and counts), if that need not wait for anybody.

        Args:
            is_next: whether no call before it is still to be driven to its end.
            at_once, is_fused, num_sms: see ``Call``.
        """
        sequence = self._consent.take()
        if not is_next:  # it goes on later, maybe from another stream, which it will wait for too
            self._backend.enter()

        def post() -> None:
            if topk_idx is not None:
                self._backend.post_counts(sequence, topk_idx)
            self._consent.post(sequence, word)

        call = Call(sequence=sequence, word=word, num_sms=num_sms, at_once=at_once, is_fused=is_fused)
        if self._consent.may_post(sequence):
            post()
        else:
            call.post = post
        return call

    def _words(self, call: Call) -> Steps[Any]:
        """Everybody's words for the call; this rank's own is given first where it had to wait."""
        if call.post is not None:
            yield from self._turn(call)
            call.post()
            call.post = None
        self._backend.use_sms(call.num_sms)
        return (yield from self._consent.words(call.sequence, call.word))

    def _turn(self, call: Call) -> Steps[None]:
        """Done when nothing is in the way of the call's first word."""
        yield from self._consent.opening(call.sequence)
        self._backend.enter()
        self._backend.use_sms(call.num_sms)

    def dispatch(
        self, call: Call, batch: Batch, routing: Plan | Tensor, mode: RowCount, *, copy: bool
    ) -> Steps[Received]:
        call.held = (batch, routing)
        plan = yield from self._send(call, batch, routing, mode)
        num_rows = self._num_rows(plan, mode)
        arrived = self._backend.arrived(plan, batch, call.word.slot, num_rows=num_rows)
        if self._debug and self._arena.region_of_rows(unquantized=batch.unquantized) == "data":
            with self._backend.on_stream():
                self._slots.poison(call.word.slot, "outputs")
        call.event = self._backend.event(at_once=call.at_once)
        plan = yield from self._backend.settled(arrived.plan, mode)
        region = self._arena.region_of_rows(unquantized=batch.unquantized)
        recv = self._received(arrived, plan, call.word.slot, region, num_rows=self._num_rows(plan, mode))
        if copy:
            with self._backend.on_stream():
                recv = recv.copied()
            call.event = self._backend.event(at_once=call.at_once)
        return recv

    def takes_fused_dispatch(self, batch: Batch, routing: Plan | Tensor) -> bool:
        """Whether a dispatch is one that the backend does as a whole; it then keeps the picks itself."""
        fused = self._backend.fused
        return fused is not None and fused.takes_dispatch(batch, routing)

    def takes_fused_combine(self, plan: Plan, *, pushes: bool, has_extras: bool) -> bool:
        """Whether a combine is one that the backend does as a whole."""
        fused = self._backend.fused
        return fused is not None and fused.takes_combine(plan, pushes=pushes, has_extras=has_extras)

    def _send(self, call: Call, batch: Batch, routing: Plan | Tensor, mode: RowCount) -> Steps[Plan]:
        """Everybody's rows on their way, until they are in place."""
        if call.is_fused:
            fused = self._backend.fused
            assert fused is not None
            assert isinstance(routing, Tensor)
            yield from self._turn(call)
            return (yield from fused.dispatch(call.sequence, call.word, batch, routing, mode, at_once=call.at_once))
        words = yield from self._words(call)
        plan = routing if isinstance(routing, Plan) else self._backend.make_plan(call.sequence, routing, mode)
        self._backend.push_rows(plan, batch, words)
        self._consent.signal(call.sequence)
        yield from self._consent.arrivals(call.sequence, words, from_all=True)
        return plan

    def combine(
        self,
        call: Call,
        plan: Plan,
        y: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
        extras: tuple[Tensor, ...] | None,
    ) -> Steps[Any]:
        call.held = (plan, y, weights, bias, extras)
        pushes = call.word.output_slot == PUSHED
        sums_here = self._spec.reduce == "rank"
        if call.is_fused:
            fused = self._backend.fused
            assert fused is not None
            yield from self._turn(call)
            out = yield from fused.combine(call.word, plan, weights, bias, at_once=call.at_once)
            call.event = self._backend.event(at_once=call.at_once)
            return out
        words = yield from self._words(call)
        if pushes or extras:
            row_weights = weights if sums_here else None
            self._backend.push_outputs(plan, y if pushes else None, extras or (), row_weights, words)
            self._consent.signal(call.sequence)
        yield from self._consent.arrivals(call.sequence, words, from_all=bool(extras))
        out = self._backend.sum_rows(plan, None if sums_here else weights, bias, words, call.word.slot)
        self._consent.check(call.sequence)
        home = () if extras is None else self._backend.returned_extras(plan, extras, call.word.slot)
        call.event = self._backend.event(at_once=call.at_once)
        return out if extras is None else (out, home)

    def return_extras(self, call: Call, plan: Plan, extras: tuple[Tensor, ...]) -> Steps[tuple[Tensor, ...]]:
        call.held = (plan, extras)
        words = yield from self._words(call)
        self._backend.push_outputs(plan, None, extras, None, words)
        self._consent.signal(call.sequence)
        yield from self._consent.arrivals(call.sequence, words, from_all=True)
        home = self._backend.returned_extras(plan, extras, call.word.slot)
        call.event = self._backend.event(at_once=call.at_once)
        return home

    def next_return_slot(self) -> int:
        """The returned slot of the next combine, in turn."""
        self._num_combines += 1
        return self._num_combines % self._spec.num_slots

    def _num_rows(self, plan: Plan, mode: RowCount) -> int:
        """Rows to look at: as many as came, where that is asked for and known."""
        return self._slot_rows if mode == "capacity" or plan.num_rows is None else plan.num_rows

    def _received(self, arrived: Arrived, plan: Plan, slot: int, region: str, *, num_rows: int) -> Received:
        def small() -> Metadata:
            small, lead = arrived.small(), [num_rows]
            if isinstance(self._spec.layout, Padded):
                num_local = plan.num_tokens_per_expert.shape[0]
                lead = [num_local, num_rows // num_local]

            def shaped(rows: Tensor) -> Tensor:
                return rows[:num_rows].view(*lead, *rows.shape[1:])

            return Metadata(
                src_idx=shaped(small.src_idx),
                topk_idx=None if small.topk_idx is None else small.topk_idx[:num_rows],
                weights=None if small.weights is None else shaped(small.weights),
                extras=tuple(shaped(extra) for extra in small.extras),
            )

        records = LazyMetadata(small)
        lease = self._slots.lease(slot, plan.stamp, records)
        return Received(
            plan=plan,
            num_rows=plan.num_rows,
            _metadata=records,
            _read_rows=partial(self._slots.received, region, slot, num_rows),
            _scales=self._arena.scales,
            _lease=lease,
            _read_outputs=partial(self._slots.rows, "outputs", slot, num_rows),
            _outputs_lease=lease,
            _has_offsets=isinstance(self._spec.layout, Expanded),
        )
