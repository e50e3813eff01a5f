"""The three verbs on CPUs: words, then rows, then signals, as steps that the host drives while it waits for peers.

Letters: T tokens here, K top-k, H hidden, R rows received.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.base import (
    Arrived,
    Batch,
    Call,
    Event,
    Launch,
    LaunchOptions,
    Outcome,
    Outputs,
    PlanTensors,
    RowTimes,
)
from crossdock.backends.cpu.arrived import copy_rows
from crossdock.backends.cpu.by_node import RowsByNode, TimedRowsByNode
from crossdock.backends.cpu.rows import CpuRows
from crossdock.backends.cpu.timed import TimedRows
from crossdock.backends.training import own_rows, weigh_gradients
from crossdock.consent import PUSHED, Consent, Steps, Word
from crossdock.errors import CapacityError, ConfigError
from crossdock.extent import Extent
from crossdock.masks import has_rows_of, made_before
from crossdock.plan import HostPlan, Plan, check_capacity, local_counts, make_plan
from crossdock.transport.host import HostTransport
from crossdock.wire import Quantized


class CpuBackend:
    """The Backend protocol over host memory that every rank has mapped. Readable, and the oracle of the others."""

    def __init__(
        self,
        transport: HostTransport,
        consent: Consent,
        arena: Arena,
        launch_options: LaunchOptions,
        *,
        buffer_id: int,
    ) -> None:
        spec = arena.spec
        self.launch: Launch | None = None
        self.tells_tokens = True
        self.signs_plans = True
        self.has_pairs = spec.ranks_sum_picks
        self.overflows: list[tuple[int, CapacityError]] = []
        self.wait_s = torch.zeros(transport.num_ranks, dtype=torch.float64, device="cpu")
        self.num_tokens_per_expert = torch.zeros(
            spec.num_local_experts(transport.num_ranks), dtype=torch.int64, device="cpu"
        )
        self._arena = arena
        self._consent = consent
        self._transport = transport
        self._rows = RowsByNode(arena, transport) if spec.reduce == "node" else CpuRows(arena, transport)
        self._buffer_id = buffer_id
        self._rank = transport.rank
        self._masked: tuple[int, ...] = ()

    stream: None = None

    def use_stream(self, stream: object) -> None:
        """See Backend."""
        raise ConfigError(f"buffer.stream was set to a {type(stream).__name__}; there are none on CPUs: leave it")

    def wait_for(self, event: Event, *, at_once: bool) -> None:
        """See Backend."""
        raise ConfigError(
            f"after is a {type(event).__name__}; on CPUs the host does the work of a call, and Pending.event is None: "
            f"pass None, once what is to come before has been waited for"
        )

    def dispatch(self, call: Call, batch: Batch, routing: Tensor | Plan) -> Steps[Outcome[Arrived]]:
        """See Backend."""
        routing = routing if isinstance(routing, Plan) else routing.clone()
        is_posted = self._post(call, routing, may_wait=False)
        return self._dispatch(call, batch, routing, is_posted=is_posted)

    def _dispatch(
        self, call: Call, batch: Batch, routing: Tensor | Plan, *, is_posted: bool
    ) -> Steps[Outcome[Arrived]]:
        words = yield from self._words(call, None if is_posted else routing)
        plan = _of_host(routing) if isinstance(routing, Plan) else self._make_plan(call, routing)
        num_rows = plan.extent.slot_rows if call.row_count == "capacity" else plan.num_rows
        into = self._rows.room(num_rows, unquantized=batch.unquantized)  # while all ranks can be told of a failure
        self._rows.push_rows(plan, batch, words)
        self._consent.signal(call.sequence)
        yield from self._consent.arrivals(call.sequence, words, from_all=True)
        if not batch.unquantized:
            self.num_tokens_per_expert += plan.num_tokens_per_expert
        if call.counters is not None and call.counters.num_tokens_per_expert is not None:
            call.counters.num_tokens_per_expert.add_(plan.num_tokens_per_expert)
        plan, metadata = self._rows.take(plan, batch, call.word.slot, num_rows, into)
        return Arrived(plan, num_rows, lambda: metadata, into), None

    def combine(
        self, call: Call, plan: Plan, given: Outputs
    ) -> Steps[Outcome[Tensor | tuple[Tensor, tuple[Tensor, ...]]]]:
        """See Backend."""
        is_posted = self._post(call, plan, may_wait=False)
        host_plan = _of_host(plan)
        if given.partial_rows is not None:
            host_plan = replace(host_plan, partial_rows=given.partial_rows)
        return self._combine(call, host_plan, given, is_posted=is_posted)

    def _combine(
        self, call: Call, plan: HostPlan, given: Outputs, *, is_posted: bool
    ) -> Steps[Outcome[Tensor | tuple[Tensor, tuple[Tensor, ...]]]]:
        words = yield from self._words(call, None if is_posted else plan)
        is_pushed, reduce = call.word.output_slot == PUSHED, self._arena.spec.reduce
        weights, extras = given.weights, given.extras
        if is_pushed:
            self._rows.push_outputs(plan, given.y, None if reduce == "token" else weights, words)
        if extras:
            self._rows.push_extras(plan, extras, words)
        if is_pushed or extras:
            self._consent.signal(call.sequence)
        yield from self._consent.arrivals(call.sequence, words, from_all=bool(extras))
        out = self._rows.sum_rows(
            plan, None if reduce == "rank" else weights, given.bias, words, return_slot=call.word.slot, out=given.out
        )
        self._consent.check(call.sequence)
        if extras is None:
            return out, None
        return (out, self._rows.returned_extras(plan, extras, call.word.slot)), None

    def return_extras(self, call: Call, plan: Plan, extras: tuple[Tensor, ...]) -> Steps[Outcome[tuple[Tensor, ...]]]:
        """See Backend."""
        is_posted = self._post(call, plan, may_wait=False)
        return self._return_extras(call, _of_host(plan), extras, is_posted=is_posted)

    def _return_extras(
        self, call: Call, plan: HostPlan, extras: tuple[Tensor, ...], *, is_posted: bool
    ) -> Steps[Outcome[tuple[Tensor, ...]]]:
        words = yield from self._words(call, None if is_posted else plan)
        self._rows.push_extras(plan, extras, words)
        self._consent.signal(call.sequence)
        yield from self._consent.arrivals(call.sequence, words, from_all=True)
        return self._rows.returned_extras(plan, extras, call.word.slot), None

    def _post(self, call: Call, routing: Tensor | Plan, *, may_wait: bool) -> bool:
        """Posts this rank's word, behind the counts of a fresh dispatch; False: its turn has not come yet."""
        if not (may_wait or self._consent.may_post(call.sequence)):
            return False
        if isinstance(routing, Tensor):
            num_tokens, most = routing.shape[0], self._extent(call).max_tokens
            picks, too_many = (routing, 0) if num_tokens <= most else (routing[:0], num_tokens)
            counts = local_counts(self._arena.spec, self._arena.topology, picks)
            self._rows.post_counts(call.sequence, counts, too_many)
        self._consent.post(call.sequence, call.word)
        return True

    def _words(self, call: Call, unposted: Tensor | Plan | None) -> Steps[Sequence[Word]]:
        """Everybody's words for the call; this rank's own is posted first where that had to wait."""
        if unposted is not None:
            yield from self._consent.opening(call.sequence)
            self._post(call, unposted, may_wait=True)
        return (yield from self._consent.words(call.sequence, call.word))

    def _make_plan(self, call: Call, topk_idx: Tensor) -> HostPlan:
        extent, (counts, too_many) = self._extent(call), self._rows.counts(call.sequence)
        try:
            check_capacity(extent, self._arena.topology, counts, too_many, row_count=call.row_count)
        except CapacityError as error:
            if call.row_count == "exact":
                raise
            self.overflows.append((call.sequence, error))
            counts, topk_idx = torch.zeros_like(counts), torch.full_like(topk_idx, -1)
        return self._plan_of(topk_idx, counts, stamp=call.sequence, extent=extent)

    def _extent(self, call: Call) -> Extent:
        return call.extent or self._arena.extent

    def remake_plan(self, tensors: PlanTensors) -> HostPlan:
        """See Backend. The stamp is a checksum of the counts."""
        spec, num_ranks = self._arena.spec, self._arena.topology.num_ranks
        if has_rows_of(tensors.counts, self._masked, num_local=spec.num_local_experts(num_ranks)):
            raise made_before(self._masked)
        return self.as_remade(
            self._plan_of(tensors.topk_idx, tensors.counts, stamp=0, extent=self._arena.extent), tensors
        )

    def as_remade(self, plan: Plan, tensors: PlanTensors) -> HostPlan:
        """See Backend."""
        return replace(
            _of_host(plan),
            topk_idx=tensors.topk_idx,
            counts=tensors.counts,
            stamp=zlib.crc32(tensors.counts.numpy().tobytes()) + 1,  # 0 is no plan's
            partial_rows=tensors.partial_rows if self._arena.spec.ranks_sum_picks else None,
        )

    def copy_rows(self, plan: Plan, rows: Tensor | Quantized, out: Tensor | Quantized) -> None:
        """See Backend."""
        copy_rows(self._arena, _of_host(plan), rows, out)

    def own_rows(self, rows: Tensor | Quantized, src_idx: Tensor | None) -> Tensor:
        """See Backend."""
        return own_rows(self._arena.spec, rows, src_idx)

    def weigh_gradients(self, grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor) -> tuple[Tensor, Tensor]:
        """See Backend."""
        return weigh_gradients(grads, y, weights, src_idx)

    def _plan_of(self, topk_idx: Tensor, counts: Tensor, *, stamp: int, extent: Extent) -> HostPlan:
        plan = make_plan(
            self._arena.spec,
            self._arena.topology,
            rank=self._rank,
            topk_idx=topk_idx,
            counts=counts,
            stamp=stamp,
            buffer_id=self._buffer_id,
            extent=extent,
        )
        return replace(plan, masked=self._masked) if self._masked else plan

    def mask(self, ranks: tuple[int, ...]) -> None:
        """See Backend."""
        self._masked = ranks
        self._rows.mask(ranks)

    def time_rows(self, times: RowTimes) -> bool:
        """See Backend."""
        timed = TimedRowsByNode if self._arena.spec.reduce == "node" else TimedRows
        self._rows = timed(self._arena, self._transport, times.move_ns)
        return True

    def lie_in(self, segment: Tensor | None) -> None:
        """See Backend. Not here: what hosts map stays mapped."""

    def check_capture(self, *, asks_host: bool) -> None:
        """See Backend."""

    def synchronize(self) -> None:
        """See Backend."""


def _of_host(plan: Plan) -> HostPlan:
    assert isinstance(plan, HostPlan), "the plan of another backend"
    return plan
