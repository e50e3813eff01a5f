"""Calls of few tokens, each one kernel on the caller's stream, or two where work of the caller's goes in between.

Letters: T tokens here, K top-k, H hidden, P ranks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossdock.backends.base import Batch, Call
from crossdock.backends.cuda.config import LaunchConfig, power_of_two
from crossdock.backends.cuda.kernels import fused as kernels
from crossdock.backends.cuda.kernels import outputs as output_kernels
from crossdock.backends.cuda.kernels import shares
from crossdock.backends.cuda.kernels.calls import NOBODY
from crossdock.backends.cuda.kernels.groups import (
    FLOAT32,
    WORDS,
    Came,
    Ends,
    Fused,
    Own,
    Returned,
    ScalePlaces,
    Shares,
    Strides,
    Summed,
    as_constants,
)
from crossdock.backends.cuda.launch import NUM_KINDS, Launch, Launcher
from crossdock.backends.cuda.plan import DevicePlan
from crossdock.backends.cuda.planner import Planner
from crossdock.backends.cuda.scales import as_kernels_take, dtype_of, places_of
from crossdock.backends.cuda.sends import IN_SLOT, ONE_WORD, SendKinds, where_of
from crossdock.backends.cuda.state import Kept
from crossdock.consent import Word
from crossdock.extent import Extent
from crossdock.kinds import Kinds
from crossdock.spec import Spec
from crossdock.wire import Fp8, Quantized

_PATIENCE = 32
"""Polls, some 10 us, after which a call that is only started leaves its rows to ``wait()``."""
_BEGINS, _AWAITS, _TELLS, _WEIGHTS, _METADATA = (
    step.value for step in (shares.BEGINS, shares.AWAITS, shares.TELLS, shares.HAS_WEIGHTS, shares.METADATA)
)
_PUSH, _SUM = "push", "sum"
"""What a kind of combine launches, as it is kept."""
_TOO_MANY_SHIFT = shares.TOO_MANY_SHIFT.value


class At(NamedTuple):
    """Where a call's kernels run, the room for what they keep of it, and what staged rows are expanded into."""

    stream: int
    room: Kept
    into: Tensor | Quantized | None = None
    """None: into the slot."""


class _Rows(NamedTuple):
    """Room for rows that are cast: words ``[M, ROW]``, and scales, bytes where these are exponents."""

    data: Tensor
    scale: Tensor


class FusedDispatch(NamedTuple):
    """What fused dispatches of one kind launch."""

    send: Launch
    expand: Launch | None
    """Behind it, where the receiver copies rows."""


class FusedCalls:
    """The calls of a buffer whose ``LaunchConfig`` says ``is_fused``: one kernel, or two where they expand or push."""

    def __init__(self, launcher: Launcher, planner: Planner, send_kinds: SendKinds) -> None:
        self._launcher = launcher
        self._send_kinds = send_kinds
        self._on = on = launcher.state
        self._spec = spec = on.arena.spec
        self._is_staged = spec.is_staged
        self._planner = planner
        self._cast = _cast_rows(spec, spec.wire, on.device) if isinstance(spec.wire, Fp8) else None
        per_pick = (spec.max_tokens, spec.num_topk)
        self._nths, pair_nths = torch.zeros(2, *per_pick, dtype=torch.int32, device=on.device).unbind()
        to_rows, to_scales = torch.zeros(2, *per_pick, dtype=torch.int64, device=on.device).unbind()
        programs = launcher.config.most_programs(spec.num_topk)
        self._shares = Shares(
            send_starts=on.scratch.send_starts,
            nths=self._nths,
            pair_nths=pair_nths,
            to_rows=to_rows,
            to_scales=to_scales,
            counts=torch.zeros(programs, spec.num_experts + on.num_ranks, dtype=torch.int32, device=on.device),
            rows=self._nths if self._cast is None else self._cast.data,
            scales=self._nths if self._cast is None else self._cast.scale,
        )
        most_rows = min(spec.most_rows(on.num_ranks), on.num_ranks * spec.max_tokens * spec.num_topk)
        self._came = Came(
            rows=torch.zeros(most_rows, dtype=torch.int32, device=on.device),
            src_rows=torch.zeros(most_rows, dtype=torch.int64, device=on.device),
        )
        self._dispatches: Kinds[FusedDispatch] = Kinds(NUM_KINDS)
        self._pushes: Kinds[Launch] = Kinds(NUM_KINDS)
        self._sums: Kinds[Launch] = Kinds(NUM_KINDS)
        self._begin_combine = launcher.bind(kernels.begin_combine, 1, on.own, num_warps=1)

    def dispatch(
        self,
        call: Call,
        plan: DevicePlan,
        batch: Batch,
        topk_idx: Tensor | None,
        at: At,
        *,
        begins: bool,
        awaits: bool,
    ) -> None:
        """From picks to rows in place; without ``begins`` or ``awaits`` the second or the first half of it.

        Args:
            topk_idx: int64 ``[T, K]``, of a fresh dispatch; None: the plan is known.
        """
        x, weights = batch.x, batch.weights
        data, scale = (x, None) if isinstance(x, Tensor) else as_kernels_take(x)
        if data.stride(1) != 1 and data.shape[1] != 1:
            data = data.contiguous()
        if scale is not None and scale.stride(1) != 1 and scale.shape[1] != 1:
            scale = scale.contiguous()
        kept, nothing, way = (
            call.kept,
            self._on.nothing,
            (plan.extent, begins),
        )  # the second half takes the plan's picks
        if kept is not None and way in kept:
            kind: FusedDispatch = kept[way]
        else:
            kind = self._kind_of(call, plan.extent, batch, data, scale, topk_idx)
            if kept is not None:
                kept.keep(way, kind)
        steps = begins * _BEGINS | awaits * _AWAITS | (call.row_count == "exact") * _TELLS
        steps |= plan.too_many << _TOO_MANY_SHIFT
        if plan.src_idx is None or weights is not None:
            steps |= _METADATA
        host_counts, num_tokens = plan.host_counts, 0 if plan.too_many else plan.num_tokens
        kind.send(
            num_tokens,
            at.stream,
            plan.memory if topk_idx is None else topk_idx,
            nothing if weights is None else weights.view(torch.int32),
            data,
            nothing if scale is None else scale,
            plan,
            at.room,
            self._planner.nobody if host_counts is None else host_counts.row,
            num_tokens,
            call.word.payload,
            self._on.rank,
            self._on.max_polls if awaits else _PATIENCE,
            steps if weights is None else steps | _WEIGHTS,
        )
        if awaits and kind.expand is not None:
            where = IN_SLOT if at.into is None else where_of(at.into)
            kind.expand(0, at.stream, *where, plan, at.room, num_tokens, self._on.rank)

    def _kind_of(
        self,
        call: Call,
        extent: Extent,
        batch: Batch,
        data: Tensor,
        scale: Tensor | None,
        topk_idx: Tensor | None,
    ) -> FusedDispatch:
        """What a dispatch launches, by all that it depends on."""
        weights = batch.weights
        key = (
            data.dtype,
            data.stride(0),
            data.data_ptr() & 15,
            None if scale is None else (scale.stride(0), scale.data_ptr() & 15),
            None if topk_idx is None else topk_idx.data_ptr() & 15,
            None if weights is None else weights.data_ptr() & 15,
            call.num_sms,
            extent.max_tokens,
            self._is_staged and call.row_count,
        )
        kind = self._dispatches.get(key)
        if kind is None:
            own = self._on.own_of(extent, call.row_count)
            made = self._bind_dispatch(batch, data, scale, self._config(call), own, cached=topk_idx is None)
            kind = self._dispatches.keep(key, made)
        return kind

    def begin_combine(self, word: Word, at: At) -> None:
        """This rank's word for a combine that another kernel goes on with."""
        self._begin_combine(0, at.stream, at.room, word.payload, self._on.rank)

    def push(
        self, call: Call, plan: DevicePlan, y: Tensor, weights: Tensor | None, rows: Tensor | None, at: At
    ) -> None:
        """This rank's word, and its outputs ``y [R, H]`` at their owners, or the sums of them; ``combine`` goes on.

        Args:
            weights: ``[R]``, by which this rank weighs them; rows: which of them it sums, in place of the plan's.
        """
        kept, nothing = call.kept, self._on.nothing
        if kept is not None and _PUSH in kept:
            launch: Launch = kept[_PUSH]
        else:
            key = (
                (y.stride(0), y.data_ptr() & 15),
                None if weights is None else weights.data_ptr() & 15,
                None if rows is None else rows.data_ptr() & 15,
                call.num_sms,
            )
            bound = self._pushes.get(key)
            launch = bound or self._pushes.keep(key, self._bind_push(y, weights, rows, self._config(call)))
            if kept is not None:
                kept.keep(_PUSH, launch)
        launch(
            0,
            at.stream,
            y,
            nothing if weights is None else weights,
            nothing if rows is None else rows,
            y.shape[0],
            plan,
            at.room,
            plan.num_tokens,
            call.word.payload,
            self._on.rank,
            self._on.max_polls,
        )

    def combine(
        self,
        call: Call,
        plan: DevicePlan,
        out: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
        at: At,
        *,
        begins: bool,
    ) -> None:
        """The sums ``out [T, H]`` of outputs that lie where they were written, or have been pushed."""
        kept, nothing = call.kept, self._on.nothing
        if kept is not None and _SUM in kept:
            launch: Launch = kept[_SUM]
        else:
            key = (
                None if weights is None else weights.data_ptr() & 15,
                None if bias is None else (bias.dtype, bias.data_ptr() & 15),
                out.data_ptr() & 15,
                call.num_sms,
            )
            launch = self._sums.get(key) or self._sums.keep(key, self._bind_sum(weights, bias, self._config(call)))
            if kept is not None:
                kept.keep(_SUM, launch)
        launch(
            plan.num_tokens,
            at.stream,
            out,
            nothing if bias is None else bias,
            nothing if weights is None else weights,
            plan,
            at.room,
            plan.num_tokens,
            call.word.payload,
            self._on.rank,
            self._on.max_polls,
            _BEGINS if begins else 0,
            0 if bias is None or bias.dim() == 1 else 1,
        )

    def _config(self, call: Call) -> LaunchConfig:
        return self._launcher.config.using(call.num_sms)

    def _bind_dispatch(
        self, batch: Batch, data: Tensor, scale: Tensor | None, config: LaunchConfig, own: Own, *, cached: bool
    ) -> FusedDispatch:
        """The kernels of dispatches of tensors of these kinds."""
        on, spec, wire, layout = self._on, self._spec, self._spec.wire, self._on.arena.scales
        sent = self._send_kinds.sent_of(batch, config, own)
        size, row_bytes = data.element_size(), wire.data_bytes(spec.hidden)
        is_cast = isinstance(wire, Fp8) and scale is None
        block, unit, is_exponents, is_pow2, scales_of_word = 0, 1, False, False, 1
        places, scale_stride, num_scales, scale_word = places_of(layout), 0, 0, 1
        if is_cast:
            assert isinstance(wire, Fp8)
            assert self._cast is not None
            word = self._cast.data.element_size()
            block, unit = wire.block, wire.block // word
            is_exponents = wire.scale == "ue8m0"
            is_pow2 = is_exponents or wire.pow2
            num_scales, scale_word = self._cast.scale.shape[1], self._cast.scale.element_size()
            scales_of_word = wire.scale_dtype.itemsize // scale_word
        else:
            word = math.gcd(8, row_bytes, data.stride(0) * size, data.data_ptr() & 15)
        if scale is not None:
            scale_bytes = scale.element_size()
            num_bytes = scale.shape[1] * scale_bytes
            scale_word = scale_bytes
            if not (layout.column_major or sent.is_staged):
                scale_word = math.gcd(8, num_bytes, scale.stride(0) * scale_bytes, scale.data_ptr() & 15)
                places = places_of(layout, word_bytes=scale_word)
            num_scales, scale_stride = num_bytes // scale_word, scale.stride(0) * scale_bytes // scale_word
        if sent.is_staged:
            places = ScalePlaces(SEGMENT_BYTES=0, ROW_BYTES=sent.between, GROUP_BYTES=scales_of_word * scale_word)
        num_words = row_bytes // word
        beside = self._send_kinds.beside(sent, batch, 1, has_metadata=False)
        gaps = beside._replace(GAPS=beside.GAPS and not sent.is_staged)
        least = on.num_local if gaps.GAPS else 0

        def shape(num_tokens: int) -> Any:
            return config.fused_dispatch(num_words, num_tokens, spec.num_topk, unit=unit, least=least)

        one = shape(1)
        scale_piece = one.piece // unit if is_cast else power_of_two(num_scales or 1)
        strides = Strides(data.stride(0) if is_cast else data.stride(0) * size // word, scale_stride, 1)
        how = Fused(
            strides=strides,
            places=places,
            WORD=WORDS[word],
            ROW=num_words,
            PIECE=one.piece,
            PIECES=max(-(-num_words // one.piece), -(-num_scales // scale_piece)),
            ROW_BYTES=row_bytes,
            BETWEEN=sent.between,
            STAGED=sent.is_staged,
            CACHED=cached,
            BLOCK=block,
            SCALES=num_scales,
            SCALE_WORD=FLOAT32 if is_cast and not is_exponents else WORDS[scale_word],
            SCALE_PIECE=scale_piece,
            SCALES_OF_WORD=scales_of_word,
            POW2=is_pow2,
            EXPONENTS=is_exponents,
            STAGES=one.stages(word * size) if is_cast else 0,
            METADATA_WORDS=on.arena.metadata_bytes // 4,
            CROWDED=config.is_crowded,
            gaps=gaps,
        )
        send = self._launcher.bind(
            kernels.dispatch_rows,
            lambda num_tokens: shape(num_tokens).programs,
            own,
            self._send_kinds.arrivals_of(sent),
            self._shares,
            as_constants(how)._replace(strides=strides),
            num_warps=one.num_warps,
            enable_fp_fusion=not is_cast,
            maxnreg=one.most_registers,
            early=True,
        )
        if not sent.is_staged:
            return FusedDispatch(send, None)
        expand = self._send_kinds.bind_expand(sent, batch, config, is_fresh=not cached, zeroes_gaps=True)
        return FusedDispatch(send, expand)

    def _bind_push(self, y: Tensor, weights: Tensor | None, rows: Tensor | None, config: LaunchConfig) -> Launch:
        """The first kernel of combines that push, of tensors of these kinds."""
        spec, on, size = self._spec, self._on, y.element_size()
        row_bytes, of_pairs = spec.hidden * size, spec.ranks_sum_picks
        is_summed = of_pairs or weights is not None
        word = size if is_summed else math.gcd(8, row_bytes, y.stride(0) * size, y.data_ptr() & 15)
        num_rows = spec.max_tokens * (on.num_pairs if of_pairs else on.plan_shape.num_columns)
        shape = config.fused_push(row_bytes // word, num_rows, spec.num_topk, word_bytes=word, is_summed=is_summed)
        how = Returned(
            WORD=WORDS[word],
            ROW=row_bytes // word,
            ROW_BYTES=row_bytes,
            tiles=ONE_WORD._replace(PIECE=shape.piece),
            OF_PAIRS=of_pairs,
            HAS_WEIGHTS=weights is not None,
            GIVEN=rows is not None,
            ends=Ends(POSTS=True, AWAITS=NOBODY.value, COUNTED=False),
        )
        return self._launcher.bind(
            output_kernels.push_outputs,
            shape.programs,
            y.stride(0) * size // word,
            on.own,
            on.returns,
            self._came,
            as_constants(how),
            num_warps=shape.num_warps,
            maxnreg=shape.most_registers,
            enable_fp_fusion=False,
            early=True,
        )

    def _bind_sum(self, weights: Tensor | None, bias: Tensor | None, config: LaunchConfig) -> Launch:
        """The kernel of combines of tensors of these kinds."""
        spec, value_bytes = self._spec, self._spec.combine_dtype.itemsize

        def shape(num_tokens: int) -> Any:
            return config.fused_combine(spec.hidden, num_tokens, spec.num_topk, value_bytes=value_bytes)

        one = shape(1)
        how = Summed(
            J=self._on.num_pairs if spec.ranks_sum_picks else self._on.plan_shape.num_columns,
            H=spec.hidden,
            tiles=ONE_WORD._replace(PIECE=one.piece),
            OF_PAIRS=spec.ranks_sum_picks,
            HAS_WEIGHTS=weights is not None,
            HAS_BIAS=bias is not None,
            EXTRA_BYTES=0,
        )
        return self._launcher.bind(
            kernels.combine_rows,
            lambda num_tokens: shape(num_tokens).programs,
            self._on.own,
            self._on.returns,
            as_constants(how),
            num_warps=one.num_warps,
            maxnreg=one.most_registers,
            enable_fp_fusion=False,
            early=True,
        )


def _cast_rows(spec: Spec, wire: Fp8, device: torch.device) -> _Rows:
    """Room for this rank's rows as they travel."""
    data = torch.zeros(spec.max_tokens, spec.hidden, dtype=torch.uint8, device=device)
    num_scales, dtype = spec.hidden // wire.block, torch.float32
    if wire.scale == "ue8m0":
        num_scales, dtype = wire.num_scales(spec.hidden) * wire.scale_dtype.itemsize, torch.uint8
    words = data.view(dtype_of(math.gcd(8, spec.hidden, wire.block)))
    return _Rows(words, torch.zeros(spec.max_tokens, num_scales, dtype=dtype, device=device))
