"""Rows on GPUs that map each other's memory: the Backend protocol by kernels.

Every method issues work and returns; only ``rows="exact"`` waits for the device, and ``mover="copy"``, whose block
sizes the host has to know. Calls that are waited for at once are issued on the caller's current stream, those that are
only started on a stream of ours. Results and plans are allocated on the caller's stream.

Letters: T tokens here, K top-k, J rows of a token, H hidden, R rows received, Q rows sent, P ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crossdock.arena import Arena, Control
from crossdock.backends.base import (
    Arrived,
    Batch,
    Call,
    Event,
    LaunchOptions,
    Metadata,
    Outcome,
    Outputs,
    PlanTensors,
    RowTimes,
)
from crossdock.backends.cuda.config import LaunchConfig, agreed_topology, decide
from crossdock.backends.cuda.consent import DeviceConsent, Passing
from crossdock.backends.cuda.copies import push_blocks
from crossdock.backends.cuda.counters import CounterKernels
from crossdock.backends.cuda.fused import At, FusedCalls
from crossdock.backends.cuda.kernels import metadata as kernels
from crossdock.backends.cuda.kernels import sums as sum_kernels
from crossdock.backends.cuda.launch import NUM_KINDS, Launch, Launcher
from crossdock.backends.cuda.metadata import MetadataReader
from crossdock.backends.cuda.plan import DevicePlan, HostStamp
from crossdock.backends.cuda.planner import REMADE, Planner
from crossdock.backends.cuda.scales import as_kernels_take, dtype_of
from crossdock.backends.cuda.sends import IN_SLOT, SendKind, SendKinds, where_of
from crossdock.backends.cuda.state import CallState, DeviceState, Kept
from crossdock.backends.cuda.stream import CallStreams
from crossdock.backends.cuda.sums import SumKind, SumKinds
from crossdock.backends.cuda.training import TrainingKernels
from crossdock.backends.staged import RowMaker
from crossdock.consent import PUSHED, Kind, Missing, Steps, Word
from crossdock.errors import CapacityError, ConfigError
from crossdock.extent import Extent
from crossdock.kinds import Kinds
from crossdock.masks import has_rows_of, listed, made_before
from crossdock.plan import Plan
from crossdock.scales import as_integers, parts_of
from crossdock.spec import Spec
from crossdock.transport.device import DeviceTransport
from crossdock.wire import Fp8, Opaque, Quantized

_TELLS, _WEIGHTS, _EXTRAS = (given.value for given in (kernels.TELLS, kernels.WEIGHTS, kernels.EXTRAS))
_BIAS_ROWS, _UNCHECKED = (given.value for given in (sum_kernels.BIAS_ROWS, sum_kernels.UNCHECKED))
_NAMES = {kind: f"crossdock {kind}" for kind in Kind}
"""What calls are named in a profiler."""
_TURN = Missing((), "come to its turn")
_LEFT = Missing((), "finish", has_sent=True)
"""What a fused call that has been started leaves to ``wait()``."""


class CudaBackend:
    """The Backend protocol over device memory that every rank has mapped."""

    def __init__(
        self, arena: Arena, transport: DeviceTransport, launcher: Launcher, consent: DeviceConsent, *, buffer_id: int
    ) -> None:
        self.launch: LaunchConfig = launcher.config
        """The default; a call may ask for another number of SMs."""
        spec = arena.spec
        self._is_staged = spec.is_staged
        self._on = on = launcher.state
        self._row_maker = RowMaker(arena, lambda shape, dtype: on.state.new_empty(shape, dtype=dtype))
        self.has_pairs = on.num_pairs > 0
        self._spec, self._out_dtype = spec, spec.combine_dtype
        self._is_opaque = isinstance(spec.wire, Opaque)
        self._transport = transport
        self._launcher = launcher
        self._streams = launcher.streams
        self._consent = consent
        self._remember = consent.recent_plans.append
        self._planner = Planner(arena, on, launcher.streams, buffer_id=buffer_id)
        self._reader = MetadataReader(launcher)
        self._training = TrainingKernels(launcher)
        self._counters = CounterKernels(launcher)
        self._send_kinds, self._sum_kinds = SendKinds(launcher), SumKinds(launcher)
        self._sends: Kinds[SendKind] = Kinds(NUM_KINDS)
        self._sums: Kinds[SumKind] = Kinds(NUM_KINDS)
        self._remakes: Kinds[tuple[Launch, Launch]] = Kinds(NUM_KINDS)
        self.fused = FusedCalls(launcher, self._planner, self._send_kinds) if self.launch.is_fused else None
        self.tells_tokens = True
        self.signs_plans = False
        self.overflows: list[tuple[int, CapacityError]] = self._planner.overflows
        self.num_tokens_per_expert = on.tokens
        self._masked: tuple[int, ...] = ()

    @property
    def wait_s(self) -> Tensor:
        """See Backend."""
        return self._on.waits_ns.double() / 1e9

    @property
    def stream(self) -> torch.cuda.Stream:
        """See Backend."""
        return self._streams.side

    def use_stream(self, stream: Any) -> None:
        """See Backend."""
        device = self._on.device
        if stream is not None and not (isinstance(stream, torch.cuda.Stream) and stream.device == device):
            at = f" of {stream.device}" if isinstance(stream, torch.cuda.Stream) else ""
            raise ConfigError(
                f"buffer.stream was set to a {type(stream).__name__}{at}; set it to a torch.cuda.Stream of {device}, "
                f"or to None for the buffer's own"
            )
        self._streams.use(stream)

    def wait_for(self, event: Event, *, at_once: bool) -> None:
        """See Backend."""
        if not isinstance(event, torch.cuda.Event):
            raise ConfigError(
                f"after is a {type(event).__name__}; pass a torch.cuda.Event, such as Pending.event, or None"
            )
        if at_once or self.fused is not None:  # started ones too then run on the caller's stream
            self._streams.wait_for(event, on_side=False)
        if not at_once:
            self._streams.wait_for(event, on_side=True)

    def dispatch(self, call: Call, batch: Batch, routing: Tensor | Plan) -> Steps[Outcome[Arrived]]:
        """See Backend."""
        if self._is_opaque and not batch.unquantized and isinstance(batch.x, Tensor):
            batch = batch._replace(x=as_integers(batch.x))
        fused = self.fused
        ends_late = self._is_staged and isinstance(routing, Tensor) and call.row_count == "exact"
        if fused is not None and not (batch.unquantized or batch.extras or ends_late):
            return self._dispatch_fused(fused, call, batch, routing)
        if not (call.at_once or call.is_first):
            self._streams.order()  # issued later, it comes after what the caller has issued by now
        return self._dispatch(call, batch, routing)

    def _dispatch(self, call: Call, batch: Batch, routing: Tensor | Plan) -> Steps[Outcome[Arrived]]:
        if not call.is_first:
            yield _TURN
        if not self._consent.is_open:
            yield from self._consent.opening(call.sequence)
        torch.cuda.nvtx.range_push(_NAMES[call.word.kind])  # type: ignore[no-untyped-call]
        into, room = self._room(call, batch, routing) if self._is_staged else None, self._on.next_call()
        try:
            plan, kind, seen = self._send(call, batch, routing, room, into)
        finally:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        event = None if call.at_once else self._streams.event()
        if call.row_count == "exact" and plan.host_counts is not None:
            plan = yield from self._told(plan)
        if kind.ends_late:
            into = self._end_late(call, batch, plan, kind, room, seen)
            event = None if call.at_once else self._streams.event()
        return self._arrived(call, plan, batch, into), event

    def _room(self, call: Call, batch: Batch, routing: Tensor | Plan) -> Tensor | Quantized | None:
        """What staged rows are expanded into; None where the host is still to be told how many come.

        Raises:
            TransportError: there is no memory for it.
        """
        extent = routing.extent if isinstance(routing, Plan) else call.extent or self._on.arena.extent
        num_rows = routing.num_rows if isinstance(routing, Plan) else None
        if call.row_count == "capacity" or (isinstance(routing, Plan) and num_rows is None):
            num_rows = extent.slot_rows
        if num_rows is None:
            return None
        return self._row_maker.rows(num_rows, unquantized=batch.unquantized)

    def _end_late(
        self, call: Call, batch: Batch, plan: DevicePlan, kind: SendKind, room: Kept, seen: Tensor | None
    ) -> Tensor | Quantized:
        """Tells that rows are in place, now that there is room for those that come here, and expands these.

        Raises:
            TransportError: there is none. Until now no rank has got what it waits for.
        """
        assert plan.num_rows is not None, "the host was told"
        into = self._row_maker.rows(plan.num_rows, unquantized=batch.unquantized)
        stream = self._streams.enter() if call.at_once else self._streams.enter_side()
        kind.finish(0, stream, room, self._on.rank, self._on.max_polls, plan)
        self._consent.owes_arrival = False
        assert kind.expand is not None, "staged rows"
        kind.expand(0, stream, *where_of(into), plan, room, plan.num_tokens, self._on.rank)
        if call.counters is not None and seen is not None:
            self._counters.end(call.counters, seen, plan.memory, stream)
        return into

    def _dispatch_fused(
        self, fused: FusedCalls, call: Call, batch: Batch, routing: Tensor | Plan
    ) -> Steps[Outcome[Arrived]]:
        """A call that is only started yields after rows have been sent, or when a peer is late."""
        if call.at_once and not call.is_first:  # its kernel waits for peers
            yield _TURN
        if not self._consent.is_open:
            yield from self._consent.opening(call.sequence)
        into, room = self._room(call, batch, routing) if self._is_staged else None, self._on.next_call()
        stream = self._streams.enter()
        topk_idx = None
        if isinstance(routing, Tensor):
            topk_idx = routing
            plan = self._planner.blank(routing.shape[0], call.sequence, call.extent or self._on.arena.extent)
            if plan.too_many:
                self._empty(plan, stream)
            self._remember(plan)
        else:
            assert isinstance(routing, DevicePlan), "the plan of another backend"
            plan = routing
        seen = None if call.counters is None else self._counters.begin(stream)
        torch.cuda.nvtx.range_push(_NAMES[call.word.kind])  # type: ignore[no-untyped-call]
        try:
            fused.dispatch(call, plan, batch, topk_idx, At(stream, room, into), begins=True, awaits=call.at_once)
        finally:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        if not call.at_once:
            yield _LEFT
            stream = self._streams.enter()
            picks = None if topk_idx is None else plan.topk_idx
            fused.dispatch(call, plan, batch, picks, At(stream, room, into), begins=False, awaits=True)
        if topk_idx is not None:
            self._planner.placed(plan, call.sequence, call.row_count)
        if call.counters is not None and seen is not None:
            self._counters.end(call.counters, seen, plan.memory, stream)
        event = None if call.at_once else self._streams.event()
        if call.row_count == "exact" and plan.host_counts is not None:
            plan = yield from self._told(plan)
        return self._arrived(call, plan, batch, into), event

    def _empty(self, plan: DevicePlan, stream: int) -> None:
        """Of a rank with more tokens than the call may have: none of them goes anywhere."""
        with self._streams.context(stream):
            for name in ("dst_rows", "topk_idx", "pair_dst_rows", "return_rows", "pair_return_rows"):
                plan.table(name).fill_(-1)

    def _told(self, plan: DevicePlan) -> Steps[DevicePlan]:
        """The plan with how many rows come, once the device has told that."""
        host_counts = plan.host_counts
        assert host_counts is not None
        stamp: Passing = HostStamp(host_counts.told, lambda: self._streams.is_idle)
        if not host_counts.tells or host_counts.stamp != plan.stamp:  # of an earlier dispatch, which had no need of it
            stamp = self._streams.event()
        yield from self._consent.until(stamp, "begin this dispatch")
        if (failure := self._consent.failure()) is not None:
            raise failure
        try:
            return self._planner.told(plan)
        except CapacityError:
            self._consent.owes_arrival = False  # nobody waits for rows of such a call
            raise

    def _arrived(self, call: Call, plan: DevicePlan, batch: Batch, into: Tensor | Quantized | None) -> Arrived:
        """Rows to look at are as many as came, where that is asked for and known."""
        num_rows = plan.num_rows
        if call.row_count == "capacity" or num_rows is None:
            num_rows = plan.extent.slot_rows
        is_captured = torch.cuda.is_current_stream_capturing()
        return Arrived(
            plan, num_rows, partial(self._read, plan, batch, call.word.slot, num_rows, is_captured=is_captured), into
        )

    def _read(self, plan: DevicePlan, batch: Batch, slot: int, num_rows: int, *, is_captured: bool) -> Metadata:
        """What travelled with rows."""
        if torch.cuda.is_current_stream_capturing() != is_captured and (
            plan.src_idx is None or batch.weights is not None or batch.extras
        ):
            raise ConfigError(
                "what came with these rows is read when it is asked for: of a dispatch in a CUDA graph ask within the "
                "capture, of any other outside of it"
            )
        return self._reader.read(plan, batch, slot, num_rows, self._streams.enter())

    def _send(  # noqa: PLR0912, PLR0915 - in one place: each function would be one more call of Python in each call
        self,
        call: Call,
        batch: Batch,
        routing: Tensor | Plan,
        room: Kept,
        into: Tensor | Quantized | None,
    ) -> tuple[DevicePlan, SendKind, Tensor | None]:
        """Issues a dispatch of several kernels, up to where everybody's rows are in place, or as its kind says.

        Gives also what its counters were when it began.

        Args:
            room: for what its kernels keep of it.
            into: what staged rows are expanded into; None: into the slot, or later.
        """
        on, at_once, x, weights, topk_idx = self._on, call.at_once, batch.x, batch.weights, None
        if isinstance(routing, Tensor):
            topk_idx = routing
            plan = self._planner.blank(routing.shape[0], call.sequence, call.extent or on.arena.extent)
        else:
            assert isinstance(routing, DevicePlan), "the plan of another backend"
            plan = routing
        stream = self._streams.enter() if at_once else self._streams.enter_side()
        seen = None if call.counters is None else self._counters.begin(stream)
        if weights is not None:
            weights = self._dense(weights, stream).view(torch.int32)
        extras = (self._packed(batch.extras, stream),) if batch.extras else ()
        scale: Tensor | Kept = on.nothing
        if isinstance(x, Tensor):
            data = x
        else:
            data, scale = x = as_kernels_take(x)
        if data.stride(1) != 1 and data.shape[1] != 1:
            data = self._dense(data, stream)
            x = data if isinstance(x, Tensor) else x._replace(data=data)
        if x is not batch.x or weights is not None or extras:
            batch = Batch(x, weights, extras, batch.unquantized)
        known, kept = plan.src_idx is not None, call.kept
        way = known, plan.extent
        if kept is not None and way in kept:
            kind: SendKind = kept[way]
        else:
            kind = self._kind_of(call, batch, topk_idx, plan.extent, known=known)
        rank, nothing = on.rank, on.nothing
        num_tokens, too_many = 0 if plan.too_many else plan.num_tokens, plan.too_many
        if too_many and topk_idx is not None:
            self._empty(plan, stream)
        carries = (0 if weights is None else _WEIGHTS) | (_EXTRAS if extras else 0)
        beside = (carries, nothing if weights is None else weights, extras[0] if extras else nothing)
        if kind.place is None:
            kind.begin(0, stream, room, call.word.payload, rank, on.max_polls)
        else:
            assert plan.host_counts is not None
            self._remember(plan)
            kind.begin(
                num_tokens,
                stream,
                topk_idx,
                plan,
                room,
                num_tokens,
                too_many,
                call.word.payload,
                rank,
                on.max_polls,
            )
            tells, host_counts = _TELLS if call.row_count == "exact" else 0, plan.host_counts.row
            kind.place(num_tokens, stream, plan, room, host_counts, num_tokens, rank, tells | carries, *beside[1:])
            self._planner.placed(plan, call.sequence, call.row_count)
        if not kind.pushes_beside:
            beside = (0, nothing, nothing)
        max_polls = 0
        if self.launch.mover == "copy":
            if kind.push is not None:
                kind.push(num_tokens, stream, plan, room, num_tokens, rank, *beside)
            with self._streams.context(stream):
                push_blocks(self._send_kinds, self._transport, plan, batch, room.memory, stream, self._consent)
        elif kind.push is not None:
            max_polls = (on.max_polls if at_once else 0) if num_tokens <= kind.most_tokens else -1
            if kind.is_cast:
                kind.push(num_tokens, stream, data, plan, room, num_tokens, rank, max_polls, *beside)
            else:
                kind.push(num_tokens, stream, data, scale, plan, room, num_tokens, rank, max_polls, *beside)
        if kind.ends_late:
            self._consent.owes_arrival = True
            return plan, kind, seen
        if max_polls < 0:
            kind.end(0, stream, room, rank, on.max_polls, plan)
        elif not at_once or self.launch.mover == "copy":
            kind.finish(0, stream, room, rank, on.max_polls, plan)
        if kind.expand is not None:
            where = IN_SLOT if into is None else where_of(into)
            kind.expand(0, stream, *where, plan, room, num_tokens, rank)
        if call.counters is not None and seen is not None:
            self._counters.end(call.counters, seen, plan.memory, stream)
        return plan, kind, seen

    def _kind_of(self, call: Call, batch: Batch, topk_idx: Tensor | None, extent: Extent, *, known: bool) -> SendKind:
        """What a dispatch of several kernels launches, by all that it depends on. Noted for calls of its kind."""
        key = self._send_kinds.key(batch, topk_idx, call.num_sms, extent.max_tokens, call.row_count, known=known)
        kind = self._sends.get(key)
        if kind is None:
            config, is_fresh = self.launch.using(call.num_sms), topk_idx is not None
            made = self._send_kinds.make(batch, config, extent, call.row_count, is_fresh=is_fresh, known=known)
            kind = self._sends.keep(key, made)
        if call.kept is not None:
            call.kept.keep((known, extent), kind)
        return kind

    def combine(
        self, call: Call, plan: Plan, given: Outputs
    ) -> Steps[Outcome[Tensor | tuple[Tensor, tuple[Tensor, ...]]]]:
        """See Backend."""
        assert isinstance(plan, DevicePlan), "the plan of another backend"
        if self.fused is not None and call.word.output_slot != PUSHED and given.extras is None:
            return self._combine_fused(self.fused, call, plan, given)
        if not (call.at_once or call.is_first):
            self._streams.order()
        return self._combine(call, plan, given)

    def _combine(
        self, call: Call, plan: DevicePlan, given: Outputs
    ) -> Steps[Outcome[Tensor | tuple[Tensor, tuple[Tensor, ...]]]]:
        if not call.is_first:
            yield _TURN
        if not self._consent.is_open:
            yield from self._consent.opening(call.sequence)
        torch.cuda.nvtx.range_push(_NAMES[call.word.kind])  # type: ignore[no-untyped-call]
        try:
            out, results = self._return(call, plan, given, pushes=call.word.output_slot == PUSHED, sums=True)
        finally:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        event = None if call.at_once else self._streams.event()
        return out if given.extras is None else (out, results), event

    def _combine_fused(
        self, fused: FusedCalls, call: Call, plan: DevicePlan, given: Outputs
    ) -> Steps[Outcome[Tensor | tuple[Tensor, tuple[Tensor, ...]]]]:
        """A call that is only started yields after this rank's word."""
        if call.at_once and not call.is_first:  # its kernel waits for peers
            yield _TURN
        if not self._consent.is_open:
            yield from self._consent.opening(call.sequence)
        stream, room = self._streams.enter(), self._on.next_call()
        seen = None if call.counters is None else self._counters.begin(stream)
        if not call.at_once:
            fused.begin_combine(call.word, At(stream, room))
            yield _LEFT
            stream = self._streams.enter()
        weights, bias = (None if some is None else self._dense(some, stream) for some in (given.weights, given.bias))
        out = given.out
        if out is None:
            out = self._on.state.new_empty((plan.num_tokens, self._spec.hidden), dtype=self._out_dtype)
        torch.cuda.nvtx.range_push(_NAMES[call.word.kind])  # type: ignore[no-untyped-call]
        try:
            fused.combine(call, plan, out, weights, bias, At(stream, room), begins=call.at_once)
        finally:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        if call.counters is not None and seen is not None:
            self._counters.end(call.counters, seen, plan.memory, stream)
        return out, None if call.at_once else self._streams.event()

    def return_extras(self, call: Call, plan: Plan, extras: tuple[Tensor, ...]) -> Steps[Outcome[tuple[Tensor, ...]]]:
        """See Backend."""
        if not (call.at_once or call.is_first):
            self._streams.order()
        assert isinstance(plan, DevicePlan), "the plan of another backend"
        return self._return_extras(call, plan, extras)

    def _return_extras(
        self, call: Call, plan: DevicePlan, extras: tuple[Tensor, ...]
    ) -> Steps[Outcome[tuple[Tensor, ...]]]:
        if not call.is_first:
            yield _TURN
        if not self._consent.is_open:
            yield from self._consent.opening(call.sequence)
        given = Outputs(y=self._on.nothing.memory, extras=extras)
        _, results = self._return(call, plan, given, pushes=False, sums=False)
        return results, None if call.at_once else self._streams.event()

    def _return(  # noqa: PLR0912, PLR0915 - in one place: each function would be one more call of Python in each call
        self, call: Call, plan: DevicePlan, given: Outputs, *, pushes: bool, sums: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Issues a combine of several kernels (outputs pushed, or pulled), or a return of extras; what comes of it."""
        on, spec, num_tokens, rank = self._on, self._spec, plan.num_tokens, self._on.rank
        y, weights, bias, extras, rows, out = given
        if not sums:
            out = on.nothing.memory
        elif out is None:
            out = on.state.new_empty((num_tokens, spec.hidden), dtype=self._out_dtype)
        width, came = 0, on.nothing.memory
        if extras:
            width = sum(math.prod(extra.shape[1:]) for extra in extras)
            lead = (num_tokens, spec.num_topk) if spec.layout.per_pick else (num_tokens,)
            came = on.empty(*lead, width, dtype=torch.float32)
        stream = self._streams.enter() if call.at_once else self._streams.enter_side()
        seen = None if call.counters is None else self._counters.begin(stream)
        if pushes and y.stride(1) != 1 and y.shape[1] != 1:
            y = self._dense(y, stream)
        weights = None if weights is None else self._dense(weights, stream)
        bias = None if bias is None else self._dense(bias, stream)
        rows = None if rows is None else self._dense(rows, stream)
        if pushes and extras is None and self.fused is not None:
            at, by_rank = At(stream, on.next_call()), spec.reduce == "rank"
            self.fused.push(call, plan, y, weights if by_rank else None, rows, at)
            self.fused.combine(call, plan, out, None if by_rank else weights, bias, at, begins=False)
            if call.counters is not None and seen is not None:
                self._counters.end(call.counters, seen, plan.memory, stream)
            return out, ()
        pushed, sent = y if pushes else None, self._side_by_side(extras, stream) if extras and width else None
        kept = call.kept
        if kept is not None and pushes in kept:
            kind: SumKind = kept[pushes]
        else:
            key = self._sum_kinds.key(pushed, weights, bias, rows, sent, out, call.num_sms, sums=sums)
            config = self.launch.using(call.num_sms)
            kind = self._sums.get(key) or self._sums.keep(
                key, self._sum_kinds.make(pushed, weights, bias, rows, sent, config, sums=sums)
            )
            if kept is not None:
                kept.keep(pushes, kind)
        room, payload = on.next_call(), call.word.payload
        if pushed is None and sent is None:
            kind.begin(0, stream, room, payload, rank, on.max_polls)
        else:
            kind.begin(0, stream, plan, room, num_tokens, payload, rank, on.max_polls)
            last = (plan, room, num_tokens, rank, on.max_polls if call.at_once else 0)
            if kind.push is not None and kind.is_summed:
                nothing = on.nothing
                how = nothing if weights is None else weights, nothing if rows is None else rows, y.shape[0]
                kind.push(0, stream, y, *how, *last)
            elif kind.push is not None:
                kind.push(0, stream, y, *last)
            if kind.extras is not None:
                kind.extras(0, stream, sent, width, *last)
            if not call.at_once:
                kind.finish(0, stream, room, rank, on.max_polls, plan)
        if kind.sum is not None:
            nothing = on.nothing
            of_picks = nothing if weights is None or spec.reduce == "rank" else weights
            is_wide = num_tokens > kind.most_tokens
            ways = (0 if bias is None or bias.dim() == 1 else _BIAS_ROWS) | (_UNCHECKED if is_wide else 0)
            kind.sum(
                num_tokens, stream, out, nothing if bias is None else bias, of_picks, plan, room, num_tokens, rank,
                ways, came, width,
            )  # fmt: skip
            if is_wide:
                kind.check(0, stream, room, rank)
        elif kind.gather is not None and width:
            kind.gather(num_tokens, stream, came, width, plan, room, num_tokens, rank)
        if call.counters is not None and seen is not None:
            self._counters.end(call.counters, seen, plan.memory, stream)
        return out, self._apart(came, extras, stream) if extras else ()

    def _packed(self, extras: tuple[Tensor, ...], stream: int) -> Tensor:
        """Extras ``[T, ...]`` of a dispatch side by side, int32 ``[T, words]``, zeros behind them."""
        arena = self._on.arena
        with self._streams.context(stream):
            raw = torch.cat([_raw(extra.contiguous()) for extra in extras], dim=1)
            room = arena.metadata_bytes - arena.extras_offset
            packed = torch.zeros(raw.shape[0], room, dtype=torch.uint8, device=self._on.device)
            packed[:, : raw.shape[1]].copy_(raw)
            return packed.view(torch.int32)

    def _side_by_side(self, extras: Sequence[Tensor], stream: int) -> Tensor:
        """Extras ``[R, ...]`` that go back, float32 ``[R, width]``: where there is one, itself."""
        if len(extras) == 1:
            return self._dense(extras[0], stream)
        with self._streams.context(stream):
            return torch.cat([extra.reshape(extra.shape[0], math.prod(extra.shape[1:])) for extra in extras], dim=1)

    def _apart(self, came: Tensor, extras: Sequence[Tensor], stream: int) -> tuple[Tensor, ...]:
        """What has come back ``[..., width]``, for each of the extras ``[R, ...]``: where there is one, itself."""
        lead = came.shape[:-1]
        if len(extras) == 1:
            return (came.view(*lead, *extras[0].shape[1:]),)
        widths = [math.prod(extra.shape[1:]) for extra in extras]
        parts = [self._on.empty(*lead, *extra.shape[1:], dtype=torch.float32) for extra in extras]
        with self._streams.context(stream):
            for part, values in zip(parts, torch.split(came, widths, dim=-1), strict=True):
                part.view(*lead, -1).copy_(values) if part.numel() else None
        return tuple(parts)

    def _dense(self, tensor: Tensor, stream: int) -> Tensor:
        """The tensor without gaps: itself, or a copy that is made on a stream."""
        if tensor.is_contiguous():
            return tensor
        with self._streams.context(stream):
            return tensor.contiguous()

    def remake_plan(self, tensors: PlanTensors) -> DevicePlan:
        """See Backend. Where ranks are masked, the host asks the device whether the plan has rows of theirs."""
        if self._masked:
            if torch.cuda.is_current_stream_capturing():
                raise ConfigError(
                    f"a CUDA graph is being captured, and whether a plan is older than the mask of "
                    f"{listed(self._masked)} has to be asked the device; capture calls on recv.plan of a plain dispatch"
                )
            num_local = self._spec.num_local_experts(self._transport.num_ranks)
            if has_rows_of(tensors.counts, self._masked, num_local=num_local):
                raise made_before(self._masked)
        plan = self._planner.blank(tensors.topk_idx.shape[0], REMADE, self._on.arena.extent)
        self._fill(plan, tensors.topk_idx.contiguous(), tensors.counts.contiguous())
        return self._planner.as_remade(plan, tensors)

    def _fill(self, plan: DevicePlan, topk_idx: Tensor, counts: Tensor) -> None:
        """The tables of a plan whose picks and counts are known."""
        on, nothing, num_tokens = self._on, self._on.nothing, plan.num_tokens
        key = ("remade", topk_idx.data_ptr() & 15, counts.data_ptr() & 15)
        remake, place = self._remakes.get(key) or self._remakes.keep(key, self._send_kinds.bind_remake())
        stream = self._streams.enter()
        remake(num_tokens, stream, topk_idx, counts, plan, num_tokens, on.rank)
        place(num_tokens, stream, plan.memory, on.calls, self._planner.nobody, num_tokens, on.rank, 0, nothing, nothing)

    def as_remade(self, plan: Plan, tensors: PlanTensors) -> DevicePlan:
        """See Backend. What came with the rows has been read: that found out where they are from."""
        assert isinstance(plan, DevicePlan), "the plan of another backend"
        return self._planner.as_remade(plan, tensors)

    def copy_rows(self, plan: Plan, rows: Tensor | Quantized, out: Tensor | Quantized) -> None:
        """See Backend."""
        assert isinstance(plan, DevicePlan), "the plan of another backend"
        for each, target in parts_of(rows, out):
            if each.is_contiguous():
                self._training.copy_rows(plan.memory, each, target)
            else:  # scales that arrive column-major
                target.copy_(each)

    def own_rows(self, rows: Tensor | Quantized, src_idx: Tensor | None) -> Tensor:
        """See Backend."""
        return self._training.own_rows(rows, src_idx)

    def weigh_gradients(self, grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor) -> tuple[Tensor, Tensor]:
        """See Backend."""
        return self._training.weigh_gradients(grads, y, weights, src_idx)

    def mask(self, ranks: tuple[int, ...]) -> None:
        """See Backend."""
        self._masked = ranks
        self._planner.mask(ranks)
        self.synchronize()

    def lie_in(self, segment: Tensor | None) -> None:
        """See Backend. Kernels find segments by a table that the transport keeps, and regions in them by offsets."""
        self._on.lie_in(segment)

    def check_capture(self, *, asks_host: bool) -> None:
        """See Backend."""
        if (asks_host or self.launch.mover == "copy") and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                "a CUDA graph is being captured, and this call asks the host (a dispatch how many rows came, or where "
                "blocks of mover='copy' go; a mask who is gone); leave mask() out, and for a dispatch pass "
                "rows='capacity', or recv.plan of an earlier dispatch, with mover='kernel'"
            )

    def time_rows(self, times: RowTimes) -> bool:
        """See Backend."""
        return False

    def synchronize(self) -> None:
        """See Backend."""
        self._streams.synchronize()
        self._planner.look_at_all_host_counts()

    def warm_up(self) -> None:
        """Does every kind of call on no rows, so that kernels are compiled and loaded. Only while calls are void.

        A kernel that is loaded in the middle of a call can wait for a peer's kernel that waits for this rank.
        """
        spec, device = self._spec, self._on.device
        picks = torch.full((1, spec.num_topk), -1, dtype=torch.int64, device=device)
        weights = torch.zeros(1, spec.num_topk, dtype=torch.float32, device=device)
        wide = torch.zeros(1, spec.hidden, dtype=spec.combine_dtype, device=device)
        batches = [Batch(x=x, weights=weights, extras=()) for x in _all_kinds_of(wide, spec)]
        if self._on.arena.region_of_rows(unquantized=True) != "data":
            batches.append(Batch(x=wide, weights=weights, extras=(), unquantized=True))
        else:  # the same rows, which do not count
            batches.append(Batch(x=wide, weights=None, extras=(), unquantized=True))
        for batch in batches:
            self._warm_up_dispatch(batch, picks)
        plan = self._planner.blank(1, 0, self._on.arena.extent)
        row_weights = torch.zeros(1, dtype=torch.float32, device=device)
        given_weights = row_weights if spec.reduce == "rank" else weights
        ways = (True, False) if self.fused is None else (True,)
        """Whether outputs are pushed, of combines of several kernels, or of two."""
        for given, bias in itertools.product((None, given_weights), (None, wide, wide.float())):
            combine = Call(0, Word(Kind.COMBINE, 0, PUSHED))
            for pushes in ways:
                self._return(combine, plan, Outputs(wide, given, bias), pushes=pushes, sums=True)
            if self.fused is not None and (given is None or spec.reduce == "token"):  # else outputs are pushed
                at = At(self._streams.enter(), self._on.next_call())
                self.fused.begin_combine(combine.word, at)
                self.fused.combine(combine, plan, wide, given, bias, at, begins=True)
        extra = torch.zeros(1, 1, dtype=torch.float32, device=device)
        started = Call(0, Word(Kind.COMBINE, 0, PUSHED), at_once=False)
        for pushes in (True, False):
            if pushes in ways:
                self._return(started, plan, Outputs(wide), pushes=pushes, sums=True)
            for given in (None, row_weights if spec.reduce == "rank" else None):
                self._return(started, plan, Outputs(wide, given, extras=(extra,)), pushes=pushes, sums=True)
        self._return(started, plan, Outputs(wide, extras=(extra,)), pushes=False, sums=False)
        self._fill(self._planner.blank(1, 0, self._on.arena.extent), picks, plan.counts)
        stream, room = self._streams.enter(), self._on.next_call()
        for sends in self._sends.values():
            sends.end(0, stream, room, self._on.rank, self._on.max_polls, plan)
        for sums in self._sums.values():
            sums.check(0, stream, room, self._on.rank)
        self._training.warm_up()
        self.synchronize()
        self._consent.recent_plans.clear()

    def _warm_up_dispatch(self, batch: Batch, picks: Tensor) -> None:
        """A batch sent in every way: fresh, on a plan, on one that was made again; waited for at once, or started."""
        for at_once in (True, False):
            call = Call(0, Word(Kind.DISPATCH, 0), at_once=at_once)
            if self.fused is not None and not batch.unquantized:
                made = self._planner.blank(1, 0, self._on.arena.extent)
                into = self._row_maker.rows(1, unquantized=False) if self._is_staged else None
                at = At(self._streams.enter(), self._on.next_call(), into)
                for given in (picks, None):
                    self.fused.dispatch(call, made, batch, given, at, begins=True, awaits=at_once)
        into, room = None, self._on.next_call
        if self._is_staged:
            into = self._row_maker.rows(1, unquantized=batch.unquantized)
            plan, kind, _ = self._send(call._replace(row_count="exact"), batch, picks, room(), None)
            self._end_late(call, batch, plan.changed(num_rows=1), kind, room(), None)
        plan, *_ = self._send(call, batch, picks, room(), into)
        self._send(call, batch, plan, room(), into)
        known = plan.changed(src_idx=picks[0, :0].int(), local_idx=None)
        self._send(call, batch._replace(weights=None), known, room(), into)
        for given in (None, batch.weights):
            self._reader.read(plan, batch._replace(weights=given), 0, 1, self._streams.enter())


class CudaCalls:
    """What the backends of all Specs over one connection share: the calls' state, their streams, and consent. Local.

    Args:
        ranks_on_gpus: how many ranks share the GPU of each rank, by rank, gathered from all; None: as many as here.
    """

    def __init__(
        self,
        transport: DeviceTransport,
        control: Control,
        *,
        timeout_s: float,
        ranks_on_gpus: Sequence[int] | None = None,
    ) -> None:
        self._transport = transport
        self._ranks_on_gpus = ranks_on_gpus or [transport.ranks_here] * transport.num_ranks
        self._state = CallState(transport, control, timeout_s=timeout_s)
        self._streams = CallStreams(transport.device)
        self.consent = DeviceConsent(self._state, self._streams)

    def lay(self, arena: Arena, launch_options: LaunchOptions, *, buffer_id: int) -> CudaBackend:
        """A backend for one Spec: compiles and loads its kernels. Local; no call may be under way."""
        transport = self._transport
        device = torch.cuda.get_device_properties(transport.device)
        visible = device.multi_processor_count // (transport.ranks_here if transport.shares_sms else 1)
        config = decide(
            arena.spec,
            agreed_topology(arena.topology, self._ranks_on_gpus),
            launch_options,
            visible_sms=visible,
            ranks_here=transport.ranks_here,
            can_launch_early=torch.version.hip is None and device.major >= 9,
        )
        has_pairs = arena.spec.ranks_sum_picks or config.expand == "receiver"
        launcher = Launcher(DeviceState(arena, self._state, has_pairs=has_pairs), self._streams, config)
        backend = CudaBackend(arena, transport, launcher, self.consent, buffer_id=buffer_id)
        self._streams.synchronize()
        with self._state.all_void():
            if config.mover == "kernel":  # else the host asks what kernels have found
                with launcher.compiling():
                    backend.warm_up()
            backend.warm_up()
        return backend


def _all_kinds_of(wide: Tensor, spec: Spec) -> list[Tensor | Quantized]:
    """One row of zeros ``[1, H]``, in all ways in which it may be given to a dispatch."""
    wire = spec.wire
    if isinstance(wire, Fp8):
        return [wire.quantize(wide), wide]
    if not isinstance(wire, Opaque):
        return [wide.to(wire.dtype)]
    num_columns, num_scales = wire.num_columns(spec.hidden), wire.num_scales(spec.hidden)
    data = torch.zeros(1, num_columns, dtype=dtype_of(wire.dtype.itemsize), device=wide.device)
    scale = torch.zeros(1, num_scales, dtype=dtype_of(wire.scale_dtype.itemsize), device=wide.device)
    return [Quantized(data, scale) if num_scales else data]


def _raw(extra: Tensor) -> Tensor:
    """A contiguous ``[n, ...]`` as uint8 ``[n, bytes]``; the same memory."""
    return extra.view(extra.shape[0], math.prod(extra.shape[1:])).view(torch.uint8)
