"""Rows on GPUs that map each other's memory: the Backend protocol by kernels on a stream of its own.

Every method issues work and returns; only ``rows="exact"`` waits for the device, and ``mover="copy"``, whose block
sizes the host has to know. Results are allocated on the caller's stream, scratch on ours.

Letters: T tokens here, K top-k, J rows of a token, H hidden, R rows received, Q rows sent, P ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.base import Arrived, Batch, Call, LaunchOptions, Metadata, Outcome, PlanTensors
from crossdock.backends.cuda.config import agreed_topology, decide
from crossdock.backends.cuda.consent import DeviceConsent
from crossdock.backends.cuda.fused import FusedCalls
from crossdock.backends.cuda.launch import Launcher
from crossdock.backends.cuda.plan import DevicePlan, Table
from crossdock.backends.cuda.planner import Planner
from crossdock.backends.cuda.rows import RowKernels, rowwise
from crossdock.backends.cuda.scales import ScaleKernels
from crossdock.backends.cuda.training import TrainingKernels
from crossdock.backends.cuda.words import WordKernels
from crossdock.consent import PUSHED, Missing, Steps, Word
from crossdock.errors import CapacityError, ConfigError
from crossdock.layout import Expanded
from crossdock.masks import has_rows_of, listed, made_before
from crossdock.plan import Plan
from crossdock.scales import as_integers
from crossdock.transport.device import DeviceTransport
from crossdock.wire import Fp8, Quantized


class CudaBackend:
    """The Backend protocol over device memory that every rank has mapped."""

    def __init__(
        self, arena: Arena, transport: DeviceTransport, launcher: Launcher, consent: DeviceConsent, *, buffer_id: int
    ) -> None:
        self.launch = launcher.config
        """The default; a call may ask for another number of SMs."""
        spec = arena.spec
        self.has_pairs = spec.ranks_sum_picks or self.launch.expand == "receiver"
        self._arena = arena
        self._transport = transport
        self._on = launcher
        self._kernels = RowKernels(launcher)
        self._scale_kernels = ScaleKernels(launcher) if arena.scales.column_major else None
        """Of scales that do not move as rows do."""
        self._training = TrainingKernels(launcher)
        self._consent = consent
        self._words = WordKernels(launcher)
        self._slot_rows = spec.num_slot_rows(transport.num_ranks)
        self._planner = Planner(arena, launcher, rank=transport.rank, buffer_id=buffer_id, has_pairs=self.has_pairs)
        self._device = transport.device
        self.overflows: list[tuple[int, CapacityError]] = self._planner.overflows
        self.fused = FusedCalls(arena, launcher, self._planner, consent) if self.launch.is_fused else None
        self._is_narrow = isinstance(spec.wire, Fp8)
        self._is_aligned = isinstance(spec.layout, Expanded) and spec.layout.alignment > 1
        self.num_tokens_per_expert = launcher.tokens
        self._masked: tuple[int, ...] = ()

    @property
    def wait_s(self) -> Tensor:
        """See Backend."""
        return self._on.waits_ns.double() / 1e9

    def dispatch(self, call: Call, batch: Batch, routing: Tensor | Plan) -> Steps[Outcome[Arrived]]:
        """See Backend."""
        if isinstance(routing, Tensor) and not (self.fused is not None and self.fused.takes_dispatch(batch, routing)):
            routing = routing.clone()  # on the caller's stream, and so before ours is ordered behind it
        self._order(call)
        return self._dispatch(call, batch, routing)

    def _dispatch(self, call: Call, batch: Batch, routing: Tensor | Plan) -> Steps[Outcome[Arrived]]:
        if self.fused is not None and self.fused.takes_dispatch(batch, routing):
            assert isinstance(routing, Tensor)
            plan: DevicePlan = yield from self.fused.dispatch(call, batch, routing)
        else:
            plan = yield from self._send(call, batch, routing)
        plan, read_metadata = self._take(plan, batch, call.word.slot, self._num_rows(plan, call))
        event = self._event(call)
        if call.row_count == "exact" and plan.host_counts is not None:
            yield from self._consent.until(plan.host_counts.event, "begin this dispatch")
            if (failure := self._consent.failure()) is not None:
                raise failure
            plan = self._planner.told(plan)
        return Outcome(Arrived(plan, self._num_rows(plan, call), read_metadata), event)

    def _num_rows(self, plan: DevicePlan, call: Call) -> int:
        """Rows to look at: as many as came, where that is asked for and known."""
        return self._slot_rows if call.row_count == "capacity" or plan.num_rows is None else plan.num_rows

    def _send(self, call: Call, batch: Batch, routing: Tensor | Plan) -> Steps[DevicePlan]:
        """Everybody's rows on their way, until they are in place."""
        yield from self._begin(call)
        if isinstance(routing, Plan):
            plan = _of_device(routing)
            self._words.begin_call(call.word.payload(), None)
        else:
            plan = self._planner.count(routing, stamp=call.sequence)
            self._consent.remembers(plan)
            self._words.begin_call(call.word.payload(), plan)
            self._planner.place(plan)
            self._planner.placed(plan, call.sequence, call.row_count)
        self._push_rows(plan, batch)
        tokens = None if batch.unquantized else plan.num_tokens_per_expert
        self._words.finish_call(posts=True, awaits_all=True, tokens=tokens)
        return plan

    def combine(
        self,
        call: Call,
        plan: Plan,
        y: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
        extras: tuple[Tensor, ...] | None,
    ) -> Steps[Outcome[Tensor | tuple[Tensor, tuple[Tensor, ...]]]]:
        """See Backend."""
        self._order(call)
        return self._combine(call, _of_device(plan), y, weights, bias, extras)

    def _combine(
        self,
        call: Call,
        plan: DevicePlan,
        y: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
        extras: tuple[Tensor, ...] | None,
    ) -> Steps[Outcome[Tensor | tuple[Tensor, tuple[Tensor, ...]]]]:
        is_pushed, sums_here = call.word.output_slot == PUSHED, self._arena.spec.reduce == "rank"
        if self.fused is not None and not is_pushed and extras is None:
            out = yield from self.fused.combine(call, plan, weights, bias)
            return Outcome(out, self._event(call))
        yield from self._begin(call)
        self._words.begin_call(call.word.payload(), None)
        if is_pushed or extras:
            self._push_outputs(plan, y if is_pushed else None, extras or (), weights if sums_here else None)
        self._words.finish_call(posts=bool(is_pushed or extras), awaits_all=bool(extras))
        out = self._sum_rows(plan, None if sums_here else weights, bias, call.word.slot)
        self._words.check_call()
        if extras is None:
            return Outcome(out, self._event(call))
        return Outcome((out, self._returned_extras(plan, extras, call.word.slot)), self._event(call))

    def return_extras(self, call: Call, plan: Plan, extras: tuple[Tensor, ...]) -> Steps[Outcome[tuple[Tensor, ...]]]:
        """See Backend."""
        self._order(call)
        return self._return_extras(call, _of_device(plan), extras)

    def _return_extras(
        self, call: Call, plan: DevicePlan, extras: tuple[Tensor, ...]
    ) -> Steps[Outcome[tuple[Tensor, ...]]]:
        yield from self._begin(call)
        self._words.begin_call(call.word.payload(), None)
        self._push_outputs(plan, None, extras, None)
        self._words.finish_call(posts=True, awaits_all=True)
        return Outcome(self._returned_extras(plan, extras, call.word.slot), self._event(call))

    def _order(self, call: Call) -> None:
        """A call that is issued later, maybe from another stream, comes after what the caller has issued by now."""
        if not call.is_first:
            self._on.enter()

    def _begin(self, call: Call) -> Steps[None]:
        """Done when nothing is in the way of a kernel that waits for peers, and its stream has been ordered."""
        if not call.is_first:
            yield Missing((), "come to its turn")
        yield from self._consent.opening(call.sequence)
        self._on.enter()
        self._on.use_sms(call.num_sms, self.launch)

    def remake_plan(self, tensors: PlanTensors) -> DevicePlan:
        """See Backend. Where ranks are masked, the host asks the device whether the plan has rows of theirs."""
        self._on.enter()
        if self._masked:
            if torch.cuda.is_current_stream_capturing():
                raise ConfigError(
                    f"a CUDA graph is being captured, and whether a plan is older than the mask of "
                    f"{listed(self._masked)} has to be asked the device; capture calls on recv.plan of a plain dispatch"
                )
            num_local = self._arena.spec.num_local_experts(self._transport.num_ranks)
            with self._on_stream():
                if has_rows_of(tensors.counts, self._masked, num_local=num_local):
                    raise made_before(self._masked)
        return self._planner.remake(tensors)

    def as_remade(self, plan: Plan, tensors: PlanTensors) -> DevicePlan:
        """See Backend. What came with the rows has been read: that found out where they are from."""
        return self._planner.as_remade(_of_device(plan), tensors)

    def own_rows(self, rows: Tensor | Quantized, src_idx: Tensor | None) -> Tensor:
        """See Backend."""
        return self._training.own_rows(rows, src_idx)

    def weigh_gradients(self, grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor) -> tuple[Tensor, Tensor]:
        """See Backend."""
        return self._training.weigh_gradients(grads, y, weights, src_idx)

    def _push_rows(self, plan: DevicePlan, batch: Batch) -> None:
        """Writes each row, and what travels with it, into its final place."""
        self._push(plan, batch)
        if plan.src_idx is None and plan.pairs is not None:
            self._planner.find_src_rows(plan, plan.pairs)
        if _has_metadata(plan, batch):
            extras = None
            if batch.extras:
                extras = self._packed(batch.extras, self._arena.metadata_bytes - self._arena.extras_offset)
            weights = None if batch.weights is None else self._on.dense(batch.weights)
            self._kernels.push_metadata(plan.topk_idx, weights, extras, plan.rows)
        if plan.pairs is not None and plan.partial_rows is None:
            self._kernels.push_partial_rows(plan.rows, plan.pairs)

    def _take(
        self, plan: DevicePlan, batch: Batch, slot: int, num_rows: int
    ) -> tuple[DevicePlan, Callable[[], Metadata]]:
        """What to do with rows that are in place, and how to read what travelled with them."""
        kernels, region = self._kernels, self._arena.region_of_rows(unquantized=batch.unquantized)
        has_scale = self._is_narrow and region == "data"
        partial_rows = plan.partial_rows
        if plan.pairs is not None and partial_rows is None:
            partial_rows = self._empty(plan.pairs.num_slots, self._arena.spec.num_topk, dtype=torch.int32)
            with self._on_stream():
                partial_rows.copy_(self._on.view("partial_rows", slot))
            plan = replace(plan, partial_rows=partial_rows)
        if self.launch.expand == "receiver" and (way := self._way(plan, batch)).is_staged:
            kernels.expand_rows(slot, "data", plan, offset=0)
            if has_scale and self._scale_kernels is not None:
                self._scale_kernels.expand_scales(slot, plan, offset=way.scale_offset)
            elif has_scale:
                kernels.expand_rows(slot, "scale", plan, offset=way.scale_offset)
        if self._is_aligned:
            kernels.zero_gaps(slot, region, plan)
            if has_scale and self._scale_kernels is not None:
                self._scale_kernels.zero_gaps(slot, plan)
            elif has_scale:
                kernels.zero_gaps(slot, "scale", plan)
        return self._metadata_of(plan, batch, slot, num_rows)

    def _push_outputs(
        self, plan: DevicePlan, y: Tensor | None, extras: Sequence[Tensor], weights: Tensor | None
    ) -> None:
        """Writes outputs y [R, H] (or their sums, weighted by [R]) and extras [R, ...] to their owners."""
        kernels = self._kernels
        if plan.src_idx is None:  # of a whole call: so far nobody has had to know
            self._planner.find_src_rows(plan, plan.rows)
        if y is not None:
            y = rowwise(y, self._on)
            if plan.sums_pairs or weights is not None:
                kernels.push_sums(y, plan, None if weights is None else self._on.dense(weights))
            else:
                row_bytes = self._arena.spec.hidden * y.element_size()
                kernels.return_rows_to(y, plan, plan.rows, "returned", row_bytes)
        if extras:
            packed = self._packed(extras, self._arena.return_bytes)
            kernels.return_rows_to(packed, plan, plan.rows, "returned_extras", self._arena.return_bytes)

    def _sum_rows(self, plan: DevicePlan, weights: Tensor | None, bias: Tensor | None, return_slot: int) -> Tensor:
        """The sum of each token's rows, from the peers' output slots or, if pushed, from this rank's returned rows."""
        spec = self._arena.spec
        out = self._empty(plan.num_tokens, spec.hidden, dtype=spec.combine_dtype)
        if weights is not None:
            weights = self._on.dense(weights)
            if not spec.layout.per_pick:
                of_picks, weights = weights, self._ours(*plan.rows.dst_rows.shape, dtype=torch.float32)
                self._kernels.weigh_rows(plan.topk_idx, of_picks, plan.rows, weights)
        self._kernels.sum_rows(out, plan, weights, None if bias is None else self._on.dense(bias), return_slot)
        return out

    def _returned_extras(self, plan: DevicePlan, extras: Sequence[Tensor], return_slot: int) -> tuple[Tensor, ...]:
        """Extras that came back."""
        table, per_pick = plan.rows, self._arena.spec.layout.per_pick
        num_tokens, num_columns = table.return_rows.shape
        lead = (num_tokens, num_columns) if per_pick else (num_tokens,)
        results = [self._empty(*lead, *extra.shape[1:], dtype=torch.float32) for extra in extras]
        at = 0
        with self._on_stream():
            home = self._on.view("returned_extras", return_slot)
            is_row = (table.dst_rows >= 0).unsqueeze(-1)  # [T, J, 1]
            return_rows = table.return_rows.clamp(min=0).long()
            for extra, result in zip(extras, results, strict=True):
                num_bytes = math.prod(extra.shape[1:]) * extra.element_size()
                sent = home[:, at : at + num_bytes].contiguous().view(torch.float32)  # [Q, values]
                at += num_bytes
                values = sent[return_rows].masked_fill_(~is_row, 0.0)  # [T, J, values]
                if per_pick:
                    result.copy_(values.view_as(result))
                    continue
                total = torch.zeros_like(values[:, 0])
                for j in range(num_columns):
                    total += values[:, j]
                result.copy_(total.view_as(result))
        return tuple(results)

    def _on_stream(self) -> AbstractContextManager[object]:
        """Torch operations within come after what has been issued, and before what follows."""
        return torch.cuda.stream(self._on.stream)

    def _event(self, call: Call) -> torch.cuda.Event | None:
        """The end of what has been issued; None for calls on the caller's stream, which is the one that would wait."""
        if call.at_once and self.launch.is_fused:
            return None
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._on.stream)
        return event

    def mask(self, ranks: tuple[int, ...]) -> None:
        """See Backend."""
        self._masked = ranks
        with self._on_stream():
            self._planner.mask(ranks)
        self.synchronize()

    def check_capture(self, *, asks_host: bool) -> None:
        """See Backend."""
        if (asks_host or self.launch.mover == "copy") and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                "a CUDA graph is being captured, and this call asks the host (a dispatch how many rows came, or where "
                "blocks of mover='copy' go; a mask who is gone); leave mask() out, and for a dispatch pass "
                "rows='capacity', or recv.plan of an earlier dispatch, with mover='kernel'"
            )

    def synchronize(self) -> None:
        """See Backend."""
        self._on.synchronize()
        self._planner.look_at_all_host_counts()

    def warm_up(self) -> None:
        """Does every kind of call on no rows, so that kernels are compiled and loaded. Only while calls are void.

        A kernel that is loaded in the middle of a call can wait for a peer's kernel that waits for this rank.
        """
        spec = self._arena.spec
        plans: list[DevicePlan] = []
        picks = torch.full((1, spec.num_topk), -1, device=self._device)
        weights = torch.zeros(1, spec.num_topk, device=self._device)
        wide = torch.zeros(1, spec.hidden, dtype=spec.combine_dtype, device=self._device)
        x: Tensor | Quantized = wide.to(spec.wire.dtype)
        if isinstance(spec.wire, Fp8):
            x = spec.wire.quantize(wide)
        kinds: list[Tensor | Quantized] = [x] if isinstance(x, Tensor) else [x, wide]
        calls = [
            Batch(x=x, weights=None, extras=()),
            Batch(x=x if isinstance(x, Tensor) else wide, weights=weights, extras=()),
            Batch(x=wide, weights=weights, extras=(), unquantized=True),
        ]
        if spec.extra_bytes:
            extras = (torch.zeros(1, spec.extra_bytes, dtype=torch.uint8, device=self._device),)
            calls += [Batch(x=x, weights=given, extras=extras) for given in (None, weights)]
        with self._on_stream():
            if self.fused is not None:
                for given_x, given in itertools.product(kinds, (None, weights)):
                    batch = Batch(x=given_x, weights=given, extras=())
                    begun = self.fused.warm_up(batch, picks)
                    self._unpack(begun, batch, 0, 1)
                self._planner.find_src_rows(begun, begun.rows)
            for batch in calls:
                plan = self._planner.count(picks, stamp=0)
                self._words.begin_call(0, plan)
                self._planner.place(plan)
                self._push_rows(plan, batch)
                plans.append(self._take(plan, batch, 0, 1)[0])
            self._words.begin_call(0, None)
            for posts, awaits_all in ((True, True), (True, False), (False, False)):
                self._words.finish_call(posts=posts, awaits_all=awaits_all)
            self._words.finish_call(posts=True, awaits_all=True, tokens=plan.num_tokens_per_expert)
            self._words.check_call()
            plan = plans[0]
            for batch in calls:
                self._push_rows(plan, batch)
                self._take(plan, batch, 0, 1)
            row_weights = torch.zeros(1, device=self._device) if spec.reduce == "rank" else None
            for given in (None, row_weights):
                self._push_outputs(plan, wide, (weights[:, :1],), given)
            for given in (None, None if spec.reduce == "rank" else weights):
                for bias in (None, wide, wide.float()):
                    self._sum_rows(plan, given, bias, 0)
                    if self.fused is not None:
                        self.fused.warm_up_sums(plan, given, bias)
            self._training.warm_up()
        self.synchronize()

    def _push(self, plan: DevicePlan, batch: Batch) -> None:
        """Rows alone, by kernels or by copies of whole blocks."""
        if self.launch.mover == "copy":
            self._push_blocks(plan, batch)
            return
        way, x = self._way(plan, batch), batch.x
        if isinstance(x, Tensor) and self._is_narrow and not batch.unquantized:
            self._kernels.push_cast(rowwise(x, self._on), way.table, staged=way.is_staged)
            return
        data, scale = x if isinstance(x, Quantized) else (x, None)
        self._kernels.push_rows(rowwise(data, self._on), way.table, way.region, row_bytes=way.row_bytes)
        if scale is not None and self._scale_kernels is not None and not way.is_staged:
            self._scale_kernels.push_scales(scale, way.table)
        elif scale is not None:
            scale, region = rowwise(scale, self._on), way.region if way.is_staged else "scale"
            self._kernels.push_rows(scale, way.table, region, offset=way.scale_offset, row_bytes=way.row_bytes)

    def _way(self, plan: DevicePlan, batch: Batch) -> _Way:
        """By which table rows go, and where they land."""
        region, spec = self._arena.region_of_rows(unquantized=batch.unquantized), self._arena.spec
        if self.launch.expand == "receiver" and region == "data":
            assert plan.pairs is not None
            out_bytes = spec.hidden * spec.combine_dtype.itemsize
            offset = spec.hidden * spec.wire.dtype.itemsize
            return _Way(plan.pairs, "outputs", is_staged=True, row_bytes=out_bytes, scale_offset=offset)
        return _Way(plan.rows, region, is_staged=False, row_bytes=None, scale_offset=0)

    def _push_blocks(self, plan: DevicePlan, batch: Batch) -> None:
        """Packs rows in this rank's sending order, and copies the block of each peer as a whole.

        Blocks of scales that arrive column-major have gaps there, and so are copied by a kernel of torch's.
        """
        spec, rank, region = (
            self._arena.spec,
            self._transport.rank,
            self._arena.region_of_rows(unquantized=batch.unquantized),
        )
        x = batch.x
        if isinstance(x, Tensor) and isinstance(spec.wire, Fp8) and not batch.unquantized:
            with self._on_stream():
                x = spec.wire.quantize(x)
        parts = [(x.data, region), (x.scale, "scale")] if isinstance(x, Quantized) else [(x, region)]
        with self._on_stream():  # the host waits for the words
            seen = self._on.call[: self._transport.num_ranks].tolist()
            counts = plan.counts[:, spec.num_experts :].cpu()  # [P, P] rows
        if self._consent.failure() is not None or not bool(counts.any()):
            return
        starts = counts.cumsum(1)[rank] - counts[rank]
        there = (counts.cumsum(0) - counts)[rank]
        for rows, name in parts:
            packed = self._pack(rows, plan.rows, num_rows=int(counts[rank].sum()))
            for step in range(self._transport.num_ranks):
                peer = (rank + 1 + step) % self._transport.num_ranks
                num_rows, first = int(counts[rank, peer]), int(starts[peer])
                if num_rows:
                    slot = self._arena.view(self._transport.views[peer], name)[Word.of(seen[peer]).slot]
                    source, at = packed[first : first + num_rows], int(there[peer])
                    if name == "scale":
                        source = as_integers(source)
                        target = as_integers(self._arena.scales.of_block(slot, slice(at, at + num_rows)))
                    else:
                        source, target = source.view(torch.uint8), slot[at : at + num_rows].view(torch.uint8)
                    target.copy_(source, non_blocking=True)

    def _pack(self, rows: Tensor, table: Table, *, num_rows: int) -> Tensor:
        packed = self._ours(num_rows, *rows.shape[1:], dtype=rows.dtype)
        self._kernels.pack_rows(rowwise(rows, self._on), table, packed)
        return packed

    def _metadata_of(
        self, plan: DevicePlan, batch: Batch, slot: int, num_rows: int
    ) -> tuple[DevicePlan, Callable[[], Metadata]]:
        """The small things of a slot, and the plan with what it keeps of them; of whole calls when asked for."""
        if plan.is_fused and plan.src_idx is None and not batch.extras:
            is_captured = torch.cuda.is_current_stream_capturing()

            def read() -> Metadata:
                if torch.cuda.is_current_stream_capturing() != is_captured:
                    raise ConfigError(
                        "what came with these rows is read when it is asked for: of a dispatch in a CUDA graph ask "
                        "within the capture, of any other outside of it"
                    )
                self._on.enter()
                return self._unpack(plan, batch, slot, num_rows)[1]

            return plan, read
        weights: Tensor | None = None
        extras: tuple[Tensor, ...] = ()
        if _has_metadata(plan, batch):
            plan, small = self._unpack(plan, batch, slot, num_rows)
            weights, extras = small.weights, small.extras
        assert plan.src_idx is not None
        src_idx = self._up_to(plan.src_idx, num_rows)
        topk_idx = None if plan.local_idx is None else self._up_to(plan.local_idx, num_rows)
        small = Metadata(src_idx=src_idx, topk_idx=topk_idx, weights=weights, extras=extras)
        return plan, lambda: small

    def _unpack(self, plan: DevicePlan, batch: Batch, slot: int, num_rows: int) -> tuple[DevicePlan, Metadata]:
        """The small things out of the records, and the plan with sources and ids."""
        spec = self._arena.spec
        per_row = () if spec.layout.per_pick else (spec.num_topk,)
        src_idx = self._empty(num_rows, dtype=torch.int32)
        local_idx = self._empty(num_rows, spec.num_topk, dtype=torch.int32) if per_row else None
        weights = None if batch.weights is None else self._empty(num_rows, *per_row, dtype=torch.float32)
        extras = tuple(self._empty(num_rows, *extra.shape[1:], dtype=extra.dtype) for extra in batch.extras)
        self._kernels.unpack_metadata(slot, plan, src_idx, local_idx, weights)
        at, record = self._arena.extras_offset, self._on.view("metadata", slot)[:num_rows]
        for extra in extras:
            raw = _raw(extra)
            with self._on_stream():
                part = record[:, at : at + raw.shape[1]]
                raw.copy_(part.masked_fill(plan.rows.src_rows[:num_rows, None] < 0, 0))
            at += raw.shape[1]
        small = Metadata(src_idx=src_idx, topk_idx=local_idx, weights=weights, extras=extras)
        return replace(plan, src_idx=src_idx, local_idx=local_idx), small

    def _up_to(self, rows: Tensor, num_rows: int) -> Tensor:
        """As many rows as are asked for; where a plan knows of fewer, the rest are none."""
        if rows.shape[0] >= num_rows:
            return rows[:num_rows]
        more = rows.new_full((num_rows - rows.shape[0], *rows.shape[1:]), -1)
        return torch.cat([rows, more])

    def _packed(self, extras: Sequence[Tensor], num_bytes: int) -> Tensor:
        """Extras ``[n, ...]`` side by side, int32 ``[n, words]``, zeros behind them."""
        with self._on_stream():
            raw = torch.cat([_raw(extra.contiguous()) for extra in extras], dim=1)
            packed = torch.zeros(raw.shape[0], num_bytes, dtype=torch.uint8, device=self._device)
            packed[:, : raw.shape[1]].copy_(raw)
            return packed.view(torch.int32)

    def _ours(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory for our stream alone."""
        with self._on_stream():
            return self._empty(*shape, dtype=dtype)

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._on.empty(*shape, dtype=dtype)


class _Way(NamedTuple):
    table: Table
    region: str
    is_staged: bool
    """Whether rows are copied from there to where they belong."""
    row_bytes: int | None
    """Between rows there; None: those of a row."""
    scale_offset: int
    """Of a row's scales behind its first byte, where they land with it."""


class Parts(NamedTuple):
    """A rank's backend, and the consent that shares its stream."""

    backend: CudaBackend
    consent: DeviceConsent


def connect(
    transport: DeviceTransport,
    arena: Arena,
    launch_options: LaunchOptions,
    *,
    buffer_id: int,
    timeout_s: float,
    ranks_on_gpus: Sequence[int] | None = None,
) -> Parts:
    """The parts of a rank whose peers' memory is mapped. Local. Compiles and loads the kernels.

    Args:
        ranks_on_gpus: how many ranks share the GPU of each rank, by rank, gathered from all; None: as many as here.
    """
    device = torch.cuda.get_device_properties(transport.device)
    visible = device.multi_processor_count // (transport.ranks_here if transport.shares_sms else 1)
    can_launch_early = torch.version.hip is None and device.major >= 9
    config = decide(
        arena.spec,
        agreed_topology(arena.topology, ranks_on_gpus or [transport.ranks_here] * transport.num_ranks),
        launch_options,
        visible_sms=visible,
        ranks_here=transport.ranks_here,
        can_launch_early=can_launch_early,
    )
    launcher = Launcher(arena, transport, config, timeout_s=timeout_s)
    consent = DeviceConsent(transport, launcher, ring=arena.ring, num_experts=arena.spec.num_experts)
    backend = CudaBackend(arena, transport, launcher, consent, buffer_id=buffer_id)
    with launcher.all_void():
        if config.mover == "kernel":  # else the host asks what kernels have found
            with launcher.compiling():
                backend.warm_up()
        backend.warm_up()
    return Parts(backend, consent)


def _of_device(plan: Plan) -> DevicePlan:
    assert isinstance(plan, DevicePlan), "the plan of another backend"
    return plan


def _has_metadata(plan: DevicePlan, batch: Batch) -> bool:
    """Whether something travels beside rows: what a plan does not know yet, or what changes from call to call."""
    return plan.src_idx is None or batch.weights is not None or bool(batch.extras)


def _raw(extra: Tensor) -> Tensor:
    """A contiguous ``[n, ...]`` as uint8 ``[n, bytes]``; the same memory."""
    return extra.view(extra.shape[0], math.prod(extra.shape[1:])).view(torch.uint8)
