"""The three verbs over two hops, on CPUs: rows cross the rail once per node, and go on from there to their ranks.

A dispatch, as a rank runs it; its rail peers and its mates do the same::

    word to mates, note to rail peers (word, counts for their node)     rows, while there is leave (``Outbound``)
    words of mates and rail peers                                       rows
    counts of this rank and of its rail peers into mates' tables        rows
    all mates' counts: ``incoming`` gives every row its final place     need to rail peers, if rows may not fit
    own rows, and rows that have come, into mates' slots                rows, and leave for more
    "arrived" to mates; arrived of mates, needs of rail peers

A combine goes the same way back: each rank sums what its node has for its rail peers, and then what all nodes have for
its own tokens. Letters: T tokens here, K top-k, H hidden, R rows received, P ranks, W counts of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
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
from crossdock.backends.cpu.arrived import copy_rows, widths_of
from crossdock.backends.cpu.mapped import Mapped
from crossdock.backends.nodes.chunks import ChunkFormat, check_row
from crossdock.backends.nodes.consent import NodesConsent
from crossdock.backends.nodes.offers import Home, Offers, Sums
from crossdock.backends.nodes.outbound import Inbound, Outbound
from crossdock.backends.nodes.places import (
    Incoming,
    Ints,
    Sent,
    incoming,
    needed_rows,
    place_dtype,
    places_to,
    what_is_sent,
)
from crossdock.backends.nodes.plan import NodePlan, made, rail_finals
from crossdock.backends.nodes.rows import NodeRows, Rows
from crossdock.backends.nodes.tables import Tables
from crossdock.backends.nodes.timed import TimedInbound, TimedMates, TimedOutbound
from crossdock.backends.training import own_rows, weigh_gradients
from crossdock.consent import PUSHED, Kind, Missing, Steps, Word
from crossdock.errors import CapacityError, ConfigError
from crossdock.extent import Extent
from crossdock.layout import Padded
from crossdock.masks import made_before
from crossdock.plan import Plan, overflow
from crossdock.transport.nodes import NodesTransport
from crossdock.wire import Quantized

Result = TypeVar("Result")
_REMADE = 1
"""The stamp of plans that were made again: no dispatch has that number."""


class NodesBackend:
    """The Backend protocol over nodes whose ranks map each other's memory, and a rail between them."""

    def __init__(
        self,
        transport: NodesTransport,
        consent: NodesConsent,
        arena: Arena,
        launch_options: LaunchOptions,
        *,
        buffer_id: int,
    ) -> None:
        self._spec, self._topology = arena.spec, arena.topology
        num_ranks = self._topology.num_ranks
        self.launch: Launch | None = None
        self.tells_tokens = False
        self.signs_plans = True
        self.has_pairs = True
        self.overflows: list[tuple[int, CapacityError]] = []
        self.wait_s = torch.zeros(num_ranks, dtype=torch.float64, device="cpu")
        num_local = self._spec.num_local_experts(num_ranks)
        self.num_tokens_per_expert = torch.zeros(num_local, dtype=torch.int64, device="cpu")
        self._arena = arena
        self._transport = transport
        self._consent = consent
        self._buffer_id = buffer_id
        mapped = Mapped(arena, transport.host.segments)
        self._rows, self._offers = NodeRows(arena, transport, mapped), Offers(arena, transport, mapped)
        self._tables = Tables(arena, transport)
        self._slot_rows = self._spec.num_slot_rows(num_ranks)
        self._num_blocks = transport.node_size * (num_local if self._spec.layout.per_pick else 1)
        self._place_dtype = place_dtype(self._spec, self._num_blocks)
        self._masked: tuple[int, ...] = ()
        self._outbound: Callable[..., Outbound] = Outbound
        self._inbound: Callable[..., Inbound] = Inbound
        self._need = 0, (0, 0)
        """The last call of which this rank knows whether its node has room, and what it has told rail peers."""
        check_row(self._spec, arena, transport.box)

    stream: None = None

    def use_stream(self, stream: object) -> None:
        """See Backend."""
        raise ConfigError(f"buffer.stream was set to a {type(stream).__name__}; there are none on CPUs: leave it")

    def wait_for(self, event: Event, *, at_once: bool) -> None:
        """See Backend."""
        raise ConfigError(f"after is a {type(event).__name__}; on CPUs the host does the work of a call: pass None")

    def dispatch(self, call: Call, batch: Batch, routing: Tensor | Plan) -> Steps[Outcome[Arrived]]:
        """See Backend."""
        if isinstance(routing, Plan):
            plan = _of_nodes(routing)
            is_posted = self._post(call, None, may_wait=False)
            return self._cached_dispatch(call, batch, plan, is_posted=is_posted)
        topk_idx = routing.clone()
        sent = what_is_sent(self._spec, self._topology, topk_idx.numpy())
        is_posted = self._post(call, sent, may_wait=False)
        return self._dispatch(call, batch, topk_idx, sent, is_posted=is_posted)

    def _dispatch(
        self, call: Call, batch: Batch, topk_idx: Tensor, sent: Sent, *, is_posted: bool
    ) -> Steps[Outcome[Arrived]]:
        yield from self._open(call, sent, is_posted=is_posted)
        extent = self._extent(call)
        rows = self._rows.of_tokens(batch, topk_idx, extent)
        places = [
            places_to(sent, node, num_blocks=self._num_blocks, dtype=self._place_dtype)
            for node in range(self._topology.num_nodes)
        ]
        chunk_format = self._rows.format_of(rows, places[0])

        def pack(node: int, start: int, stop: int, arrays: list[Tensor]) -> None:
            _pack_rows(rows, sent.tokens[node][start:stop], arrays)
            arrays[4].numpy()[:] = np.ascontiguousarray(places[node][start:stop]).view(np.uint8)

        num_sent = [tokens.size for tokens in sent.tokens]
        going = self._outbound(self._transport, call.sequence, num_sent, chunk_format, pack)
        words = yield from self._meanwhile(self._consent.words(call.sequence, call.word), going.push)
        counts = yield from self._node_counts(call, sent, going)
        arriving = incoming(extent.spec, self._topology, counts.numpy())
        own = arriving.final_rows(self._spec, self._slot_rows, self._transport.rank, places[self._transport.node])
        finals = {self._transport.node: own}
        if self._is_too_much(call, arriving):
            return (yield from self._void(call, batch, topk_idx))
        self._fan_out_own(batch, rows, sent, own, words, extent)
        coming = self._inbound(self._transport, call.sequence, self._tables.num_rail_rows(counts), chunk_format)
        came: dict[int, list[Ints]] = {node: [] for node in self._transport.lanes}
        slots = self._slots(words)

        def forward(node: int, _: int, arrays: list[Tensor]) -> None:
            source = self._transport.rail_peers[node]
            theirs = arrays[4].numpy().view(self._place_dtype).reshape(arrays[4].shape[0], -1)
            ends = arriving.final_rows(self._spec, self._slot_rows, source, theirs)
            came[node].append(ends)
            self._rows.fan_out(batch, Rows(*arrays[:4]), np.arange(ends.shape[0]), ends, slots, extent)

        yield from self._exchange(call, going, coming, forward)
        if self._overflow_of(call) is not None:
            return (yield from self._void(call, batch, topk_idx))
        none = np.empty((0, self._spec.num_topk), dtype=np.int64)
        finals |= {node: np.concatenate([none, *parts]) for node, parts in came.items()}
        by_node = tuple(finals.get(node, none) for node in range(self._topology.num_nodes))
        plan = self._plan(topk_idx, counts, sent, arriving, by_node, stamp=call.sequence, extent=extent)
        return (yield from self._land(call, batch, plan, words, is_fresh=True))

    def _cached_dispatch(self, call: Call, batch: Batch, plan: NodePlan, *, is_posted: bool) -> Steps[Outcome[Arrived]]:
        yield from self._open(call, None, is_posted=is_posted)
        rows = self._rows.of_tokens(batch, plan.topk_idx, plan.extent)
        chunk_format = self._rows.format_of(rows, None)

        def pack(node: int, start: int, stop: int, arrays: list[Tensor]) -> None:
            _pack_rows(rows, plan.sent.tokens[node][start:stop], arrays)

        num_sent = [tokens.size for tokens in plan.sent.tokens]
        going = self._outbound(self._transport, call.sequence, num_sent, chunk_format, pack)
        words = yield from self._meanwhile(self._consent.words(call.sequence, call.word), going.push)
        self._fan_out_own(batch, rows, plan.sent, plan.finals[self._transport.node], words, plan.extent)
        coming = self._inbound(self._transport, call.sequence, [len(final) for final in plan.finals], chunk_format)
        slots = self._slots(words)

        def forward(node: int, start: int, arrays: list[Tensor]) -> None:
            num_rows = arrays[0].shape[0]
            ends = plan.finals[node][start : start + num_rows]
            self._rows.fan_out(batch, Rows(*arrays[:4]), np.arange(num_rows), ends, slots, plan.extent)

        yield from self._exchange(call, going, coming, forward)
        return (yield from self._land(call, batch, plan, words, is_fresh=False))

    def _land(
        self, call: Call, batch: Batch, plan: NodePlan, words: Sequence[Word], *, is_fresh: bool
    ) -> Steps[Outcome[Arrived]]:
        """The end of a dispatch whose rows this rank has all passed on."""
        if is_fresh and plan.extent.may_overflow:
            yield from self._consent.all_needs(call.sequence)
            if self._overflow_of(call) is not None:  # mates may have found that before, and signal nothing
                return (yield from self._void(call, batch, plan.topk_idx))
        self._consent.signal(call.sequence)
        yield from self._consent.arrivals(call.sequence, words, from_all=True)
        if not batch.unquantized:
            self.num_tokens_per_expert += plan.num_tokens_per_expert
        if call.counters is not None and call.counters.num_tokens_per_expert is not None:
            call.counters.num_tokens_per_expert.add_(plan.num_tokens_per_expert)
        return self._arrived(call, batch, plan)

    def _arrived(self, call: Call, batch: Batch, plan: NodePlan) -> Outcome[Arrived]:
        num_rows = plan.extent.slot_rows if call.row_count == "capacity" else plan.num_rows
        metadata = self._rows.take(plan, batch, call.word.slot, num_rows)
        return Arrived(plan, num_rows, lambda: metadata), None

    def _void(self, call: Call, batch: Batch, topk_idx: Tensor) -> Steps[Outcome[Arrived]]:
        """The end of a dispatch in which a rank has no room: the same error on all ranks, or an empty plan."""
        yield from self._consent.all_needs(call.sequence)
        error = self._overflow_of(call)
        assert error is not None
        if call.row_count == "exact":
            raise error
        self.overflows.append((call.sequence, error))
        nothing = torch.full_like(topk_idx, -1)
        counts = torch.zeros(self._topology.num_ranks, self._tables.width, dtype=torch.int64, device="cpu")
        plan = self._plan_of(nothing, counts, stamp=call.sequence, partial_rows=None, extent=self._extent(call))
        return self._arrived(call, batch, plan)

    def _is_too_much(self, call: Call, arriving: Incoming) -> bool:
        """Whether a rank of this node has no room for what comes; rail peers are told, where that can be."""
        extent = self._extent(call)
        if not extent.may_overflow:
            return False
        needed, worst = needed_rows(self._spec, arriving)
        fits = needed <= extent.capacity
        per_node = self._num_blocks if isinstance(self._spec.layout, Padded) else self._transport.node_size
        need = (0, 0) if fits else (needed, self._transport.node * per_node + worst)
        self._need = call.sequence, need
        self._consent.tell_need(call.sequence, *need)
        return not fits

    def _overflow_of(self, call: Call) -> CapacityError | None:
        """The error of the needs that have come so far: of the rank that needs the most; None: all fit."""
        extent = self._extent(call)
        if not extent.may_overflow:
            return None
        own = [self._need[1]] if self._need[0] == call.sequence else []
        needs = [*own, *self._consent.needs(call.sequence).values()]
        needed, worst = max(needs, key=lambda each: (each[0], -each[1]), default=(0, 0))
        return overflow(extent.spec, self._topology, worst=worst, needed=needed) if needed else None

    def combine(
        self, call: Call, plan: Plan, given: Outputs
    ) -> Steps[Outcome[Tensor | tuple[Tensor, tuple[Tensor, ...]]]]:
        """See Backend."""
        is_posted = self._post(call, None, may_wait=False)
        return self._combine(call, _of_nodes(plan), given, is_posted=is_posted)

    def _combine(
        self, call: Call, plan: NodePlan, given: Outputs, *, is_posted: bool
    ) -> Steps[Outcome[Tensor | tuple[Tensor, tuple[Tensor, ...]]]]:
        y = given.y if call.word.output_slot == PUSHED else None
        home = yield from self._bring_home(call, plan, y, given, has_data=True, is_posted=is_posted)
        out = home.summed(given.bias, given.out)
        self._consent.check(call.sequence)
        if given.extras is None:
            return out, None
        return (out, home.extras_like(given.extras)), None

    def return_extras(self, call: Call, plan: Plan, extras: tuple[Tensor, ...]) -> Steps[Outcome[tuple[Tensor, ...]]]:
        """See Backend."""
        is_posted = self._post(call, None, may_wait=False)
        return self._return_extras(call, _of_nodes(plan), extras, is_posted=is_posted)

    def _return_extras(
        self, call: Call, plan: NodePlan, extras: tuple[Tensor, ...], *, is_posted: bool
    ) -> Steps[Outcome[tuple[Tensor, ...]]]:
        given = Outputs(torch.empty(0, dtype=torch.float32, device="cpu"), extras=extras)
        home = yield from self._bring_home(call, plan, None, given, has_data=False, is_posted=is_posted)
        return home.extras_like(extras), None

    def _bring_home(
        self, call: Call, plan: NodePlan, y: Tensor | None, given: Outputs, *, has_data: bool, is_posted: bool
    ) -> Steps[Home]:
        """Sums outputs on this node for its rail peers and for itself, and takes what other nodes have summed."""
        yield from self._open(call, None, is_posted=is_posted)
        extras = tuple(given.extras or ())
        self._offers.offer(call.sequence, y, given.weights, extras)
        self._consent.signal(call.sequence)
        words = yield from self._consent.words(call.sequence, call.word)
        yield from self._consent.arrivals(call.sequence, words, from_all=True)
        extra_bytes = sum(widths_of(extras))
        home = Home(self._arena, plan, has_data=has_data, extra_bytes=extra_bytes)
        row_bytes = self._arena.row_bytes if has_data else 0
        chunk_format = ChunkFormat((row_bytes, home.extras.shape[1]))

        def sum_into(node: int, rows: slice, out: Sums) -> None:
            self._offers.sums(
                call.sequence,
                plan.finals[node][rows],
                words,
                has_weights=given.weights is not None,
                extra_bytes=extra_bytes,
                out=out,
            )

        def pack(node: int, start: int, stop: int, arrays: list[Tensor]) -> None:
            data = arrays[0].view(self._spec.combine_dtype) if has_data else arrays[0]
            sum_into(node, slice(start, stop), Sums(data, arrays[1]))

        def take(node: int, start: int, arrays: list[Tensor]) -> None:
            stop = start + arrays[0].shape[0]
            there = home.of_node(node)
            there.extras[start:stop] = arrays[1]
            if has_data:
                there.data[start:stop] = arrays[0].view(self._spec.combine_dtype)

        going = self._outbound(
            self._transport, call.sequence, [len(final) for final in plan.finals], chunk_format, pack
        )
        num_home = [tokens.size for tokens in plan.sent.tokens]
        coming = self._inbound(self._transport, call.sequence, num_home, chunk_format)
        going.push()
        own = self._transport.node
        sum_into(own, slice(None), home.of_node(own))
        yield from self._exchange(call, going, coming, take)
        return home

    def _exchange(
        self,
        call: Call,
        going: Outbound,
        coming: Inbound,
        use: Callable[[int, int, list[Tensor]], None],
    ) -> Steps[None]:
        """Puts and takes chunks until all rows have been put and have come; or until some rank has no room."""
        while True:
            trouble = self._consent.trouble(call.sequence, [*coming.waiting, *going.waiting])
            self._transport.hear()
            going.push()
            has_any = coming.take(use)
            if not coming.waiting and not going.waiting:
                return
            if has_any:
                continue
            if trouble is not None:
                raise trouble
            if call.word.kind is Kind.DISPATCH and self._overflow_of(call) is not None:
                return
            if coming.waiting:
                yield Missing(coming.waiting, "send its rows of")
            else:
                yield Missing(going.waiting, "make room for rows of")

    def _post(self, call: Call, sent: Sent | None, *, may_wait: bool) -> bool:
        """Gives this rank's word, with the counts of a fresh dispatch; False: its turn has not come yet."""
        if not (may_wait or self._consent.may_post(call.sequence)):
            return False
        if sent is not None:
            for node, peer in self._transport.rail_peers.items():
                self._transport.attach(peer, sent.counts[node].tobytes())
        self._consent.post(call.sequence, call.word)
        return True

    def _open(self, call: Call, sent: Sent | None, *, is_posted: bool) -> Steps[None]:
        """The begin of a call's turn: its word is given, and what calls that failed have left in boxes is skipped."""
        if not is_posted:
            yield from self._consent.opening(call.sequence)
            self._post(call, sent, may_wait=True)
        for lane in self._transport.lanes.values():
            lane.next_of(call.sequence)
        self._transport.give_leave()

    def _meanwhile(self, steps: Steps[Result], push: Callable[[], None]) -> Steps[Result]:
        """The same steps; whenever they wait, rows go on."""
        while True:
            try:
                missing = next(steps)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            push()
            yield missing

    def _node_counts(self, call: Call, sent: Sent, going: Outbound) -> Steps[Tensor]:
        """What all ranks have told this node, int64 [P, W]."""
        entry = self._consent.entry(call.sequence)
        own = sent.counts[self._transport.node]
        told = {peer: self._transport.brought(entry, peer) for peer in self._transport.rail_peers.values()}
        self._tables.write(call.sequence, entry, own, told)
        self._consent.tell(call.sequence)
        yield from self._meanwhile(self._consent.told(call.sequence), going.push)
        return self._tables.read(call.sequence, entry)

    def _fan_out_own(
        self, batch: Batch, rows: Rows, sent: Sent, finals: Ints, words: Sequence[Word], extent: Extent
    ) -> None:
        """Rows to this rank's own node need no second hop."""
        self._rows.fan_out(batch, rows, sent.tokens[self._transport.node], finals, self._slots(words), extent)

    def _extent(self, call: Call) -> Extent:
        return call.extent or self._arena.extent

    def _slots(self, words: Sequence[Word]) -> list[int]:
        return [words[mate].slot for mate in self._transport.mates]

    def _plan(
        self,
        topk_idx: Tensor,
        counts: Tensor,
        sent: Sent,
        arriving: Incoming,
        finals: tuple[Ints, ...],
        *,
        stamp: int,
        extent: Extent,
    ) -> NodePlan:
        return made(
            self._arena,
            rank=self._transport.rank,
            extent=extent,
            topk_idx=topk_idx,
            counts=counts,
            sent=sent,
            arriving=arriving,
            finals=finals,
            stamp=stamp,
            buffer_id=self._buffer_id,
            masked=self._masked,
        )

    def _plan_of(
        self, topk_idx: Tensor, counts: Tensor, *, stamp: int, partial_rows: Tensor | None, extent: Extent
    ) -> NodePlan:
        """A plan from the tensors that decide it; without ``partial_rows`` nothing has come over the rail."""
        sent = what_is_sent(self._spec, self._topology, topk_idx.numpy())
        arriving = incoming(extent.spec, self._topology, counts.numpy())
        node = self._transport.node
        places = places_to(sent, node, num_blocks=self._num_blocks, dtype=self._place_dtype)
        own = arriving.final_rows(self._spec, self._slot_rows, self._transport.rank, places)
        if partial_rows is None:
            partial_rows = torch.empty(0, self._spec.num_topk, dtype=torch.int32, device="cpu")
        num_rows = np.array(self._tables.num_rail_rows(counts))
        finals = rail_finals(partial_rows, num_rows, node=node, own=own)
        return self._plan(topk_idx, counts, sent, arriving, finals, stamp=stamp, extent=extent)

    def remake_plan(self, tensors: PlanTensors) -> NodePlan:
        """See Backend. Nodes were told different counts, so all remade plans have the same stamp."""
        if self._masked and bool(tensors.counts[list(self._masked)].any()):
            raise made_before(self._masked)
        return self._plan_of(
            tensors.topk_idx,
            tensors.counts,
            stamp=_REMADE,
            partial_rows=tensors.partial_rows,
            extent=self._arena.extent,
        )

    def as_remade(self, plan: Plan, tensors: PlanTensors) -> NodePlan:
        """See Backend."""
        return self.remake_plan(tensors)

    def copy_rows(self, plan: Plan, rows: Tensor | Quantized, out: Tensor | Quantized) -> None:
        """See Backend."""
        copy_rows(self._arena, _of_nodes(plan), rows, out)

    def own_rows(self, rows: Tensor | Quantized, src_idx: Tensor | None) -> Tensor:
        """See Backend."""
        return own_rows(self._spec, rows, src_idx)

    def weigh_gradients(self, grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor) -> tuple[Tensor, Tensor]:
        """See Backend."""
        return weigh_gradients(grads, y, weights, src_idx)

    def mask(self, ranks: tuple[int, ...]) -> None:
        """See Backend."""
        self._masked = ranks

    def time_rows(self, times: RowTimes) -> bool:
        """See Backend."""
        self._rows.at = TimedMates(self._rows.at, self._transport.mates, times)
        self._outbound = partial(TimedOutbound, times)
        self._inbound = partial(TimedInbound, times)
        return True

    def lie_in(self, segment: Tensor | None) -> None:
        """See Backend. Not here: what hosts map stays mapped."""

    def check_capture(self, *, asks_host: bool) -> None:
        """See Backend."""

    def synchronize(self) -> None:
        """See Backend."""


def _pack_rows(rows: Rows, tokens: Ints, arrays: list[Tensor]) -> None:
    which = torch.from_numpy(tokens)
    for source, array in zip(rows, arrays[:4], strict=True):
        if array.numel():
            torch.index_select(source, 0, which, out=array)


def _of_nodes(plan: Plan) -> NodePlan:
    assert isinstance(plan, NodePlan), "the plan of another backend"
    return plan
