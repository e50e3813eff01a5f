"""Dispatch and combine of V2 and V2.5, in terms of native calls: Compact or Expanded rows that ranks add up first.

Letters: R ranks, E experts, L local experts, T tokens here, K picks per token, H hidden, N tokens that came, M the most
tokens of a rank, A alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossdock.backends.base import Counters
from crossdock.buffer import Buffer
from crossdock.compat.deep_ep import tables
from crossdock.compat.deep_ep.engine import Engine, plain
from crossdock.compat.deep_ep.ep_handle import EPHandle, Routed
from crossdock.compat.deep_ep.formats import Rows, as_given, as_native, bad_picks, read
from crossdock.compat.deep_ep.normal import aligned, bias_of
from crossdock.compat.deep_ep.shapes import Shape, Shapes
from crossdock.errors import CapacityError, ConfigError
from crossdock.received import Received

Dispatched = tuple[Rows, "Tensor | None", "Tensor | None", EPHandle]
Combined = tuple[Tensor, "Tensor | None"]


class Dispatch(NamedTuple):
    """A dispatch as it was asked for."""

    x: Rows
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    stats: Tensor | None
    num_experts: int | None
    num_tokens: int | None
    """M."""
    alignment: int | None
    num_sms: int
    handle: EPHandle | None
    copies_topk_idx: bool
    asks_host: bool | None
    expands: bool
    pads: bool
    turns_scales: bool


class Combine(NamedTuple):
    """A combine as it was asked for."""

    x: Tensor
    handle: EPHandle
    topk_weights: Tensor | None
    bias: Any
    num_sms: int


class ExpertParallel:
    """The calls of one buffer.

    Args:
        max_tokens: M of calls that name none; 0: they must.
        hidden: of rows whose data has several values in an element; 0: none have.
        sums_at_rank: expanded rows of a token are added up where they are first; else at their owner alone.
        watches_topk_idx: a handle has the caller's ``topk_idx``, and sees that nobody writes to it.
        num_slots: calls that may be started and not waited for.
    """

    def __init__(
        self, engine: Engine, *, max_tokens: int, hidden: int, sums_at_rank: bool, watches_topk_idx: bool,
        num_slots: int,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._max_tokens = max_tokens
        self._sums_at_rank = sums_at_rank
        self._watches = watches_topk_idx
        self._shapes = Shapes(
            engine, max_tokens=max_tokens, hidden=hidden, sums_at_rank=sums_at_rank, num_slots=num_slots
        )

    def dispatch(self, wanted: Dispatch) -> Dispatched:
        """Rows, picks or None, weights or None, and the handle."""
        if self._engine.unfinished:
            self._engine.settle()  # or its slot could be that of a call for which nobody waits
        if wanted.handle is not None:
            return self._again(wanted, wanted.handle)()
        call, given, shape = self._fresh(wanted)
        while True:
            try:
                return given(*call("dispatch"))
            except CapacityError:
                self._shapes.grow(shape)

    def start_dispatch(self, wanted: Dispatch) -> Callable[[], Dispatched]:
        """Begins it; the result finishes it."""
        if wanted.handle is not None:
            return self._again(wanted, wanted.handle, starts=True)
        call, given, shape = self._fresh(wanted)
        buffer, pending = call("dispatch_start")

        def finish() -> Dispatched:
            try:
                return given(buffer, pending.wait())
            except CapacityError:
                self._shapes.grow(shape)
                return self.dispatch(wanted)

        return self._engine.started(buffer, finish).result

    def _fresh(
        self, wanted: Dispatch
    ) -> tuple[Callable[[str], tuple[Buffer, Any]], Callable[[Buffer, Received], Dispatched], Shape]:
        """A native verb of it on the Buffer that has room by now; what it gives of what came; and what decides room."""
        data, scales = read(wanted.x)
        topk_idx, weights = wanted.topk_idx, wanted.topk_weights
        num_tokens, asks_host = self._checked(wanted, data), wanted.asks_host is not False
        assert topk_idx is not None
        assert wanted.num_experts is not None
        shape = self._shapes.shape(
            data,
            scales,
            expands=wanted.expands,
            num_experts=wanted.num_experts,
            num_topk=topk_idx.shape[1],
            num_tokens=num_tokens,
            alignment=wanted.alignment or 1,
            turns_scales=wanted.turns_scales,
        )
        weights = plain(weights) if weights is not None and weights.requires_grad else weights
        counters = None if wanted.stats is None else Counters(wanted.stats)
        extras = (topk_idx.to(torch.int32),) if wanted.expands and not self._sums_at_rank else ()

        def call(verb: str) -> tuple[Buffer, Any]:
            buffer = self._shapes.buffer(shape, asks_host=asks_host, device=data.device)
            recv = getattr(buffer, verb)(
                data if scales is None else as_native(data, scales, buffer.spec.wire, shape.hidden),
                topk_idx,
                weights=weights,
                extras=extras,
                rows="exact" if asks_host else "capacity",
                max_tokens=num_tokens,
                copy=True,
                num_sms=self._sms(wanted.num_sms),
                counters=counters,
            )
            return buffer, recv

        def given(buffer: Buffer, recv: Received) -> Dispatched:
            routed = Routed(
                buffer, recv.without_copy(), num_tokens, shape.alignment, is_expanded=shape.is_expanded,
                asks_host=asks_host,
            )  # fmt: skip
            counts = recv.num_tokens_per_expert_list if asks_host else []
            if shape.alignment > 1:
                counts = aligned(counts, shape.alignment)
            handle = EPHandle.of(
                routed, topk_idx, wanted.num_sms, counts, copies=wanted.copies_topk_idx, watches=self._watches
            )
            if data.is_cuda and torch.cuda.is_current_stream_capturing():
                handle.make_all()
            return (*self._rows(recv, scales, is_expanded=shape.is_expanded), handle)

        return call, given, shape

    def _again(self, wanted: Dispatch, handle: EPHandle, *, starts: bool = False) -> Callable[[], Dispatched]:
        data, scales = read(wanted.x)
        routed = self._routed_of(handle, data.shape[1])
        _check_same(wanted, routed)
        buffer, unquantized = self._shapes.carrier(routed, data, scales, turns=wanted.turns_scales)
        self._engine.use(buffer)
        verb = buffer.dispatch_start if starts else buffer.dispatch
        weights = wanted.topk_weights
        came: Any = verb(
            data if scales is None else as_native(data, scales, buffer.spec.wire, data.shape[1]),
            routed.plan_in(buffer),
            weights=None if weights is None else plain(weights),
            rows="exact" if routed.asks_host else "capacity",
            unquantized=unquantized,
            copy=True,
            num_sms=self._sms(wanted.num_sms),
            counters=None if wanted.stats is None else Counters(wanted.stats),
        )

        def given() -> Dispatched:
            recv = came.wait() if starts else came
            return (*self._rows(recv, scales, is_expanded=routed.is_expanded), handle)

        return self._engine.started(buffer, given).result if starts else given

    @staticmethod
    def _rows(recv: Received, scales: Tensor | None, *, is_expanded: bool) -> tuple[Rows, Tensor | None, Tensor | None]:
        rows, picks = recv.x, None if is_expanded else recv.topk_idx
        given = rows if isinstance(rows, Tensor) else as_given(rows, None if scales is None else scales.shape[1])
        return given, None if picks is None else picks.to(torch.int64), recv.weights

    def combine(self, wanted: Combine) -> Combined:
        """The sums [T, H], and weights [T, K] that came home, or None."""
        routed, y, num_sms = self._outputs(wanted), plain(wanted.x), self._sms(wanted.num_sms)
        buffer, plan, bias = routed.buffer, routed.recv.plan, bias_of(wanted.bias)
        self._engine.use(buffer)
        rows = self._rewritten(wanted.handle, routed)
        extras = self._weights(wanted, routed)
        if extras is None:
            return buffer.combine(y, plan, bias=bias, partial_rows=rows, num_sms=num_sms), None
        if rows is None:
            out, (weights,) = buffer.combine(y, plan, bias=bias, extras=extras, num_sms=num_sms)
            return out, weights
        out = buffer.combine(y, plan, bias=bias, partial_rows=rows, num_sms=num_sms)
        (weights,) = buffer.return_extras(plan, extras)
        return out, weights

    def start_combine(self, wanted: Combine) -> Callable[[], Combined]:
        """Begins it; the result finishes it. A bias is read then, so a combine with one begins no earlier."""
        routed, y = self._outputs(wanted), plain(wanted.x)
        buffer, plan = routed.buffer, routed.recv.plan
        rows = self._rewritten(wanted.handle, routed)
        extras = self._weights(wanted, routed)
        if wanted.bias is not None or (rows is not None and extras is not None):
            return self._engine.started(buffer, lambda: self.combine(wanted)).result
        self._engine.use(buffer)
        num_sms = self._sms(wanted.num_sms)
        if extras is None:
            summed = buffer.combine_start(y, plan, partial_rows=rows, num_sms=num_sms)
            return self._engine.started(buffer, lambda: (summed.wait(), None)).result
        both = buffer.combine_start(y, plan, extras=extras, num_sms=num_sms)

        def finish() -> Combined:
            out, (weights,) = both.wait()
            return out, weights

        return self._engine.started(buffer, finish).result

    def _outputs(self, wanted: Combine) -> Routed:
        routed = self._routed_of(wanted.handle, wanted.x.shape[-1])
        if wanted.topk_weights is not None and routed.is_expanded and not self._sums_at_rank:
            raise ConfigError(
                "topk_weights in a combine of expanded rows with allow_multiple_reduction=False; leave them out, or "
                "make the buffer with allow_multiple_reduction=True"
            )
        return routed

    def _routed_of(self, handle: EPHandle, hidden: int) -> Routed:
        """The routing of a handle; one that was lost is found by a dispatch of empty rows, on all ranks alike."""
        if not isinstance(handle, EPHandle):
            raise ConfigError(f"handle is a {type(handle).__name__}; pass the EPHandle that dispatch gave")
        routed = handle.routed
        if routed is None or routed.buffer.connection.is_closed:
            idx = handle.topk_idx
            wanted = Dispatch(
                idx.new_zeros((idx.shape[0], hidden), dtype=torch.bfloat16), idx, None, None, handle.num_experts,
                handle.num_max_tokens_per_rank, handle.expert_alignment, 0, None, False,
                bool(handle.num_recv_tokens_per_expert_list), handle.do_expand, False, False,
            )  # fmt: skip
            again = self.dispatch(wanted)[3].routed
            assert again is not None, "a dispatch has just given it"
            handle.routed = routed = again
        return routed

    def _weights(self, wanted: Combine, routed: Routed) -> tuple[Tensor] | None:
        """Weights as they go home: those of other ranks' picks are 0, so that sums over ranks are the owners' own."""
        weights = wanted.topk_weights
        if weights is None:
            return None
        weights = plain(weights)
        if not routed.is_expanded:
            picks = routed.recv.topk_idx
            assert picks is not None
            if weights.shape != picks.shape:
                raise ConfigError(
                    f"topk_weights has shape {list(weights.shape)}; pass a weight for each pick of the rows that came, "
                    f"{list(picks.shape)}"
                )
            weights = weights.masked_fill(picks < 0, 0.0)
        return (weights,)

    def _rewritten(self, handle: EPHandle, routed: Routed) -> Tensor | None:
        """Rows that the client wants summed, where they may be other ones than those that came."""
        rows = handle.rewritten_rows() if routed.is_expanded else None
        if rows is None or not self._sums_at_rank:
            return None
        num_pairs = routed.recv.plan.num_partial_rows
        if (missing := num_pairs - rows.shape[0]) > 0:  # the host was not told that fewer tokens came
            rows = torch.nn.functional.pad(rows, (0, 0, 0, missing), value=-1)
        rows = rows[:num_pairs].to(torch.int32).contiguous()
        return rows if routed.asks_host else tables.without_tail(rows, routed.psum_of_ranks()[-1])

    def _sms(self, num_sms: int) -> int | None:
        """As many as were asked for on CUDA; 0 is as many as the links can feed. An odd number is rounded up."""
        return num_sms + num_sms % 2 or None if self._engine.device.type == "cuda" else None

    def _checked(self, wanted: Dispatch, data: Tensor) -> int:
        """M of a fresh dispatch.

        Raises:
            ConfigError: something is missing, or does not fit.
        """
        if wanted.topk_idx is None or wanted.num_experts is None:
            raise ConfigError("dispatch without a handle needs topk_idx and num_experts; pass both, or a handle")
        if wanted.topk_idx.dim() != 2:
            raise bad_picks(wanted.topk_idx)
        if wanted.pads and not wanted.expands:
            raise ConfigError("do_zero_padding=True pads expanded rows; pass do_expand=True with it")
        num_tokens = wanted.num_tokens or self._max_tokens
        if not num_tokens:
            raise ConfigError(
                "num_max_tokens_per_rank is not known, as the buffer was made without; pass it to dispatch, or there"
            )
        if data.shape[0] > num_tokens:
            raise ConfigError(
                f"x has {data.shape[0]} tokens, and num_max_tokens_per_rank={num_tokens}; pass a larger number on all "
                f"ranks, or fewer tokens"
            )
        return num_tokens


def _check_same(wanted: Dispatch, routed: Routed) -> None:
    """Raises ConfigError where a cached dispatch is asked for something that its handle decides."""
    if wanted.topk_idx is not None or wanted.asks_host:
        raise ConfigError(
            "a dispatch with a handle goes where that says, and the host waits for nothing; leave topk_idx and "
            "do_cpu_sync out"
        )
    for name, given, has in (
        ("num_experts", wanted.num_experts, routed.buffer.spec.num_experts),
        ("expert_alignment", wanted.alignment, routed.alignment),
        ("num_max_tokens_per_rank", wanted.num_tokens, routed.num_tokens),
        ("do_expand", wanted.expands or None, routed.is_expanded),
    ):
        if given not in (None, has):
            raise ConfigError(f"{name}={given}, and the handle has {has}; pass that, or leave it out")
