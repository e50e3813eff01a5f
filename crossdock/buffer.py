"""Dispatch and combine: Buffer knows Spec, Plan, Transport and Backend, and nobody else does.

Letters: T tokens here, K top-k, H hidden, R rows received, L local experts, C capacity, P ranks.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar, overload
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from crossdock import inputs
from crossdock.agreement import agree, agree_on_masked
from crossdock.arena import Arena
from crossdock.backends.base import Batch, LaunchOptions, PlanTensors, RowCount
from crossdock.calls import Call, Calls
from crossdock.connect import connect, vet
from crossdock.consent import PUSHED, Kind, Steps, Word
from crossdock.errors import ConfigError
from crossdock.layout import Padded
from crossdock.masks import drop_picks, listed
from crossdock.memo import PlanMemo
from crossdock.pending import CallQueue, Pending
from crossdock.plan import Plan
from crossdock.received import Received
from crossdock.routing import check_picks
from crossdock.slots import ReceiveSlots
from crossdock.spec import Spec, Topology
from crossdock.transport.base import ProcessGroup
from crossdock.transport.inproc import ThreadGroup
from crossdock.wire import Quantized

Result = TypeVar("Result")
Self = TypeVar("Self", bound="Buffer")

_MARKS = {kind: f"crossdock {kind}" for kind in Kind}
"""What calls are named in a profiler."""
_handles = itertools.count(1)
_by_handle: WeakValueDictionary[str, Buffer] = WeakValueDictionary()
"""The one state of this module: a ``torch.library`` op takes tensors, numbers and strings, so a buffer needs a name."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a buffer has counted since it was made; see ``Buffer.gather_stats`` for all ranks'."""

    num_tokens_per_expert: Tensor
    """int64 [L]: tokens that each local expert has received, over all dispatches but unquantized ones."""
    wait_s: Tensor
    """float64 [P]: seconds this rank has waited for each peer. Stacked, the rows of a slow rank's peers show it."""


class Buffer:
    """Expert-parallel dispatch and combine among the ranks of a group. Collective to make, local to close.

    All ranks issue the same calls in the same order. A call that fails on one rank (bad input, an exception that leaves
    the ``with`` block) raises there, and ``PeerFailed`` at once on the others; the next call works again.

    Args:
        group: a ``torch.distributed`` process group of one host or a 1-D ``DeviceMesh``, None for the default group, or
            a ``ThreadGroup``.
        spec: what travels, the same on all ranks.
        device: where rows are moved and tensors lie: ``"cpu"``, ``"cuda"`` (the current device) or ``"cuda:1"``; None:
            the current CUDA device when the process group has NCCL for it, else the CPU.
        num_sms: on CUDA, how many of the GPU's SMs the kernels that move rows may use; None: as many as the
            links can feed (``buffer.launch`` says). Calls may ask for another number.
        expand: on CUDA, who makes the copies of a row that several experts of a rank get (Expanded, Padded):
            ``"sender"`` (each copy crosses the link) or ``"receiver"`` (one does); None: the cheaper one by
            ``crossdock.cost``. The same bits.
        mover: on CUDA, ``"kernel"``, or ``"copy"``: rows are packed, and whole blocks go by copy engines (Compact).
        timeout_s: how long a call waits for a peer before it raises ``PeerTimeout``.
        debug: fill receive slots with NaN before they are used again, so that stale views show; calls in flight are
            then finished before a dispatch begins.

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
        group: dist.ProcessGroup | DeviceMesh | ThreadGroup | None,
        spec: Spec,
        *,
        device: torch.device | str | None = None,
        num_sms: int | None = None,
        expand: Literal["sender", "receiver"] | None = None,
        mover: Literal["kernel", "copy"] = "kernel",
        timeout_s: float = 100,
        debug: bool = False,
    ) -> None:
        if isinstance(group, Spec):
            raise ConfigError("group is a Spec; pass Buffer(group, spec), with None for the default group")
        members = group if isinstance(group, ThreadGroup) else ProcessGroup(group)
        launch_options = LaunchOptions(num_sms=num_sms, expand=expand, mover=mover)
        self.device, problem = vet(members, device, spec, launch_options)
        options: dict[str, object] = {"device": self.device.type, "expand": expand, "mover": mover}
        number = agree(members, spec, timeout_s, options, problem)
        self.group = group
        self.spec = spec
        self.topology = Topology(num_ranks=members.size)
        self.rank = members.rank
        self.arena = Arena(spec, self.topology)
        self._members = members
        self._id = number
        self._debug = debug
        moving = connect(members, self.arena, self.device, launch_options, number=number, timeout_s=timeout_s)
        self.launch = moving.launch
        """How kernels are launched, printable; None on CPUs."""
        self._transport, self._backend, self._consent = moving.transport, moving.backend, moving.consent
        self._queue = CallQueue(self._consent, self._transport, depth=spec.num_slots, timeout_s=timeout_s)
        self._slot_rows = spec.num_slot_rows(self.topology.num_ranks)
        self._slots = ReceiveSlots(self.arena, self._transport.segment)
        self._calls = Calls(self._consent, self._backend, self._slots, self.arena, debug=debug)
        self._memo = PlanMemo(spec)
        self._is_closed = False
        self.masked: tuple[int, ...] = ()
        """The ranks that ``mask`` has left out, in order."""
        self.handle = f"crossdock.Buffer {next(_handles)}"  # a string, as torch.compile would make a number dynamic
        """This process's name for this buffer: what the ops of ``crossdock.autograd`` are given."""
        _by_handle[self.handle] = self

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
        unquantized: bool = False,
        copy: bool = False,
        num_sms: int | None = None,
    ) -> Received:
        """Sends each token to the ranks that hold its experts; gives what came here. Collective.

        Args:
            x: [T, H] rows in the wire's dtype, rows to be cast (narrow wires), or ``Quantized``; T may differ between
                ranks, and be 0.
            routing: ``topk_idx`` int64 or int32 [T, K], distinct experts, -1 for no pick; or the plan of an earlier
                dispatch, to send other rows the same way (no counts are exchanged).
            weights: float32 [T, K], which travel with the rows.
            extras: tensors [T, ...] of any dtype that travel with the rows; room for them is ``spec.extra_bytes``.
            rows: ``"exact"``: ``recv.x`` has as many rows as came, and an overflow raises at once (the default, but for
                Padded); ``"capacity"``: it has as many as the slot has room for, and an overflow gives zero counts and
                raises later: in ``check()``, or in the next call (on CUDA after 32 fresh dispatches, for the host does
                not wait). The same on all ranks.
            unquantized: x is in the combine format and travels as it is, whatever the wire, as gradients do. The
            rows lie
                where outputs are written (``recv.x`` is ``recv.output_rows()``) unless that is the wire's own format;
                calls in flight are finished first. The same on all ranks.
            copy: give rows of their own, which no later dispatch overwrites.
            num_sms: for this call, in place of the buffer's.

        Raises:
            ConfigError: bad input here; the other ranks raise PeerFailed.
            CapacityError, PeerFailed, PeerTimeout: see ``Pending.wait``.
        """
        pending = self._start_dispatch(
            x, routing, weights, extras, rows, at_once=True, unquantized=unquantized, copy=copy, num_sms=num_sms
        )
        return pending.wait()

    def dispatch_start(
        self,
        x: Tensor | Quantized,
        routing: Tensor | Plan,
        *,
        weights: Tensor | None = None,
        extras: Sequence[Tensor] = (),
        rows: RowCount | None = None,
        unquantized: bool = False,
        copy: bool = False,
        num_sms: int | None = None,
    ) -> Pending[Received]:
        """``dispatch`` in two halves: begins it, and waits for nobody. At most ``spec.num_slots`` calls un-waited."""
        return self._start_dispatch(
            x, routing, weights, extras, rows, at_once=False, unquantized=unquantized, copy=copy, num_sms=num_sms
        )

    def _start_dispatch(
        self,
        x: Tensor | Quantized,
        routing: Tensor | Plan,
        weights: Tensor | None,
        extras: Sequence[Tensor],
        rows: RowCount | None,
        *,
        at_once: bool,
        unquantized: bool,
        copy: bool,
        num_sms: int | None,
    ) -> Pending[Received]:
        self._check_room()
        self._slots.check_free(self._queue.is_unwaited)
        default: RowCount = "capacity" if isinstance(self.spec.layout, Padded) else "exact"
        asks_host = (rows or default) == "exact" and not isinstance(routing, Plan)
        self._backend.check_capture(asks_host=asks_host)

        def prepare() -> tuple[Batch, Plan | None, Tensor, RowCount, bool]:
            self._check_sms(num_sms)
            given = {"x": x, "topk_idx": routing, "weights": weights, "extras": extras}
            inputs.check_device(self.device, given)
            inputs.check_no_grad(*(x if isinstance(x, Quantized) else (x,)), weights, *extras)
            num_tokens = inputs.check_tokens(self.spec, x, unquantized=unquantized)
            if isinstance(routing, Plan):
                inputs.check_plan(routing, self._id, self.masked)
                topk_idx = routing.topk_idx
                if num_tokens != routing.num_tokens:
                    raise ConfigError(
                        f"x has {num_tokens} tokens, the plan was made for {routing.num_tokens}; pass as many"
                    )
            else:
                inputs.check_topk_idx(self.spec, routing, num_tokens)
                if self.device.type == "cpu":  # else kernels look at the values
                    check_picks(routing, num_experts=self.spec.num_experts)
                topk_idx = routing if routing.dtype == torch.int64 else routing.to(torch.int64)
                topk_idx = self.drop_masked(topk_idx).contiguous()
            inputs.check_weights(self.spec, weights, num_tokens)
            inputs.check_token_extras(self.spec, extras, num_tokens)
            if rows not in (None, "exact", "capacity"):
                raise ConfigError(f"rows={rows!r}; pass 'exact' or 'capacity'")
            batch = Batch(x=x, weights=weights, extras=tuple(extras), unquantized=unquantized)
            is_fused = self._calls.takes_fused_dispatch(batch, routing)
            if topk_idx is routing and not is_fused:  # its kernel copies the picks
                topk_idx = routing.clone()
            return batch, routing if isinstance(routing, Plan) else None, topk_idx, rows or default, is_fused

        batch, plan, topk_idx, mode, is_fused = self._vetted(prepare)
        lands_in_outputs = self.arena.region_of_rows(unquantized=unquantized) == "outputs"
        if self._debug or lands_in_outputs:
            self._queue.drain()  # or rows would be overwritten that a combine in flight still pulls
            self._queue.check_room()
        slot = self._slots.take()
        if self._debug:
            self._slots.poison(slot, "data", "scale", "metadata")
        signature = (mode, unquantized, weights is None, _shapes(extras), self._sign(plan), *self.masked)
        word = Word(Kind.CACHED_DISPATCH if plan else Kind.DISPATCH, slot, signature=_checksum(signature))
        call = self._begin(word, None if plan else topk_idx, num_sms, at_once=at_once, is_fused=is_fused)
        pending = self._start(call, self._calls.dispatch(call, batch, plan or topk_idx, mode, copy=copy))
        self._slots.fill(slot, pending)
        return pending

    @overload
    def combine(
        self,
        y: Tensor,
        plan: Plan,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        num_sms: int | None = None,
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
        num_sms: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...
    def combine(
        self,
        y: Tensor,
        plan: Plan,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        extras: Sequence[Tensor] | None = None,
        num_sms: int | None = None,
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
                multiplied by the sum of theirs. With ``reduce="rank"``, one per row that came: ``recv.weights``.
            bias: [T, H] or [H], added to each sum.
            extras: float32 tensors [R, ...] (or [L, C, ...]) that go home with the rows, 4 * K + ``extra_bytes`` bytes
                per row at most.
            num_sms: for this call, in place of the buffer's.

        Returns:
            [T, H] in the combine format. With ``extras``, also the extras that came home: [T, ...], summed over ranks,
            for Compact; [T, K, ...], 0 where there is no pick, where a row is one pick.

        Raises:
            ConfigError: bad input here; the other ranks raise PeerFailed.
            PeerFailed, PeerTimeout: see ``Pending.wait``.
        """
        pending = self._start_combine(y, plan, weights, bias, extras, at_once=True, num_sms=num_sms)
        result: Tensor | tuple[Tensor, tuple[Tensor, ...]] = pending.wait()
        return result

    @overload
    def combine_start(
        self,
        y: Tensor,
        plan: Plan,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        num_sms: int | None = None,
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
        num_sms: int | None = None,
    ) -> Pending[tuple[Tensor, tuple[Tensor, ...]]]: ...
    def combine_start(
        self,
        y: Tensor,
        plan: Plan,
        *,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        extras: Sequence[Tensor] | None = None,
        num_sms: int | None = None,
    ) -> Pending[Any]:
        """``combine`` in two halves: begins it, and waits for nobody. At most ``spec.num_slots`` calls un-waited."""
        return self._start_combine(y, plan, weights, bias, extras, at_once=False, num_sms=num_sms)

    def _start_combine(
        self,
        y: Tensor,
        plan: Plan,
        weights: Tensor | None,
        bias: Tensor | None,
        extras: Sequence[Tensor] | None,
        *,
        at_once: bool,
        num_sms: int | None,
    ) -> Pending[Any]:
        self._check_room()

        def prepare() -> tuple[Tensor, Tensor | None, tuple[Tensor, ...], int]:
            self._check_sms(num_sms)
            inputs.check_device(self.device, {"y": y, "weights": weights, "bias": bias, "extras": extras})
            inputs.check_no_grad(y, weights, bias, *(extras or ()))
            inputs.check_plan(plan, self._id, self.masked)
            inputs.check_outputs(self.spec, plan, y, self._slot_rows)
            lead = tuple(y.shape[:-1])
            row_weights = inputs.check_combine_weights(self.spec, plan, weights, lead=lead)
            inputs.check_bias(self.spec, plan, bias)
            limit = self.arena.return_bytes
            small = inputs.check_row_extras(extras or (), lead=lead, limit=limit)
            output_slot = self._slots.output_slot(y, plan.stamp)
            if self.spec.reduce == "rank" and (self.spec.layout.per_pick or weights is not None):
                output_slot = PUSHED  # they are summed here
            flat = y.reshape(-1, self.spec.hidden) if output_slot == PUSHED else y
            return flat, row_weights, small, output_slot

        flat, row_weights, small, output_slot = self._vetted(prepare)
        signature = _checksum((self._sign(plan), None if extras is None else _shapes(small), *self.masked))
        word = Word(Kind.COMBINE, self._calls.next_return_slot(), output_slot, signature)
        pushes, has_extras = output_slot == PUSHED, extras is not None
        is_fused = self._calls.takes_fused_combine(plan, pushes=pushes, has_extras=has_extras)
        call = self._begin(word, None, num_sms, at_once=at_once, is_fused=is_fused)
        return self._start(
            call, self._calls.combine(call, plan, flat, row_weights, bias, None if extras is None else small)
        )

    def return_extras(self, plan: Plan, extras: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Brings small tensors home as ``combine(extras=)`` does, without outputs. Collective.

        Args:
            plan: of the dispatch that brought the rows.
            extras: float32 tensors [R, ...] (or [L, C, ...]), at least one; 4 * K + ``extra_bytes`` bytes per row.

        Returns:
            [T, ...], summed over ranks, for Compact; [T, K, ...], 0 where there is no pick, where a row is one pick.

        Raises:
            ConfigError: bad input here; the other ranks raise PeerFailed.
            PeerFailed, PeerTimeout: see ``Pending.wait``.
        """
        self._check_room()

        def prepare() -> tuple[Tensor, ...]:
            inputs.check_device(self.device, {"extras": extras})
            inputs.check_no_grad(*extras)
            inputs.check_plan(plan, self._id, self.masked)
            lead = inputs.check_lone_extras(self.spec, plan, extras, self._slot_rows)
            return inputs.check_row_extras(extras, lead=lead, limit=self.arena.return_bytes)

        small = self._vetted(prepare)
        signature = _checksum(("extras", self._sign(plan), _shapes(small), *self.masked))
        word = Word(Kind.COMBINE, self._calls.next_return_slot(), PUSHED, signature)
        call = self._begin(word, None, None, at_once=True)
        return self._start(call, self._calls.return_extras(call, plan, small)).wait()

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

    def own_rows(self, recv: Received, rows: RowCount) -> Tensor:
        """``recv.x`` in memory that no later dispatch overwrites, narrow rows dequantised (combine format). Local.

        Args:
            rows: as the dispatch had it; with ``"capacity"`` rows are 0 where none came.
        """
        return self._backend.own_rows(recv.x, recv.src_idx if rows == "capacity" else None)

    def weigh_gradients(self, grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor) -> tuple[Tensor, Tensor]:
        """Of sums of ``weights[r] * y[r]``, from the gradients of each: those of y, and those of weights. Local.

        Args:
            grads, y: [R, H] or [L, C, H].
            weights: float32, one per row.
            src_idx: as the dispatch gave it; gradients are 0 where it is -1, whatever y and weights are there.
        """
        return self._backend.weigh_gradients(grads, y, weights, src_idx)

    def check(self) -> None:
        """Raises what has failed without being raised: once, and after all that was issued is done.

        That is the CapacityError of a ``rows="capacity"`` dispatch that has been waited for, and on CUDA, where a call
        may return before the host knows how it went, also PeerFailed, PeerTimeout, or the ConfigError of picks that are
        not allowed.
        """
        self._check_open()
        self._queue.settle()
        self._backend.synchronize()
        self._queue.check_failure()
        self._check_overflow()

    def exchange_words(self, num_trips: int) -> None:
        """Gives a word to every rank and waits for everyone's, so many times, on CUDA; nothing else moves.

        One of them is the shortest that a call can take, a one-way trip between all ranks: what benchmarks hold
        latencies against. Collective; it returns at once, its work goes on the stream of the buffer's calls.

        Raises:
            ConfigError: calls are in flight.
            NotSupported: on CPUs.
        """
        self._check_open()
        if not self._queue.is_idle:
            raise ConfigError("exchange_words while calls are in flight; wait for them first")
        self._consent.exchange_words(num_trips)

    def abort(self, reason: str) -> None:
        """Gives up on this rank, between two calls or with calls in flight: every peer raises PeerFailed at once.

        What is in flight here is void. The next call works again, on all ranks. Leaving the ``with`` block by an
        exception does this too.
        """
        self._check_open()
        self._queue.abandon(reason)

    def reset(self) -> None:
        """Forgets failures and overflows that were not raised yet. Local; no word to the peers.

        Calls in flight, if there are any, are given up, as ``abort`` does.
        """
        self._check_open()
        self._backend.synchronize()
        self._backend.overflows.clear()
        self._queue.forget()

    def mask(self, *ranks: int) -> None:
        """Goes on without ranks that are gone. Collective among all that are left; what is in flight is void.

        To be called with the same ranks on all that are left, after a call has failed because of them. From then on
        nothing is awaited from a masked rank, and nothing sent to it: picks of its experts are dropped, as if they were
        -1. Plans from before are not valid any more, nor are rows of theirs. Ranks keep their numbers and experts; a
        process that takes the place of one that has ended comes in with a new Buffer of all ranks.

        Args:
            ranks: whose processes have ended, or that have closed their buffers; those that are masked already may be
                among them.

        Raises:
            ConfigError: ranks were given that still live, or not the same on all; nobody is masked, on all ranks. Or
                this rank's arguments make no sense; the others raise PeerFailed.
            PeerFailed, PeerTimeout: a rank that was to agree gave up, is late, or is gone too; nobody is masked. Call
                it again on all that are left, with that rank if it is gone.

        >>> from crossdock import Fp32, Spec, run_local
        >>> spec = Spec(num_experts=3, num_topk=2, hidden=1, max_tokens=1, wire=Fp32())
        >>> def program(group):
        ...     with Buffer(group, spec) as buffer:
        ...         if group.rank == 1:
        ...             return "leaves"
        ...         buffer.mask(1)
        ...         recv = buffer.dispatch(torch.ones(1, 1), torch.tensor([[1, 2]]))
        ...         return buffer.masked, buffer.combine(recv.x, recv.plan).item()
        >>> run_local(program, num_ranks=3)
        [((1,), 1.0), 'leaves', ((1,), 1.0)]
        """
        self._check_open()
        self._backend.check_capture(asks_host=True)
        self._queue.renew(f"it masks {', '.join(map(str, ranks))}")
        try:
            inputs.check_ranks(ranks, num_ranks=self.topology.num_ranks)
        except ConfigError as error:
            self._queue.refuse(error)
            raise
        wanted = {*self.masked, *ranks}
        agreement = agree_on_masked(self._consent, self._transport, wanted)
        self._queue.start("mask", self._consent.next_sequence, agreement).wait()
        new = sorted(wanted - set(self.masked))
        self.masked = tuple(sorted(wanted))
        self._transport.mask(new)
        self._consent.mask(new)
        self._backend.mask(self.masked)
        self._memo.clear()

    def drop_masked(self, topk_idx: Tensor) -> Tensor:
        """The picks with -1 in place of masked ranks' experts; the verbs do that themselves.

        Graphs do not that were captured before a rank was masked: what they are given has to be free of such picks.
        """
        if not self.masked:
            return topk_idx
        return drop_picks(topk_idx, self.masked, num_local=self.spec.num_local_experts(self.topology.num_ranks))

    def close(self) -> None:
        """Leaves: a peer that waits for this rank raises PeerFailed. Local; rows that were handed out stay readable.

        On CUDA it returns once what was issued is done.
        """
        if not self._is_closed:
            self._is_closed = True
            self._backend.synchronize()
            self._consent.leave()
            self._transport.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._queue.last_error is None and not self._is_closed:
            self.abort(f"{type(error).__name__}: {error}")
        self.close()

    @property
    def has_pairs(self) -> bool:
        """Whether plans say which rows here are of one token (``Plan.partial_rows``): where ranks sum or copy them."""
        return self._backend.has_pairs

    @property
    def stats(self) -> Stats:
        """What this rank has counted so far."""
        return Stats(
            num_tokens_per_expert=self._backend.num_tokens_per_expert.clone(),
            wait_s=torch.tensor(self._queue.wait_s, dtype=torch.float64) + self._backend.wait_s.cpu(),
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
        all_stats: list[Any] = self._members.all_gather(self.stats)
        return Stats(
            num_tokens_per_expert=torch.cat([stats.num_tokens_per_expert for stats in all_stats]),
            wait_s=torch.stack([stats.wait_s for stats in all_stats]),
        )

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"Buffer(rank={self.rank}, num_ranks={self.topology.num_ranks}, {self.arena.num_bytes:,} bytes, {state})"

    @property
    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _begin(
        self, word: Word, topk_idx: Tensor | None, num_sms: int | None, *, at_once: bool, is_fused: bool = False
    ) -> Call:
        is_next = self._queue.is_idle
        return self._calls.begin(word, topk_idx, is_next=is_next, at_once=at_once, is_fused=is_fused, num_sms=num_sms)

    def _sign(self, plan: Plan | None) -> int | None:
        """What all ranks that mean the same plan tell each other.

        Nothing on CUDA: where one rank replays a graph and another makes the same calls, the plans have other numbers.
        """
        return plan.stamp if plan is not None and self.device.type == "cpu" else None

    def _start(self, call: Call, steps: Steps[Result]) -> Pending[Result]:
        with self._backend.marked(_MARKS[call.word.kind]):
            waits = call.at_once or not call.is_fused
            return self._queue.start(call.word.kind, call.sequence, steps, call, waits=waits)

    def _check_overflow(self) -> None:
        for overflow in self._backend.overflows:
            sequence, error = overflow
            if not self._queue.has_unwaited(sequence):  # or ranks would raise in different calls, as it was found
                self._backend.overflows.remove(overflow)
                raise error

    def _check_sms(self, num_sms: int | None) -> None:
        if num_sms is not None and (self.launch is None or num_sms < 1):
            raise ConfigError(f"num_sms={num_sms}; pass a positive number on CUDA, and None on CPUs")

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("the buffer is closed; make a new one")

    def _check_room(self) -> None:
        self._check_open()
        self._queue.check_room()

    def _vetted(self, prepare: Callable[[], Result]) -> Result:
        """What ``prepare`` gives. When it raises, calls in flight are finished first and then every peer is told."""
        try:
            self._check_overflow()
            return prepare()
        except Exception as error:
            self._queue.refuse(error)
            raise


def _shapes(extras: Sequence[Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((str(extra.dtype), tuple(extra.shape[1:])) for extra in extras)


@functools.lru_cache
def _checksum(value: Hashable) -> int:
    return zlib.crc32(repr(value).encode()) & 0xFFFF
