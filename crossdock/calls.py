"""What a call does from its first word to its result: the walk of a row through words, plan and backend.

Letters: T tokens here, H hidden, R rows received, L local experts, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.base import Backend, Landed, Outgoing
from crossdock.consent import PUSHED, Consent, Word
from crossdock.errors import CapacityError
from crossdock.layout import Expanded, Padded
from crossdock.pending import Steps
from crossdock.plan import Plan, check_capacity, local_counts, make_plan
from crossdock.received import Received
from crossdock.slots import ReceiveSlots
from crossdock.wire import Quantized

Rows = Literal["exact", "capacity"]


class Call(NamedTuple):
    """A call that has been taken: its number, this rank's word for it, and what posts it, if that had to wait."""

    sequence: int
    word: Word
    post: Callable[[], None] | None


class Calls:
    """One rank's calls: begins them, and makes the steps that a ``CallQueue`` drives to the result."""

    def __init__(
        self, consent: Consent, backend: Backend, slots: ReceiveSlots, arena: Arena, *, buffer_id: int, debug: bool
    ) -> None:
        self.overflows: list[tuple[int, CapacityError]] = []
        """Of ``rows="capacity"`` dispatches, by sequence number, until somebody raises them."""
        num_ranks = arena.topology.num_ranks
        self.num_tokens_per_expert = torch.zeros(arena.spec.num_local_experts(num_ranks), dtype=torch.int64)
        """[L], over all dispatches but wide ones."""
        self._consent = consent
        self._backend = backend
        self._slots = slots
        self._arena = arena
        self._spec = arena.spec
        self._topology = arena.topology
        self._rank = consent.rank
        self._buffer_id = buffer_id
        self._debug = debug
        self._slot_rows = arena.spec.num_slot_rows(num_ranks)
        self._num_combines = 0

    def begin(self, word: Word, topk_idx: Tensor | None) -> Call:
        """Takes the next sequence number and gives this rank's word (and counts), if that need not wait for anybody."""
        sequence = self._consent.take()

        def post() -> None:
            if topk_idx is not None:
                self._backend.post_counts(sequence, local_counts(self._spec, self._topology, topk_idx))
            self._consent.post(sequence, word)

        if not self._consent.may_post(sequence):
            return Call(sequence, word, post)
        post()
        return Call(sequence, word, None)

    def _words(self, call: Call) -> Steps[list[Word]]:
        """Everybody's words for the call; this rank's own is given first where it had to wait."""
        if call.post is not None:
            yield from self._consent.opening(call.sequence)
            call.post()
        return (yield from self._consent.words(call.sequence, call.word))

    def dispatch(
        self, call: Call, outgoing: Outgoing, routing: Plan | Tensor, mode: Rows, *, copy: bool
    ) -> Steps[Received]:
        words = yield from self._words(call)
        plan = routing if isinstance(routing, Plan) else self._plan(call.sequence, routing, mode)
        slots = [theirs.slot for theirs in words]
        self._backend.push_rows(plan, outgoing, slots)
        self._consent.signal(call.sequence)
        yield from self._consent.arrivals(call.sequence, range(len(words)))
        num_rows = plan.num_rows if mode == "exact" else self._slot_rows
        landed = self._backend.landed(plan, outgoing, call.word.slot, num_rows=num_rows)
        if self._debug and self._arena.region_of_rows(wide=outgoing.wide) == "data":
            self._slots.poison(call.word.slot, "outputs")
        if not outgoing.wide:
            self.num_tokens_per_expert += plan.num_tokens_per_expert
        return self._received(landed, call.word.slot, copy=copy)

    def combine(
        self,
        call: Call,
        plan: Plan,
        y: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
        extras: tuple[Tensor, ...] | None,
    ) -> Steps[Any]:
        words = yield from self._words(call)
        pushes = call.word.output_slot == PUSHED
        landing_slots = [theirs.slot for theirs in words]
        sums_here = self._spec.reduce == "rank"
        if pushes or extras:
            row_weights = weights if sums_here else None
            self._backend.push_outputs(plan, y if pushes else None, extras or (), row_weights, landing_slots)
            self._consent.signal(call.sequence)
        senders = [peer for peer, theirs in enumerate(words) if extras or theirs.output_slot == PUSHED]
        yield from self._consent.arrivals(call.sequence, senders)
        output_slots = [theirs.output_slot for theirs in words]
        out = self._backend.sum_rows(plan, None if sums_here else weights, bias, output_slots, call.word.slot)
        self._consent.check(call.sequence)
        if extras is None:
            return out
        return out, self._backend.returned_extras(plan, extras, call.word.slot)

    def return_extras(self, call: Call, plan: Plan, extras: tuple[Tensor, ...]) -> Steps[tuple[Tensor, ...]]:
        words = yield from self._words(call)
        self._backend.push_outputs(plan, None, extras, None, [theirs.slot for theirs in words])
        self._consent.signal(call.sequence)
        yield from self._consent.arrivals(call.sequence, range(len(words)))
        return self._backend.returned_extras(plan, extras, call.word.slot)

    def next_landing(self) -> int:
        """The landing slot of the next combine, in turn."""
        self._num_combines += 1
        return self._num_combines % self._spec.num_slots

    def _plan(self, sequence: int, topk_idx: Tensor, mode: Rows) -> Plan:
        """The plan of a fresh dispatch; of an overflow with ``rows="capacity"``, that of no rows, on all ranks."""
        counts = self._backend.read_counts(sequence)
        try:
            check_capacity(self._spec, self._topology, counts)
        except CapacityError as error:
            if mode == "exact":
                raise
            self.overflows.append((sequence, error))
            counts, topk_idx = torch.zeros_like(counts), torch.full_like(topk_idx, -1)
        return self.make_plan(topk_idx, counts, stamp=sequence)

    def make_plan(self, topk_idx: Tensor, counts: Tensor, *, stamp: int) -> Plan:
        return make_plan(
            self._spec,
            self._topology,
            rank=self._rank,
            topk_idx=topk_idx,
            counts=counts,
            stamp=stamp,
            buffer_id=self._buffer_id,
        )

    def _received(self, landed: Landed, slot: int, *, copy: bool) -> Received:
        plan, num_rows = landed.plan, landed.data.shape[0]
        lead: tuple[int, ...] = (num_rows,)
        if isinstance(self._spec.layout, Padded):
            num_local = plan.num_tokens_per_expert.shape[0]
            lead = (num_local, num_rows // num_local)

        def shaped(rows: Tensor) -> Tensor:
            return rows.view(*lead, *rows.shape[1:])

        lease = self._slots.lease(slot, plan.stamp)
        data = shaped(landed.data.clone() if copy else landed.data)
        scale = None if landed.scale is None else shaped(landed.scale.clone() if copy else landed.scale)
        return Received(
            plan=plan,
            num_rows=plan.num_rows,
            num_tokens_per_expert=plan.num_tokens_per_expert,
            expert_offsets=plan.segment_starts.to(torch.int32) if isinstance(self._spec.layout, Expanded) else None,
            topk_idx=landed.topk_idx,
            weights=None if landed.weights is None else shaped(landed.weights),
            src_idx=shaped(landed.src_idx),
            extras=tuple(shaped(extra) for extra in landed.extras),
            _rows=data if scale is None else Quantized(data, scale),
            _lease=None if copy else lease,
            _outputs=shaped(self._slots.outputs(slot, num_rows)),
            _outputs_lease=lease,
        )
