"""Calls of few tokens, each one kernel on the caller's stream, or two where work of the caller's goes in between.

Letters: T tokens here, K top-k, H hidden, P ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.base import Batch, Call
from crossdock.backends.cuda.config import power_of_two
from crossdock.backends.cuda.consent import DeviceConsent
from crossdock.backends.cuda.kernels import fused as kernels
from crossdock.backends.cuda.launch import Launcher, Prepared, kind_of
from crossdock.backends.cuda.plan import DevicePlan
from crossdock.backends.cuda.planner import Planner
from crossdock.backends.cuda.rows import as_words, rowwise
from crossdock.backends.cuda.scales import constants
from crossdock.consent import Kind, Missing, Steps, Word
from crossdock.plan import Plan
from crossdock.scales import as_integers
from crossdock.spec import Spec
from crossdock.wire import Fp8, Quantized

_PATIENCE = 32
"""Polls, some 10 us, after which a call that is only started leaves its rows to ``wait()``."""
_LEFT = Missing((), "finish", has_sent=True)
"""What a call that has been started leaves to ``wait()``."""
_NO_WORD = Word(Kind.DISPATCH, 0)


class _Sent(NamedTuple):
    """What a dispatch sends, as its kernel takes it."""

    values: Tensor
    """Values to be cast, or ``rows``."""
    rows: Tensor
    """Words."""
    scale: Tensor | None
    weights: Tensor | None
    """Bits of float32."""
    is_cast: bool


class FusedCalls:
    """The calls of a buffer whose ``LaunchConfig`` says ``is_fused``, each one kernel."""

    def __init__(self, arena: Arena, launcher: Launcher, planner: Planner, consent: DeviceConsent) -> None:
        self._arena = arena
        self._spec = arena.spec
        self._on = launcher
        self._default = launcher.config
        self._planner = planner
        self._consent = consent
        spec, device = self._spec, launcher.device
        self._go, self._ticket, self._refused = torch.zeros(3, 1, dtype=torch.int32, device=device).unbind()
        self._nths = torch.zeros(spec.max_tokens, spec.num_topk, dtype=torch.int32, device=device)
        self._to_rows, self._to_scales = torch.zeros(2, *self._nths.shape, dtype=torch.int64, device=device).unbind()
        rooms = (launcher.config.most_programs(spec.num_topk), spec.num_experts)
        self._scratch_counts = torch.zeros(rooms, dtype=torch.int32, device=device)
        self._column_major = arena.scales.column_major
        self._cast = _cast_rows(spec, spec.wire, device) if isinstance(spec.wire, Fp8) else None
        self._dispatches: dict[Any, Prepared] = {}
        self._sums: dict[Any, Prepared] = {}
        """What has been prepared, by what may differ between calls."""
        self._returned, self._returned_slot_bytes = self._region("returned")
        self._at_peers = constants(arena.scales)
        self._blocks = launcher.blocks_of_rows()
        self._of_all = (
            launcher.segments,
            launcher.state,
            launcher.failure,
            launcher.host_failure,
            launcher.rank,
        )
        """What the kernels of whole calls begin with."""
        self._boxes = tuple(arena[name].offset for name in ("words", "arrived", "aborts", "counts"))
        self._lands = tuple(
            at
            for name in ("data", "scale", "metadata")
            for at in (self._region(name) if name in arena.regions else (0, 0))
        )

    def _region(self, name: str) -> tuple[int, int]:
        """Where a region begins, and how large its slots are."""
        return self._arena[name].offset, self._on.slot_bytes(name)

    def takes_dispatch(self, batch: Batch, routing: Plan | Tensor) -> bool:
        """See FusedCalls. Fresh ones, of what has room in a record as it is."""
        return isinstance(routing, Tensor) and not batch.unquantized and not batch.extras

    def dispatch(self, call: Call, batch: Batch, topk_idx: Tensor) -> Steps[DevicePlan]:
        """From picks to rows in place: the plan, once its rows are here.

        A call that is only started yields after rows have been sent, or when a peer is late.
        """
        if call.at_once and not call.is_first:  # its kernel waits for peers
            yield Missing((), "come to its turn")
        yield from self._consent.opening(call.sequence)
        self._on.enter()
        self._on.use_sms(call.num_sms, self._default)
        plan, room = self._planner.blank(topk_idx.shape[0], stamp=call.sequence), self._on.next_call()
        self._consent.remembers(plan)
        self._send_rows(plan, call.word, batch, topk_idx, room, begins=True, awaits=call.at_once)
        if not call.at_once:
            yield _LEFT
            self._on.enter()
            self._send_rows(plan, call.word, batch, plan.topk_idx, room, begins=False, awaits=True)
        self._planner.placed(plan, call.sequence, call.row_count)
        return plan

    def combine(self, call: Call, plan: DevicePlan, weights: Tensor | None, bias: Tensor | None) -> Steps[Tensor]:
        """The sums of outputs that lie where they were written. One that is only started yields after the word."""
        if call.at_once and not call.is_first:  # its kernel waits for peers
            yield Missing((), "come to its turn")
        yield from self._consent.opening(call.sequence)
        self._on.enter()
        self._on.use_sms(call.num_sms, self._default)
        room = self._on.next_call()
        if not call.at_once:
            self._give_word(call.word, room)
            yield _LEFT
            self._on.enter()
        weights, bias = (None if given is None else self._on.dense(given) for given in (weights, bias))
        out = self._on.empty(plan.num_tokens, self._spec.hidden, dtype=self._spec.combine_dtype)
        self._sum_rows(out, plan, call.word, weights, bias, room, begins=call.at_once)
        return out

    def _give_word(self, word: Word, call: Tensor) -> None:
        """This rank's word for a call that another kernel goes on with."""
        self._on.launch(
            kernels.begin_combine,
            (1,),
            self._on.segments,
            self._on.state,
            call,
            word.payload(),
            self._on.rank,
            self._arena["words"].offset,
            P=self._on.num_ranks,
            RING=self._arena.ring,
            given=(word.payload() < 2**31,),
            num_warps=1,
        )

    def _send_rows(
        self,
        plan: DevicePlan,
        word: Word,
        batch: Batch,
        topk_idx: Tensor,
        call: Tensor,
        *,
        begins: bool,
        awaits: bool,
    ) -> None:
        on, sent, payload = self._on, self._as_words(batch), word.payload()
        values, rows, scale, weights, is_cast = sent
        given = (
            *map(kind_of, (topk_idx, weights, values, scale)),
            values.stride(0),
            None if scale is None else scale.stride(0),
            payload < 2**31,
        )
        key = (plan.num_tokens, on.config.num_sms, begins, awaits, is_cast, *given)
        if (launch := self._dispatches.get(key)) is None:
            launch = self._prepared_dispatch(plan.num_tokens, sent, given, begins=begins, awaits=awaits)
            self._dispatches[key] = launch
        assert plan.host_counts is not None
        assert plan.room is not None
        on.run(
            launch,
            call,
            payload,
            on.max_polls,
            plan.host_counts.row,
            *(plan.room.addresses() if launch.is_compiled else plan.room.tensors()),
            topk_idx,
            self._nths if weights is None else weights,
            values,
            rows,
            rows if scale is None else scale,
        )

    def _as_words(self, batch: Batch) -> _Sent:
        on, x = self._on, batch.x
        weights = None if batch.weights is None else on.dense(batch.weights).view(torch.int32)
        if isinstance(x, Quantized):
            words, scale = as_words(rowwise(x.data, on)), rowwise(x.scale, on)
            scale = as_integers(scale) if self._column_major else as_words(scale)
            return _Sent(words, words, scale, weights, is_cast=False)
        if self._cast is not None:
            return _Sent(rowwise(x, on), self._cast.data, self._cast.scale, weights, is_cast=True)
        words = as_words(rowwise(x, on))
        return _Sent(words, words, None, weights, is_cast=False)

    def _prepared_dispatch(
        self, num_tokens: int, sent: _Sent, given: tuple[Any, ...], *, begins: bool, awaits: bool
    ) -> Prepared:
        """What dispatches of as many tokens, and of tensors of these kinds, have in common."""
        on, arena, spec, wire = self._on, self._arena, self._spec, self._spec.wire
        values, rows, scale, weights, is_cast = sent
        num_scales, scale_bytes = (0, 1) if scale is None else (scale.shape[1], scale.element_size())
        block, unit, is_exponents, is_pow2, scales_of_word = 0, 1, False, False, 1
        group_bytes = self._at_peers["GROUP_BYTES"]
        if is_cast:
            assert isinstance(wire, Fp8)
            block, unit = wire.block, wire.block // rows.element_size()
            is_exponents = wire.scale == "ue8m0"
            is_pow2 = is_exponents or wire.pow2
            scales_of_word = wire.scale_dtype.itemsize // scale_bytes
        elif scale is not None and not self._column_major:
            group_bytes = scale_bytes
        shape = on.config.fused_dispatch(rows.shape[1], num_tokens, spec.num_topk, unit=unit)
        scale_piece = shape.piece // unit if is_cast else power_of_two(num_scales or 1)
        return Prepared(
            kernels.dispatch_rows,
            (shape.programs,),
            (
                *self._of_all,
                _PATIENCE,
                int(begins),
                int(awaits),
                *self._boxes,
                on.send_starts,
                on.tokens,
                spec.capacity(on.num_ranks),
                self._go,
                self._ticket,
                self._refused,
                self._nths,
                self._to_rows,
                self._to_scales,
                self._scratch_counts,
                int(weights is not None),
                num_tokens,
                values.stride(0),
                rows.stride(0),
                0 if scale is None else scale.stride(0),
                on.rank * spec.max_tokens,
                *self._lands,
            ),
            {
                "P": on.num_ranks,
                "RING": arena.ring,
                **self._blocks,
                "K": spec.num_topk,
                "ROW": rows.shape[1],
                "PIECE": shape.piece,
                "PIECES": max(-(-rows.shape[1] // shape.piece), -(-num_scales // scale_piece)),
                "ROW_BYTES": spec.hidden * wire.dtype.itemsize,
                "BLOCK": block,
                "SCALES": num_scales,
                "SCALE_PIECE": scale_piece,
                **self._at_peers | {"GROUP_BYTES": group_bytes},
                "SCALES_OF_WORD": scales_of_word,
                "POW2": is_pow2,
                "EXPONENTS": is_exponents,
                "STAGES": shape.stages(rows.element_size() * values.element_size()) if is_cast else 0,
                "METADATA_WORDS": arena.metadata_bytes // 4,
                "CROWDED": on.config.is_crowded,
            },
            {
                "given": given,
                "num_warps": shape.num_warps,
                "enable_fp_fusion": not is_cast,
                "maxnreg": shape.most_registers,
                "early": True,
            },
        )

    def _sum_rows(
        self,
        out: Tensor,
        plan: DevicePlan,
        word: Word,
        weights: Tensor | None,
        bias: Tensor | None,
        call: Tensor,
        *,
        begins: bool,
    ) -> None:
        rows = plan.rows
        payload, returned = word.payload(), self._returned + word.slot * self._returned_slot_bytes
        given = (kind_of(weights), kind_of(bias), payload < 2**31, returned < 2**31)
        key = (plan.num_tokens, self._on.config.num_sms, begins, None if bias is None else bias.dim(), *given)
        if (launch := self._sums.get(key)) is None:
            launch = self._sums[key] = self._prepared_sums(plan.num_tokens, weights, bias, given, begins=begins)
        self._on.run(
            launch,
            call,
            payload,
            self._on.max_polls,
            out,
            out if bias is None else bias,
            out if weights is None else weights,
            *(rows.address("dst_rows"), rows.address("return_rows"))
            if launch.is_compiled
            else (rows.dst_rows, rows.return_rows),
            returned,
        )

    def _prepared_sums(
        self,
        num_tokens: int,
        weights: Tensor | None,
        bias: Tensor | None,
        given: tuple[Any, ...],
        *,
        begins: bool,
    ) -> Prepared:
        """What combines of as many tokens, and of tensors of these kinds, have in common."""
        on, arena, spec = self._on, self._arena, self._spec
        value_bytes = spec.combine_dtype.itemsize
        shape = on.config.fused_combine(spec.hidden, num_tokens, spec.num_topk, value_bytes=value_bytes)
        return Prepared(
            kernels.combine_rows,
            (shape.programs,),
            (
                *self._of_all,
                int(begins),
                *self._boxes[:3],
                self._go,
                self._ticket,
                num_tokens,
                arena["outputs"].offset,
                on.slot_bytes("outputs"),
                int(bias is not None and bias.dim() == 2),
            ),
            {
                "P": on.num_ranks,
                "RING": arena.ring,
                "J": spec.num_topk,
                "H": spec.hidden,
                "PIECE": shape.piece,
                "HAS_WEIGHTS": weights is not None,
                "HAS_BIAS": bias is not None,
            },
            {
                "given": given,
                "num_warps": shape.num_warps,
                "maxnreg": shape.most_registers,
                "enable_fp_fusion": False,
                "early": True,
            },
        )

    def warm_up(self, batch: Batch, picks: Tensor) -> DevicePlan:
        """Launches all that a dispatch may launch; only while calls are void."""
        plan, call = self._planner.blank(picks.shape[0], stamp=0), self._on.next_call()
        self._send_rows(plan, _NO_WORD, batch, picks, call, begins=True, awaits=True)
        return plan

    def warm_up_sums(self, plan: Plan, weights: Tensor | None, bias: Tensor | None) -> None:
        """Launches all that a combine may launch; only while calls are void."""
        assert isinstance(plan, DevicePlan)
        call = self._on.next_call()
        self._give_word(_NO_WORD, call)
        out = self._on.empty(plan.num_tokens, self._spec.hidden, dtype=self._spec.combine_dtype)
        self._sum_rows(out, plan, _NO_WORD, weights, bias, call, begins=True)


def _cast_rows(spec: Spec, wire: Fp8, device: torch.device) -> Quantized:
    """Room for this rank's rows as they travel: words ``[M, ROW]``, and scales, bytes where these are exponents."""
    data = torch.zeros(spec.max_tokens, spec.hidden, dtype=torch.uint8, device=device)
    num_scales, dtype = spec.hidden // wire.block, torch.float32
    if wire.scale == "ue8m0":
        num_scales, dtype = wire.num_scales(spec.hidden) * wire.scale_dtype.itemsize, torch.uint8
    return Quantized(as_words(data, wire.block), torch.zeros(spec.max_tokens, num_scales, dtype=dtype, device=device))
