"""Dispatch and combine: the verbs. Buffer knows Spec, Plan, Transport and Backend, and nobody else does.

Letters: T tokens here, K top-k, H hidden, R rows received, L local experts, C capacity, P ranks.
"""

from __future__ import annotations

import functools
import itertools
import os
import zlib
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeVar, overload
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from crossdock import inputs
from crossdock.backends.base import Batch, Call, Counters, Event, LaunchOptions, Outputs, PlanTensors
from crossdock.connection import AnyGroup, Connection, Stats
from crossdock.consent import CALL_SIGNATURE_BITS, PUSHED, Kind, Word
from crossdock.errors import ConfigError
from crossdock.extent import Extent, RowCount
from crossdock.fields import is_integer
from crossdock.kinds import NUM_CALL_KINDS, CallKind, Kinds, key_of
from crossdock.layout import Padded
from crossdock.masks import drop_picks, listed
from crossdock.memo import PlanMemo
from crossdock.pending import Pending
from crossdock.plan import Plan, overflow
from crossdock.received import Received
from crossdock.routing import check_picks, picks_of_ranks
from crossdock.slots import ReceiveSlots
from crossdock.spec import Spec, Topology
from crossdock.transport.engines import AnyRail
from crossdock.wire import Quantized

__all__ = ["Buffer", "Stats"]

Self = TypeVar("Self", bound="Buffer")
_TIMEOUT_S = 100.0


_handles = itertools.count(1)
_by_handle: WeakValueDictionary[str, Buffer] = WeakValueDictionary()
"""The one state of this module: a ``torch.library`` op takes tensors, numbers and strings, so a buffer needs a name."""


class Buffer:
    """Expert-parallel dispatch and combine among the ranks of a group. Collective to make, local to close.

    All ranks issue the same calls in the same order. A call that fails on one rank (bad input, an exception that leaves
    the ``with`` block) raises there, and ``PeerFailed`` at once on the others; the next call works again.

    Args:
        group: a ``torch.distributed`` process group of one host or a 1-D ``DeviceMesh``, None for the default group, a
            ``ThreadGroup``, or any object with rank, size and an all-gather (``Group``): the Buffer makes a connection
            of its own. Or a ``Connection``: the Buffer lies over it, beside others, and is made without a word to the
            peers.
        spec: what travels, the same on all ranks.
        device: where rows are moved and tensors lie: ``"cpu"``, ``"cuda"`` (the current device) or ``"cuda:1"``; None:
            the current CUDA device when the process group has NCCL for it, else the CPU.
        num_sms: on CUDA, how many of the GPU's SMs the kernels that move rows may use; None: as many as the
            links can feed (``buffer.launch`` says). Calls may ask for another number.
        expand: on CUDA, who makes the copies of a row that several experts of a rank get (Expanded, Padded):
            ``"sender"`` (each copy crosses the link) or ``"receiver"`` (one does); None: the cheaper one by
            ``crossdock.cost``. The same bits.
        mover: on CUDA, ``"kernel"``, or ``"copy"``: rows are packed, and whole blocks go by copy engines (Compact).
        topology: of the ranks, such as ``Topology.grid(nodes=2, local=4)``; None: one scale-up domain of all. It says
            whose rows ``reduce="node"`` sums together.
        rail: how rows travel between nodes that share no memory, as for ``Connection``.
        timeout_s: how long a call waits for a peer before it raises ``PeerTimeout``; None: 100, or the connection's.
        exclusive: over a ``Connection``: lie apart from other Specs, so that calls in flight, and rows in slots, of
            both can overlap. Else Specs share bytes: a call of one finishes those of others that are in flight, and
            their rows are stale then.
        debug: fill receive slots with NaN before they are used again, so that stale views show; calls in flight are
            then finished before a dispatch begins.
        trace: a folder, in which each rank writes down what its calls do while they run, for ``crossdock trace``; None:
            that of the variable ``CROSSDOCK_TRACE``, if it is set. Ranks may trace or not, each for itself.

    Raises:
        ConfigError: the ranks brought different Specs or versions, or the Spec does not fit the group; on all ranks.
        TransportError: a rank could not allocate its segment (the message says what to do); on all ranks.

    >>> from crossdock import Expanded, Fp32, run_local
    >>> spec = Spec(num_experts=4, num_topk=2, hidden=2, max_tokens=2, wire=Fp32(), layout=Expanded())
    >>> def program(group):
    ...     x = torch.tensor([[1.0, 2.0]]) * (group.rank + 1)
    ...     with Buffer(group, spec) as buffer:
    ...         recv = buffer.dispatch(x, torch.tensor([[0, 3]]))
    ...         out = buffer.combine(10 * recv.x, recv.plan, weights=torch.tensor([[0.25, 0.75]]))
    ...     return out.tolist()
    >>> run_local(program, num_ranks=2)
    [[[10.0, 20.0]], [[20.0, 40.0]]]
    """

    def __init__(
        self,
        group: AnyGroup | Connection,
        spec: Spec,
        *,
        device: torch.device | str | None = None,
        num_sms: int | None = None,
        expand: Literal["sender", "receiver"] | None = None,
        mover: Literal["kernel", "copy"] = "kernel",
        topology: Topology | None = None,
        rail: AnyRail = "auto",
        timeout_s: float | None = None,
        exclusive: bool = False,
        debug: bool = False,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        options = LaunchOptions(num_sms=num_sms, expand=expand, mover=mover)
        self._owns_connection = not isinstance(group, Connection)
        if isinstance(group, Connection):
            _check_laying(group, spec, options, device, topology, None if rail == "auto" else rail, timeout_s, trace)
            connection = group
        else:
            limit = _TIMEOUT_S if timeout_s is None else timeout_s
            connection = Connection.of_spec(
                group, spec, options, device=device, topology=topology, rail=rail, timeout_s=limit, trace=trace
            )
        self.connection = connection
        self.spec = spec
        self.group, self.device, self.rank = connection.group, connection.device, connection.rank
        self.topology, self.order, self.masked = connection.topology, connection.order, connection.masked
        self.arena, self._share = connection.place(spec, exclusive=exclusive)
        self._is_apart, self._is_closed = exclusive, False
        agreed = (spec, options.expand, options.mover, self.arena.begin)
        self._signature = zlib.crc32(repr(agreed).encode())
        self._id = connection.number ^ self._signature  # plans of one Spec are good for all Buffers of it
        self._transport, self._consent, self._queue = connection.transport, connection.consent, connection.queue
        with (
            connection.all_or_none() if self._owns_connection else nullcontext(),  # no rank waits in a call for a
            torch.inference_mode(mode=False),  # peer that compiles; what is made here outlives the mode it is made in
            self._queue.turn,
        ):
            self._backend = connection.lay(self, self.arena, options, buffer_id=self._id)
            self._segment: Tensor | None = self._transport.segment
            self._slots = ReceiveSlots(self.arena, self._transport.segment)
        self._share.add(self._slots)
        self.launch = self._backend.launch
        """How kernels are launched, printable; None on CPUs."""
        self._memo = PlanMemo(spec)
        self._kinds: Kinds[CallKind] = Kinds(NUM_CALL_KINDS)
        self._debug = debug
        self._extents: dict[int | None, Extent] = {None: self.arena.extent, spec.max_tokens: self.arena.extent}
        """What calls use of a receive slot, by their M."""
        self._ranks_sum = spec.reduce == "rank"
        self._weighs_rows = spec.reduce != "token"
        """Whether a combine takes a weight of each row, or of each pick."""
        self._moves_blocks = mover == "copy"
        self._looks_at_picks = self.device.type == "cpu"
        """Whether the host does; on CUDA kernels do."""
        self._region_of_rows = [self.arena.region_of_rows(unquantized=unquantized) for unquantized in (False, True)]
        self._default_row_count: RowCount = "capacity" if isinstance(spec.layout, Padded) else "exact"
        self._num_combines = 0
        self.handle = f"crossdock.Buffer {next(_handles)}"  # a string, as torch.compile would make a number dynamic
        """This process's name for this buffer: what the ops of ``crossdock.autograd`` are given."""
        _by_handle[self.handle] = self

    def check(self) -> None:
        """Raises what has failed without being raised, once all that was issued is done: ``Connection.check``."""
        self._check_open()
        self.connection.check()

    def exchange_words(self, num_trips: int) -> None:
        """Gives a word to every rank and waits for everyone's, so many times: ``Connection.exchange_words``."""
        self._check_open()
        self.connection.exchange_words(num_trips)

    def abort(self, reason: str) -> None:
        """Gives up on this rank: every peer raises PeerFailed at once; ``Connection.abort``."""
        self._check_open()
        self.connection.abort(reason)

    def reset(self) -> None:
        """Forgets failures and overflows that were not raised yet. Local; ``Connection.reset``."""
        self._check_open()
        self.connection.reset()

    def restart(self) -> None:
        """Begins again together, whatever each rank has begun or caught before. Collective; ``Connection.restart``."""
        self._check_open()
        self.connection.restart()

    def mask(self, *ranks: int) -> None:
        """Goes on without ranks that are gone. Collective among all that are left; ``Connection.mask``."""
        self._check_open()
        self.connection.mask(*ranks)

    def close(self) -> None:
        """Ends its connection, if that is its own: ``Connection.close``. Else it only makes no more calls. Local."""
        if self._owns_connection:
            self.connection.close()
        elif not self._queue.turn.is_of_this_process:
            self._is_closed = True
        elif not self._is_closed:
            with self._queue.turn:
                self._queue.drain()
                if self._is_apart:
                    self._share.vacate(self._queue)
                    self.connection.leave(self.arena)
                self._is_closed = True

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.connection.give_up_by(error)
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed or self.connection.is_closed else "open"
        where = f"rank={self.rank}, num_ranks={self.topology.num_ranks}"
        return f"Buffer({where}, {self.arena.num_bytes:,} bytes, {state})"

    def synchronize(self) -> None:
        """Returns once all that was issued is done, on a device too."""
        self._backend.synchronize()

    def check_overflow(self) -> None:
        """Raises a CapacityError that was not raised yet, of a dispatch that has been waited for."""
        for found in self._backend.overflows:
            sequence, error = found
            if not self._queue.has_unwaited(sequence):  # or ranks would raise in different calls, as it was found
                self._backend.overflows.remove(found)
                raise error

    def forget_overflows(self) -> None:
        """Nobody raises them any more, of all that was issued."""
        self._backend.synchronize()
        self._backend.overflows.clear()

    def without(self, masked: tuple[int, ...]) -> None:
        """Goes on without these ranks; ``Connection.mask`` calls it."""
        self.masked = masked
        self._backend.mask(masked)
        self._memo.clear()
        self._kinds.clear()

    def lie_in(self, segment: Tensor | None) -> None:
        """Rows lie in that segment of this rank's from now on; None: in none. ``Connection`` calls it."""
        self._segment = segment
        self._slots.lie_in(segment)
        self._backend.lie_in(segment)

    def drop_masked(self, topk_idx: Tensor) -> Tensor:
        """The picks with -1 in place of masked ranks' experts; the verbs do that themselves.

        Graphs do not that were captured before a rank was masked: what they are given has to be free of such picks.
        """
        if not self.masked:
            return topk_idx
        return drop_picks(topk_idx, self.masked, num_local=self.spec.num_local_experts(self.topology.num_ranks))

    @property
    def stats(self) -> Stats:
        """What this rank has counted so far; waits are the connection's."""
        return Stats(
            num_tokens_per_expert=self._backend.num_tokens_per_expert.clone(),
            wait_s=torch.tensor(self._queue.wait_s, dtype=torch.float64, device="cpu") + self._backend.wait_s.cpu(),
        )

    def gather_stats(self) -> Stats:
        """Everybody's: tokens per expert int64 [E], and waits float64 [P, P] of each rank for each peer. Collective.

        Raises:
            ConfigError: a rank is masked, and the group that would gather them waits for it.
        """
        if self.masked:
            raise ConfigError(
                f"masked: {listed(self.masked)}; the group that gathers statistics would wait there: gather "
                f"buffer.stats in a group of the ranks that are left"
            )
        all_stats = self.connection.gather(self.stats)
        return Stats(
            num_tokens_per_expert=torch.cat([stats.num_tokens_per_expert for stats in all_stats]),
            wait_s=torch.stack([stats.wait_s for stats in all_stats]),
        )

    def _check_open(self) -> None:
        self.connection.check_open()
        if self._is_closed:
            raise ConfigError("the buffer is closed; make a new one")

    @staticmethod
    def of(handle: str) -> Buffer:
        """The buffer with that handle.

        Raises:
            ConfigError: there is none any more.
        """
        buffer = _by_handle.get(handle)
        if buffer is None:
            raise ConfigError(
                f"no buffer of this process has handle {handle!r}; keep the Buffer as long as its ops run"
            )
        return buffer

    def dispatch(
        self,
        x: Tensor | Quantized,
        routing: Tensor | Plan,
        *,
        weights: Tensor | None = None,
        extras: Sequence[Tensor] = (),
        rows: RowCount | None = None,
        max_tokens: int | None = None,
        unquantized: bool = False,
        copy: bool = False,
        num_sms: int | None = None,
        after: Event | None = None,
        counters: Counters | None = None,
    ) -> Received:
        """Sends each token to the ranks that hold its experts; gives what came here. Collective.

        Args:
            x: [T, H] rows in the wire's dtype, rows to be cast (narrow wires), or ``Quantized``; T may differ between
                ranks, and be 0.
            routing: ``topk_idx`` int64 or int32 [T, K], distinct experts, -1 for no pick; or the plan of an earlier
                dispatch, to send other rows the same way (no counts are exchanged). Compact rows may also go by ranks:
                bool [T, P], a row to each rank where it is True, K of them at most. Each counts as a pick of that
                rank's first expert, in the order of ranks.
            weights: float32 [T, K], which travel with the rows.
            extras: tensors [T, ...] of any dtype that travel with the rows; room for them is ``spec.extra_bytes``.
            rows: ``"exact"``: ``recv.x`` has as many rows as came, and an overflow raises at once (the default, but for
                Padded); ``"capacity"``: it has as many as the slot has room for, and an overflow gives zero counts and
                raises later: in ``check()``, or in the next call (on CUDA after 32 fresh dispatches, for the host does
                not wait). The same on all ranks.
            max_tokens: the most tokens that any rank passes to this call, at most the Spec's; None: the Spec's, or the
                plan's. The same on all ranks, and fixed in a graph. Rows then lie as those of a Spec with that M: with
                ``"capacity"``, and for Padded, ``recv.x`` is as much smaller, and ``recv.src_idx`` counts by it. A rank
                that brings more makes all ranks raise CapacityError, as rows that do not fit do.
            unquantized: x is in the combine format and travels as it is, whatever the wire, as gradients do. The rows
                lie where outputs are written (``recv.x`` is ``recv.output_rows()``) unless that is the wire's own
                format, or rows are staged by the layout; calls in flight are finished first. The same on all ranks.
            copy: give rows of their own, which no later dispatch overwrites. As many are copied as came, also where
                only the device knows how many; what ``recv.x`` has behind them is nobody's. Staged ones are their own
                without it.
            num_sms: for this call, in place of the buffer's.
            after: on CUDA, an event (``torch.cuda.Event``) that the call's work waits for, beside what the current
                stream has by now; the host does not wait.
            counters: tensors that the call adds to: tokens that came for each local expert, and waits for each rank.

        Raises:
            ConfigError: bad input here; the other ranks raise PeerFailed.
            CapacityError, PeerFailed, PeerTimeout, TransportError: see ``Pending.wait``.
        """
        with self._queue.turn:
            return self._start_dispatch(
                x, routing, weights, extras, rows, max_tokens, at_once=True, unquantized=unquantized, copy=copy,
                num_sms=num_sms, after=after, counters=counters,
            ).finished()  # fmt: skip

    def dispatch_start(
        self,
        x: Tensor | Quantized,
        routing: Tensor | Plan,
        *,
        weights: Tensor | None = None,
        extras: Sequence[Tensor] = (),
        rows: RowCount | None = None,
        max_tokens: int | None = None,
        unquantized: bool = False,
        copy: bool = False,
        num_sms: int | None = None,
        after: Event | None = None,
        counters: Counters | None = None,
    ) -> Pending[Received]:
        """``dispatch`` in two halves: begins it, and waits for nobody. At most ``spec.num_slots`` calls un-waited."""
        with self._queue.turn:
            return self._start_dispatch(
                x, routing, weights, extras, rows, max_tokens, at_once=False, unquantized=unquantized, copy=copy,
                num_sms=num_sms, after=after, counters=counters,
            )  # fmt: skip

    def _start_dispatch(  # noqa: PLR0912 - in one place: a function would be one more call of Python in each call
        self,
        x: Tensor | Quantized,
        routing: Tensor | Plan,
        weights: Tensor | None,
        extras: Sequence[Tensor],
        rows: RowCount | None,
        max_tokens: int | None,
        *,
        at_once: bool,
        unquantized: bool,
        copy: bool,
        num_sms: int | None,
        after: Event | None,
        counters: Counters | None,
    ) -> Pending[Received]:
        row_count, plan = rows or self._default_row_count, routing if isinstance(routing, Plan) else None
        if self._is_closed or self.connection.refusal is not None:
            self._check_open()
        self._queue.check_room(self._slots, self.spec.num_slots)
        asks_host = row_count == "exact" and plan is None
        if asks_host or self._moves_blocks:
            self._backend.check_capture(asks_host=asks_host)
        try:
            if self._share.user is not self._slots:
                self._share.take(self._slots, self._queue)
            if self._backend.overflows:
                self.check_overflow()
            batch = Batch(x, weights, tuple(extras), unquantized)
            key = key_of(
                ("dispatch", rows, max_tokens, unquantized, at_once, num_sms), (x, routing, weights, *batch.extras)
            )
            is_known = key in self._kinds and self._fits_dispatch(self._kinds[key], batch, routing, rows, max_tokens)
            kind = self._kinds[key] if is_known else self._vetted_dispatch(batch, routing, rows, max_tokens, num_sms)
            takes_as_given = kind.takes_picks_as_given and not (self._looks_at_picks or self.masked)
            if not (takes_as_given or isinstance(routing, Plan)):
                routing = self._picks(routing)
            if after is not None or counters is not None:
                self._take_beside(after, counters, at_once=at_once, brings_rows=True)
        except Exception as error:
            self._queue.refuse(error)
            raise
        if self._debug or self._region_of_rows[unquantized] == "outputs":
            self._queue.drain()  # or rows would be overwritten that a combine in flight still pulls
            self._queue.check_room(self._slots, self.spec.num_slots)
        slot = self._slots.take(self._queue)
        if self._debug and self._slots.is_settled:  # else peers may still pull what another Spec's call has left there
            self._slots.poison(slot, "data", "scale", "unquantized", "metadata")
        extent = kind.extent  # a plan has its own
        most = None if extent is self.arena.extent or extent is None else extent.max_tokens
        verb = Kind.CACHED_DISPATCH if plan else Kind.DISPATCH
        at = slot, PUSHED
        if at in kind.words:
            word = kind.words[at]
        else:
            agreed = row_count, most, unquantized, weights is None, _shapes(extras)
            word = self._word(kind, verb, slot, PUSHED, plan, agreed)
        is_first = not self._queue.running
        call = Call(self._consent.take(), word, row_count, at_once, is_first, num_sms, counters, extent, kind.launches)
        steps = self._backend.dispatch(call, batch, routing)

        copies = self._backend.copy_rows if copy else None
        finish = partial(self._slots.lend, slot=slot, unquantized=unquantized, copies=copies, poisons=self._debug)
        pending = self._queue.start(verb, call.sequence, steps, finish, (batch, routing), self._slots, counters)
        if not at_once:
            self._slots.fill(slot, pending)
        self._queue.drive()
        if key and not is_known:
            self._kinds.keep(key, kind)
        return pending

    def _fits_dispatch(
        self, kind: CallKind, batch: Batch, routing: Tensor | Plan, rows: RowCount | None, max_tokens: int | None
    ) -> bool:
        """Whether a batch of a kind that has been seen is allowed too: its numbers of tokens, and its plan."""
        (x, weights, extras, _), extent = batch, kind.extent
        data, scale = x if isinstance(x, Quantized) else (x, None)
        num_tokens = data.shape[0]
        if isinstance(routing, Plan):
            is_ours = routing.buffer_id == self._id and routing.masked == self.masked
            fits = is_ours and routing.num_tokens == num_tokens and max_tokens in (None, routing.extent.max_tokens)
            fits = fits and (rows != "capacity" or (routing.num_rows or 0) <= routing.extent.slot_rows)
        else:
            fits = extent is not None and (self._backend.tells_tokens or num_tokens <= extent.max_tokens)
            fits = fits and routing.shape[0] == num_tokens
        fits = fits and (scale is None or scale.shape[0] == num_tokens)
        fits = fits and (weights is None or weights.shape[0] == num_tokens)
        return fits and (not extras or all(extra.shape[0] == num_tokens for extra in extras))

    def _vetted_dispatch(
        self,
        batch: Batch,
        routing: Tensor | Plan,
        rows: RowCount | None,
        max_tokens: int | None,
        num_sms: int | None,
    ) -> CallKind:
        """The kind of a dispatch of which everything is allowed.

        Raises:
            ConfigError: anything is not.
        """
        x, weights, extras, unquantized = batch
        self._check_sms(num_sms)
        inputs.check_device(self.device, {"x": x, "topk_idx": routing, "weights": weights, "extras": extras})
        inputs.check_no_grad(*(x if isinstance(x, Quantized) else (x,)), weights, *extras)
        num_tokens = inputs.check_tokens(self.spec, x, unquantized=unquantized)
        kind = CallKind()
        if isinstance(routing, Plan):
            inputs.check_plan(routing, self._id, self.masked)
            if num_tokens != routing.num_tokens:
                raise ConfigError(
                    f"x has {num_tokens} tokens, the plan was made for {routing.num_tokens}; pass as many"
                )
            if max_tokens not in (None, routing.extent.max_tokens):
                raise ConfigError(
                    f"max_tokens={max_tokens}, and the plan is of a dispatch with {routing.extent.max_tokens}; leave "
                    f"it out with a plan"
                )
        else:
            inputs.check_topk_idx(self.spec, routing, num_tokens, num_ranks=self.topology.num_ranks)
            # By strides: one token has no gaps, whatever its kind has with more.
            kind.takes_picks_as_given = routing.dtype == torch.int64 and routing.stride() == (self.spec.num_topk, 1)
            kind.extent = extent = self._learn_extent(max_tokens)
            if num_tokens > extent.max_tokens and not self._backend.tells_tokens:
                raise overflow(extent.spec, self.topology, worst=-1 - self.rank, needed=num_tokens)
        inputs.check_weights(self.spec, weights, num_tokens)
        inputs.check_token_extras(self.spec, extras, num_tokens)
        inputs.check_row_count(self.spec, rows, routing)
        return kind

    def _learn_extent(self, max_tokens: int | None) -> Extent:
        """What calls of this M use of a receive slot.

        Raises:
            ConfigError: it is no M that a call of this Spec can have.
        """
        if max_tokens in self._extents:
            return self._extents[max_tokens]
        most = self.spec.max_tokens
        if not is_integer(max_tokens, least=1, most=most):
            raise ConfigError(
                f"max_tokens={max_tokens!r} of a call; pass an integer from 1 to {most}, the Spec's, or None for that"
            )
        if len(self._extents) >= NUM_CALL_KINDS:
            del self._extents[next(each for each in self._extents if each not in (None, self.spec.max_tokens))]
        extent = self._extents[max_tokens] = Extent.of(self.spec, self.topology.num_ranks, max_tokens=max_tokens)
        return extent

    def _picks(self, topk_idx: Tensor) -> Tensor:
        """Picks as int64 without gaps, of a mask of ranks too, and without those of masked ranks.

        Raises:
            ConfigError: a value is not allowed; on CUDA kernels look at them.
        """
        if topk_idx.dtype == torch.bool:
            if self.device.type == "cpu":
                inputs.check_places(self.spec, topk_idx)
            num_local = self.spec.num_local_experts(self.topology.num_ranks)
            topk_idx = picks_of_ranks(topk_idx, num_local=num_local, num_topk=self.spec.num_topk)
        if self.device.type == "cpu":
            check_picks(topk_idx, num_experts=self.spec.num_experts)
        return self.drop_masked(topk_idx.to(torch.int64)).contiguous()

    @overload
    def combine(
        self,
        y: Tensor,
        plan: Plan,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        partial_rows: Tensor | None = None,
        out: Tensor | None = None,
        num_sms: int | None = None,
        after: Event | None = None,
        counters: Counters | None = None,
    ) -> Tensor: ...
    @overload
    def combine(
        self,
        y: Tensor,
        plan: Plan,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        extras: Sequence[Tensor],
        out: Tensor | None = None,
        num_sms: int | None = None,
        after: Event | None = None,
        counters: Counters | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...
    def combine(
        self,
        y: Tensor,
        plan: Plan,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        partial_rows: Tensor | None = None,
        extras: Sequence[Tensor] | None = None,
        out: Tensor | None = None,
        num_sms: int | None = None,
        after: Event | None = None,
        counters: Counters | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Brings outputs back to the tokens' owners and sums them. Collective.

        The sum is float32, of products rounded by themselves, from left to right in the order that ``spec.reduce``
        says, begun with 0; then the bias is added, then one cast to the combine format. A token without
        picks gets 0 (plus bias). A row that serves several picks (Compact) is added once.

        Args:
            y: outputs where their rows came, [R, H] or [L, C, H], in the combine format: any tensor (pushed), or
                ``recv.output_rows()`` (left in place and pulled by the owners). The same bits either way.
            plan: of the dispatch that brought the rows.
            weights: float32. With ``reduce="token"``, [T, K] of this rank's picks; a row that serves several picks is
                multiplied by the sum of theirs. With ``"rank"`` and ``"node"``, one per row that came:
                ``recv.weights``.
            bias: [T, H] or [H], added to each sum.
            partial_rows: int32 [pairs, K], in place of ``plan.partial_rows``, where ranks sum picks (``reduce="rank"``,
                Expanded or Padded): the rows of y that this rank sums for each (token, rank) pair, -1 for none. y is
                then [N, H] with as many rows as you like, and weights [N]; there may be more pairs than the plan has.
                This rank's own matter, which peers need not do too. Not together with extras.
            extras: float32 tensors [R, ...] (or [L, C, ...]) that go home with the rows, 4 * K + ``extra_bytes`` bytes
                per row at most.
            out: where to write the sums: [T, H] in the combine format, contiguous, in memory of its own that no other
                argument overlaps; None: a new tensor. Undefined until the call has been waited for, and when it failed.
            num_sms: for this call, in place of the buffer's.
            after: as in ``dispatch``.
            counters: tensors that the call adds to: waits for each rank.

        Returns:
            [T, H] in the combine format, ``out`` itself if it was given. With ``extras``, also those that came home:
            [T, ...], summed over ranks, for Compact; [T, K, ...], 0 where there is no pick, where a row is one pick.

        Raises:
            ConfigError: bad input here; the other ranks raise PeerFailed.
            PeerFailed, PeerTimeout: see ``Pending.wait``.
        """
        with self._queue.turn:
            given = Outputs(y, weights, bias, extras, partial_rows, out)
            result: Tensor | tuple[Tensor, tuple[Tensor, ...]] = self._start_combine(
                given, plan, at_once=True, num_sms=num_sms, after=after, counters=counters
            ).finished()
            return result

    @overload
    def combine_start(
        self,
        y: Tensor,
        plan: Plan,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        partial_rows: Tensor | None = None,
        out: Tensor | None = None,
        num_sms: int | None = None,
        after: Event | None = None,
        counters: Counters | None = None,
    ) -> Pending[Tensor]: ...
    @overload
    def combine_start(
        self,
        y: Tensor,
        plan: Plan,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        extras: Sequence[Tensor],
        out: Tensor | None = None,
        num_sms: int | None = None,
        after: Event | None = None,
        counters: Counters | None = None,
    ) -> Pending[tuple[Tensor, tuple[Tensor, ...]]]: ...
    def combine_start(
        self,
        y: Tensor,
        plan: Plan,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        partial_rows: Tensor | None = None,
        extras: Sequence[Tensor] | None = None,
        out: Tensor | None = None,
        num_sms: int | None = None,
        after: Event | None = None,
        counters: Counters | None = None,
    ) -> Pending[Any]:
        """``combine`` in two halves: begins it, and waits for nobody. At most ``spec.num_slots`` calls un-waited."""
        with self._queue.turn:
            given = Outputs(y, weights, bias, extras, partial_rows, out)
            return self._start_combine(given, plan, at_once=False, num_sms=num_sms, after=after, counters=counters)

    def _start_combine(  # noqa: PLR0912 - as _start_dispatch
        self,
        given: Outputs,
        plan: Plan,
        *,
        at_once: bool,
        num_sms: int | None,
        after: Event | None,
        counters: Counters | None,
    ) -> Pending[Any]:
        y, weights, bias, extras, partial_rows, out = given
        if self._is_closed or self.connection.refusal is not None:
            self._check_open()
        self._queue.check_room(self._slots, self.spec.num_slots)
        try:
            if self._share.user is not self._slots:
                self._share.take(self._slots, self._queue)
            if self._backend.overflows:
                self.check_overflow()
            tensors = (y, plan, weights, bias, partial_rows, out, *(extras or ()))
            key = key_of(("combine", extras is None, at_once, num_sms), tensors)
            is_known = key in self._kinds and self._fits_combine(given, plan)
            kind = self._kinds[key] if is_known else self._vetted_combine(given, plan, num_sms)
            if partial_rows is not None and self._looks_at_picks:
                inputs.check_row_numbers(partial_rows, num_rows=y.shape[0])
            if out is not None:
                inputs.check_out(self.spec, plan, given, self._segment)
            returned = inputs.flat_extras(extras, y.shape[:-1]) if extras else ()
            output_slot = self._slots.output_slot(y, plan.stamp)
            if after is not None or counters is not None:
                self._take_beside(after, counters, at_once=at_once, brings_rows=False)
        except Exception as error:
            self._queue.refuse(error)
            raise
        if weights is not None and self._weighs_rows and weights.dim() != 1:
            weights = weights.reshape(-1)  # [R]
        if self._weighs_rows and (weights is not None or (self._ranks_sum and self.spec.layout.per_pick)):
            output_slot = PUSHED  # they are summed here, or their weights go with them
        slot = self._next_return_slot()
        at = slot, output_slot
        if at in kind.words:
            word = kind.words[at]
        else:
            agreed = self._agreed_of_combine(weights, extras, returned)
            word = self._word(kind, Kind.COMBINE, slot, output_slot, plan, agreed)
        is_first = not self._queue.running
        call = Call(self._consent.take(), word, "capacity", at_once, is_first, num_sms, counters, None, kind.launches)
        flat = y.reshape(-1, self.spec.hidden) if output_slot == PUSHED and y.dim() != 2 else y
        if flat is not y or weights is not given.weights or extras is not None:
            given = Outputs(flat, weights, bias, None if extras is None else returned, partial_rows, out)
        steps = self._backend.combine(call, plan, given)
        pending: Pending[Any] = self._queue.start(
            Kind.COMBINE, call.sequence, steps, held=(plan, given), owner=self._slots, counters=counters
        )
        self._queue.drive()
        if key and not is_known:
            self._kinds.keep(key, kind)
        return pending

    def _agreed_of_combine(
        self, weights: Tensor | None, extras: Sequence[Tensor] | None, returned: Sequence[Tensor]
    ) -> Hashable:
        """What must be the same on all ranks: the extras, and whether weights go home with the rows."""
        shapes = None if extras is None else _shapes(returned)
        return shapes if self.spec.reduce != "node" else (weights is None, shapes)

    def _fits_combine(self, given: Outputs, plan: Plan) -> bool:
        """Whether outputs of a kind that has been seen are allowed too: their numbers of rows, and the plan."""
        y, weights, bias, extras, partial_rows, _ = given
        lead = y.shape[:-1]
        fits = plan.buffer_id == self._id and plan.masked == self.masked
        if partial_rows is None:
            fits = fits and inputs.fits_lead(self.spec, plan, lead)
        else:
            fits = fits and len(lead) == 1 and partial_rows.shape[0] >= plan.num_partial_rows
        if weights is not None:
            fits = fits and (weights.shape == lead if self._weighs_rows else weights.shape[0] == plan.num_tokens)
        if bias is not None:
            fits = fits and bias.shape in ((plan.num_tokens, self.spec.hidden), (self.spec.hidden,))
        return fits and (not extras or all(extra.shape[: len(lead)] == lead for extra in extras))

    def _vetted_combine(self, given: Outputs, plan: Plan, num_sms: int | None) -> CallKind:
        """The kind of a combine of which everything is allowed.

        Raises:
            ConfigError: anything is not.
        """
        y, weights, bias, extras, partial_rows, out = given
        self._check_sms(num_sms)
        inputs.check_device(self.device, given._asdict())
        inputs.check_no_grad(y, weights, bias, out, *(extras or ()))
        inputs.check_plan(plan, self._id, self.masked)
        if partial_rows is None:
            inputs.check_outputs(self.spec, plan, y)
        else:
            inputs.check_partial_rows(self.spec, plan, given)
        lead = tuple(y.shape[:-1])
        inputs.check_combine_weights(self.spec, plan, weights, lead=lead)
        inputs.check_bias(self.spec, plan, bias)
        inputs.check_row_extras(extras or (), lead=lead, limit=self.arena.return_bytes)
        return CallKind()

    def return_extras(self, plan: Plan, extras: Sequence[Tensor], *, after: Event | None = None) -> tuple[Tensor, ...]:
        """Brings small tensors home as ``combine(extras=)`` does, without outputs. Collective.

        Args:
            plan: of the dispatch that brought the rows.
            extras: float32 tensors [R, ...] (or [L, C, ...]), at least one; 4 * K + ``extra_bytes`` bytes per row.
            after: as in ``dispatch``.

        Returns:
            [T, ...], summed over ranks, for Compact; [T, K, ...], 0 where there is no pick, where a row is one pick.

        Raises:
            ConfigError: bad input here; the other ranks raise PeerFailed.
            PeerFailed, PeerTimeout: see ``Pending.wait``.
        """
        with self._queue.turn:
            return self._start_return(plan, extras, after).finished()

    def _start_return(self, plan: Plan, extras: Sequence[Tensor], after: Event | None) -> Pending[tuple[Tensor, ...]]:
        self._check_open()
        self._queue.check_room(self._slots, self.spec.num_slots)
        try:
            if self._share.user is not self._slots:
                self._share.take(self._slots, self._queue)
            self.check_overflow()
            inputs.check_device(self.device, {"extras": extras})
            inputs.check_no_grad(*extras)
            inputs.check_plan(plan, self._id, self.masked)
            lead = inputs.check_lone_extras(self.spec, plan, extras)
            inputs.check_row_extras(extras, lead=lead, limit=self.arena.return_bytes)
            returned = inputs.flat_extras(extras, lead)
            if after is not None:
                self._backend.wait_for(after, at_once=True)
        except Exception as error:
            self._queue.refuse(error)
            raise
        kind = CallKind()
        word = self._word(kind, Kind.COMBINE, self._next_return_slot(), PUSHED, plan, ("extras", _shapes(returned)))
        call = Call(self._consent.take(), word, is_first=not self._queue.running)
        steps = self._backend.return_extras(call, plan, returned)
        pending: Pending[tuple[Tensor, ...]] = self._queue.start(
            Kind.COMBINE, call.sequence, steps, held=(plan, returned), owner=self._slots
        )
        return pending

    def remake_plan(self, tensors: PlanTensors) -> Plan:
        """A plan from the tensors that decide it. Local; nothing is made of tensors that it has been made from before.

        It is the same on all ranks when all remake theirs, made again or not.

        Raises:
            ConfigError: it has rows of a rank that has been masked since, on all ranks; on CUDA the host then asks the
                device, which cannot be in a capture.
        """
        is_capturing = self._is_capturing
        if (kept := self._memo.find(tensors, self.masked, is_capturing=is_capturing)) is not None:
            return kept
        plan = self._backend.remake_plan(tensors)
        self._memo.keep_remade(tensors, plan, is_capturing=is_capturing)
        return plan

    def keep_plan(self, plan: Plan, tensors: PlanTensors) -> None:
        """From now on ``remake_plan`` gives this plan of a dispatch, from tensors that the dispatch has just made."""
        self._memo.keep(tensors, self._backend.as_remade(plan, tensors), is_capturing=self._is_capturing)

    def copy_rows(self, recv: Received, out: Tensor | Quantized) -> None:
        """Copies the rows that came, as they are, to memory of the caller's; what is behind them there stays. Local.

        As ``dispatch(copy=True)`` does into new memory, and like that without a host sync.

        Args:
            out: as ``recv.x`` is: contiguous, of its shape and dtype; ``Quantized`` where that is, with scales of its
                strides too.

        Raises:
            ConfigError: ``out`` is not like that, or the rows' slot has come round.
        """
        inputs.check_copy(recv.x, out)
        self._backend.copy_rows(recv.plan, recv.x, out)

    def own_rows(self, recv: Received, rows: RowCount) -> Tensor:
        """``recv.x`` in memory that no later dispatch overwrites, narrow rows dequantised (combine format). Local.

        Args:
            rows: as the dispatch had it; with ``"capacity"`` rows are 0 where none came.
        """
        if self.spec.is_staged:  # nobody else's already, and 0 there
            return recv.x if isinstance(recv.x, Tensor) else self._backend.own_rows(recv.x, None)
        return self._backend.own_rows(recv.x, recv.src_idx if rows == "capacity" else None)

    def weigh_gradients(self, grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor) -> tuple[Tensor, Tensor]:
        """Of sums of ``weights[r] * y[r]``, from the gradients of each: those of y, and those of weights. Local.

        Args:
            grads, y: [R, H] or [L, C, H].
            weights: float32, one per row.
            src_idx: as the dispatch gave it; gradients are 0 where it is -1, whatever y and weights are there.
        """
        return self._backend.weigh_gradients(grads, y, weights, src_idx)

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """On CUDA, where calls run that are only started: a stream of the buffer's, or the one that this was set to.

        Set it, to None for the buffer's own again, between calls: those that are started from then on run there, behind
        those before. Calls that are waited for at once, and fused ones but for those that push outputs, run on the
        current stream. None on CPUs.

        Raises:
            ConfigError: when it is set on CPUs, or to what is no stream of the buffer's device.
        """
        stream: torch.cuda.Stream | None = self._backend.stream
        return stream

    @stream.setter
    def stream(self, stream: torch.cuda.Stream | None) -> None:
        with self._queue.turn:
            self._backend.use_stream(stream)

    def _take_beside(self, after: Event | None, counters: Counters | None, *, at_once: bool, brings_rows: bool) -> None:
        """Checks the tensors that a call is to count in, and lets its work wait for an event."""
        if counters is not None:
            inputs.check_counters(self.spec, self.device, self.topology.num_ranks, counters, brings_rows=brings_rows)
        if after is not None:
            self._backend.wait_for(after, at_once=at_once)

    @property
    def has_pairs(self) -> bool:
        """Whether plans say which rows here are of one token (``Plan.partial_rows``): where ranks sum or copy them."""
        return self._backend.has_pairs

    @property
    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _next_return_slot(self) -> int:
        """Where rows come back to in the next combine, in turn."""
        self._num_combines += 1
        return self._num_combines % self.spec.num_slots

    def _word(
        self, kind: CallKind, verb: Kind, slot: int, output_slot: int, plan: Plan | None, agreed: Hashable
    ) -> Word:
        """This rank's word, with a checksum of what must be the same on all ranks: the Spec, ``agreed``, plan, masks.

        Where it says nothing of a plan, words of one kind are the same.
        """
        is_signed = plan is not None and self._backend.signs_plans
        stamp = plan.stamp if plan is not None and is_signed else None
        word = Word(verb, slot, output_slot, self._signature ^ _checksum((agreed, stamp, self.masked)))
        if not is_signed:
            kind.words[slot, output_slot] = word
        return word

    def _check_sms(self, num_sms: int | None) -> None:
        if num_sms is not None and (self.launch is None or not is_integer(num_sms, least=1)):
            raise ConfigError(f"num_sms={num_sms!r}; pass a positive integer on CUDA, and None on CPUs")


def _shapes(extras: Sequence[Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((str(extra.dtype), tuple(extra.shape[1:])) for extra in extras)


@functools.lru_cache
def _checksum(value: Hashable) -> int:
    """Of what a call is besides its Spec: words that differ in other bits are of another Spec."""
    return zlib.crc32(repr(value).encode()) & (1 << CALL_SIGNATURE_BITS) - 1


def _check_laying(
    connection: Connection,
    spec: object,
    options: LaunchOptions,
    *of_connection: object,
) -> None:
    """Raises ConfigError for what a Buffer over a connection is not given."""
    connection.check_open()
    if not isinstance(spec, Spec):
        raise ConfigError(f"spec is a {type(spec).__name__}; pass a crossdock.Spec")
    if any(given is not None for given in of_connection):
        raise ConfigError(
            "device, topology, rail, timeout_s and trace are the connection's; pass them to Connection, not to a "
            "Buffer over it"
        )
    options.check(spec, connection.device)
