"""Launches of what moves rows, and of the small things beside them.

Letters: T tokens here, J rows of a token, K top-k, H hidden, R rows, Q rows sent.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from crossdock.backends.cuda.config import Shape, power_of_two, src_rows_at_once
from crossdock.backends.cuda.kernels import cast, metadata, rows, sums
from crossdock.backends.cuda.kernels import plan as plan_kernels
from crossdock.backends.cuda.launch import Launcher, kind_of
from crossdock.backends.cuda.plan import DevicePlan, Table
from crossdock.backends.cuda.scales import constants
from crossdock.layout import Padded
from crossdock.wire import Fp8

_TOKENS = 32
"""Tokens whose records one program writes."""
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class RowKernels:
    """The wide kernels, on a launcher's stream: they wait for nobody."""

    def __init__(self, launcher: Launcher) -> None:
        self._on = launcher
        self._hidden, self._num_topk = launcher.arena.spec.hidden, launcher.arena.spec.num_topk

    def push_rows(self, x: Tensor, table: Table, region: str, *, offset: int = 0, row_bytes: int | None = None) -> None:
        """Rows ``x [T, ...]`` to their places in a region, ``offset`` bytes into rows ``row_bytes`` apart."""
        num_tokens = x.shape[0]
        if not num_tokens:
            return
        words = as_words(x)
        own_bytes = words.shape[1] * words.element_size()
        shape = self._on.config.rows(own_bytes, is_counted=True)
        piece = max(1, shape.piece_bytes // words.element_size())
        at_once = shape.num_rows
        self._on.launch(
            rows.push_rows,
            _grid(-(-num_tokens // at_once) * -(-words.shape[1] // piece), shape),
            words,
            table.dst_rows,
            self._on.segments,
            self._on.call,
            self._on.state,
            num_tokens,
            words.stride(0),
            self._on.arena[region].offset + offset,
            self._on.slot_bytes(region),
            J=table.dst_rows.shape[1],
            ROW=words.shape[1],
            ROW_BYTES=row_bytes or own_bytes,
            PIECE=piece,
            TOKENS=at_once,
            given=(*kind_of(words), words.stride(0), region, offset),
            num_warps=shape.num_warps,
        )

    def push_cast(self, x: Tensor, table: Table, *, staged: bool) -> None:
        """Rows ``x [T, H]``, cast to the wire, to their places; ``staged``: to where rows land that are copied."""
        num_tokens, wire = x.shape[0], self._on.arena.spec.wire
        assert isinstance(wire, Fp8)
        if not num_tokens:
            return
        hidden = self._hidden
        scale_bytes = wire.num_scales(hidden) * wire.scale_dtype.itemsize
        num_stored = scale_bytes if wire.scale == "ue8m0" else hidden // wire.block
        shape = self._on.config.rows(hidden * x.element_size(), is_counted=True)
        values = max(2048, shape.piece_bytes // 2)
        groups = max(1, min(power_of_two(num_stored), values // power_of_two(wire.block)))
        out_bytes = hidden * self._on.arena.spec.combine_dtype.itemsize
        region = "outputs" if staged else "data"
        word_bytes = wire.scale_dtype.itemsize
        scales = constants(self._on.arena.scales)
        if staged:
            scales |= {"SEGMENT_ROWS": 0, "SEGMENT_BYTES": 0, "SCALE_BYTES": out_bytes, "GROUP_BYTES": word_bytes}
        warps = max(1, min(16, groups * power_of_two(wire.block) // 512))  # 16 values a thread, for wide stores
        self._on.launch(
            cast.push_cast,
            _grid(num_tokens * -(-num_stored // groups), shape),
            x,
            table.dst_rows,
            self._on.segments,
            self._on.call,
            self._on.state,
            num_tokens,
            x.stride(0),
            self._on.arena[region].offset,
            self._on.slot_bytes(region),
            self._on.arena[region].offset + hidden if staged else self._on.arena["scale"].offset,
            self._on.slot_bytes("outputs" if staged else "scale"),
            J=table.dst_rows.shape[1],
            H=hidden,
            BLOCK=wire.block,
            DATA_BYTES=out_bytes if staged else hidden,
            **scales,
            WORD=word_bytes if wire.scale == "ue8m0" else 1,
            SCALES=num_stored,
            GROUPS=groups,
            POW2=wire.pow2 or wire.scale == "ue8m0",
            EXPONENTS=wire.scale == "ue8m0",
            given=(*kind_of(x), x.stride(0), staged),
            num_warps=warps,
            enable_fp_fusion=False,
        )

    def push_metadata(self, topk_idx: Tensor, weights: Tensor | None, extras: Tensor | None, table: Table) -> None:
        """The small things beside rows: sources, ids, weights ``[T, K]``, extras int32 ``[T, n]``."""
        num_tokens = topk_idx.shape[0]
        if not num_tokens:
            return
        spec = self._on.arena.spec
        self._on.launch(
            metadata.push_metadata,
            (-(-num_tokens // _TOKENS),),
            topk_idx,
            topk_idx if weights is None else weights.view(torch.int32),
            topk_idx if extras is None else extras,
            table.dst_rows,
            self._on.segments,
            self._on.call,
            self._on.state,
            num_tokens,
            self._on.rank * spec.max_tokens,
            self._on.arena["metadata"].offset,
            self._on.slot_bytes("metadata"),
            K=self._num_topk,
            J=table.dst_rows.shape[1],
            PER_PICK=spec.layout.per_pick,
            METADATA_WORDS=self._on.arena.metadata_bytes // 4,
            EXTRA=0 if extras is None else extras.shape[1],
            HAS_WEIGHTS=weights is not None,
            TOKENS=_TOKENS,
            given=(kind_of(topk_idx), kind_of(weights)),
            num_warps=4,
        )

    def unpack_metadata(
        self, slot: int, plan: DevicePlan, src_idx: Tensor, topk_idx: Tensor | None, weights: Tensor | None
    ) -> None:
        """Sources ``[n]``, local experts ``[n, K]`` and weights of the first n rows of a slot."""
        num_rows = src_idx.shape[0]
        if not num_rows:
            return
        spec = self._on.arena.spec
        num_blocks = plan.rows.incoming.shape[1]
        at_once = max(1, 2048 // power_of_two(1 if spec.layout.per_pick else self._num_topk))
        at_once = min(at_once, src_rows_at_once(num_blocks))
        of_slot = self._on.view("metadata", slot).view(torch.int32)
        self._on.launch(
            metadata.unpack_metadata,
            (-(-num_rows // at_once),),
            of_slot,
            plan.rows.incoming,
            plan.scalars,
            plan.rows.src_rows,
            src_idx,
            src_idx if topk_idx is None else topk_idx,
            src_idx if weights is None else weights.view(torch.int32),
            self._on.state,
            num_rows,
            self._on.rank * self._on.num_local,
            L=self._on.num_local,
            K=self._num_topk,
            PER_PICK=spec.layout.per_pick,
            METADATA_WORDS=self._on.arena.metadata_bytes // 4,
            HAS_WEIGHTS=weights is not None,
            IS_FRESH=plan.src_idx is None,
            BLOCKS=num_blocks,
            P=self._on.num_ranks,
            ROWS=at_once,
            given=kind_of(of_slot),
            num_warps=4,
        )

    def push_partial_rows(self, rows_table: Table, pairs: Table) -> None:
        """Tells each rank which of its rows belong to one token."""
        num_tokens = pairs.dst_rows.shape[0]
        if not num_tokens:
            return
        self._on.launch(
            metadata.push_partial_rows,
            (-(-num_tokens // _TOKENS),),
            rows_table.dst_rows,
            pairs.dst_rows,
            self._on.segments,
            self._on.call,
            self._on.state,
            num_tokens,
            self._on.arena["partial_rows"].offset,
            self._on.slot_bytes("partial_rows"),
            K=self._num_topk,
            J=pairs.dst_rows.shape[1],
            TOKENS=_TOKENS,
            num_warps=4,
        )

    def expand_rows(self, slot: int, region: str, plan: DevicePlan, *, offset: int) -> None:
        """Arrived rows of a slot, ``offset`` bytes into output rows, to the places of their picks in a region."""
        assert plan.partial_rows is not None
        out_bytes = self._hidden * self._on.arena.spec.combine_dtype.itemsize
        staged = self._on.view("outputs", slot).view(torch.uint8).view(-1)[offset:]
        target = as_words(self._on.view(region, slot), int(staged.storage_offset()), staged.data_ptr(), out_bytes)
        size = target.element_size()
        staged = staged[: staged.shape[0] // size * size].view(target.dtype)
        shape = self._on.config.rows(target.shape[1] * size, is_counted=False)
        piece = max(1, shape.piece_bytes // size)
        self._on.launch(
            rows.expand_rows,
            _grid(1, shape),
            staged,
            target,
            plan.partial_rows,
            plan.scalars,
            self._on.state,
            out_bytes // size,
            NUM=plan_kernels.NUM_PAIRS.value,
            K=self._num_topk,
            ROW=target.shape[1],
            PIECE=piece,
            given=(kind_of(staged), kind_of(target), kind_of(plan.partial_rows)),
            num_warps=shape.num_warps,
        )

    def zero_gaps(self, slot: int, region: str, plan: DevicePlan) -> None:
        """Zeroes what alignment left between the segments of a slot."""
        words = as_words(self._on.view(region, slot))
        piece = min(power_of_two(words.shape[1]), 1024)
        self._on.launch(
            rows.zero_gaps,
            (self._on.num_local, -(-words.shape[1] // piece)),
            words,
            plan.rows.incoming,
            plan.segment_starts,
            self._on.state,
            P=self._on.num_ranks,
            N=self._on.num_local,
            ROW=words.shape[1],
            PIECE=piece,
            given=kind_of(words),
            num_warps=4,
        )

    def return_rows_to(self, y: Tensor, plan: DevicePlan, table: Table, region: str, row_bytes: int) -> None:
        """Rows ``y [R, ...]`` to their return_rows in a region of their owners."""
        words = as_words(y)
        shape = self._return_shape(words.shape[1] * words.element_size())
        piece = max(1, shape.piece_bytes // words.element_size())
        self._on.launch(
            rows.return_rows_to,
            _grid(1, shape),
            words,
            table.src_rows,
            plan.scalars,
            self._on.segments,
            self._on.call,
            self._on.state,
            words.stride(0),
            self._on.arena[region].offset,
            self._on.slot_bytes(region),
            NUM=(plan_kernels.NUM_PAIRS if table is plan.pairs else plan_kernels.NUM_ROWS).value,
            ROW=words.shape[1],
            ROW_BYTES=row_bytes,
            PIECE=piece,
            given=(*kind_of(words), words.stride(0), region),
            num_warps=shape.num_warps,
        )

    def push_sums(self, y: Tensor, plan: DevicePlan, weights: Tensor | None) -> None:
        """This rank's sums of the rows of each pair (or each row, weighted), to their return_rows."""
        pairs = plan.pairs if plan.sums_pairs else None
        table = pairs or plan.rows
        shape = self._return_shape(self._hidden * y.element_size())
        self._on.launch(
            sums.push_sums,
            _grid(1, shape),
            y,
            y if weights is None else weights,
            table.src_rows if pairs is None else plan.partial_rows,
            table.src_rows,
            plan.scalars,
            self._on.segments,
            self._on.call,
            self._on.state,
            y.stride(0),
            self._on.arena["returned"].offset,
            self._on.slot_bytes("returned"),
            NUM=(plan_kernels.NUM_ROWS if pairs is None else plan_kernels.NUM_PAIRS).value,
            K=0 if pairs is None else self._num_topk,
            H=self._hidden,
            PIECE=max(1, shape.piece_bytes // y.element_size()),
            HAS_WEIGHTS=weights is not None,
            given=(*kind_of(y), y.stride(0), kind_of(weights), kind_of(plan.partial_rows)),
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )

    def sum_rows(self, out: Tensor, plan: DevicePlan, weights: Tensor | None, bias: Tensor | None, slot: int) -> None:
        """``out [T, H]`` from each token's rows, weighted ``[T, J]``; what was pushed lies in that returned slot."""
        num_tokens = out.shape[0]
        if not num_tokens:
            return
        table = plan.back
        returned = self._on.arena["returned"].offset + slot * self._on.slot_bytes("returned")
        shape = self._on.config.sums(self._hidden * out.element_size(), table.dst_rows.shape[1])
        piece = max(1, shape.piece_bytes // out.element_size())
        self._on.launch(
            sums.sum_rows,
            _grid(num_tokens * -(-self._hidden // piece), shape),
            out,
            out if bias is None else bias,
            out if weights is None else weights,
            table.dst_rows,
            table.return_rows,
            self._on.segments,
            self._on.call,
            self._on.state,
            num_tokens,
            self._on.rank,
            self._on.arena["outputs"].offset,
            self._on.slot_bytes("outputs"),
            returned,
            int(bias is not None and bias.dim() == 2),
            J=table.dst_rows.shape[1],
            H=self._hidden,
            PIECE=piece,
            HAS_WEIGHTS=weights is not None,
            HAS_BIAS=bias is not None,
            given=(kind_of(weights), kind_of(bias), returned < 2**31),
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )

    def weigh_rows(self, topk_idx: Tensor, weights: Tensor, table: Table, out: Tensor) -> None:
        """Weights of rows that serve several picks, ``[T, J]`` from ``[T, K]``."""
        if out.shape[0]:
            self._on.launch(
                sums.weigh_rows,
                (-(-out.shape[0] // _TOKENS),),
                topk_idx,
                weights,
                table.dst_rows,
                out,
                out.shape[0],
                L=self._on.num_local,
                K=self._num_topk,
                J=out.shape[1],
                TOKENS=_TOKENS,
                given=(kind_of(topk_idx), kind_of(weights)),
                num_warps=4,
            )

    def pack_rows(self, x: Tensor, table: Table, packed: Tensor) -> None:
        """Rows ``x [T, ...]`` into this rank's sending order, ``[Q, ...]``."""
        if not x.shape[0]:
            return
        words = as_words(x)
        shape = self._on.config.rows(words.shape[1] * words.element_size(), is_counted=True)
        piece = max(1, shape.piece_bytes // words.element_size())
        self._on.launch(
            rows.pack_rows,
            _grid(x.shape[0] * -(-words.shape[1] // piece), shape),
            words,
            table.dst_rows,
            table.return_rows,
            packed.view(torch.uint8).view(words.dtype),
            self._on.state,
            x.shape[0],
            words.stride(0),
            J=table.dst_rows.shape[1],
            ROW=words.shape[1],
            PIECE=piece,
            given=(*kind_of(words), words.stride(0)),
            num_warps=shape.num_warps,
        )

    def _return_shape(self, row_bytes: int) -> Shape:
        shape = self._on.config.rows(row_bytes, is_counted=False)
        if isinstance(
            self._on.arena.spec.layout, Padded
        ):  # most rows are none: look at each once, not at all its pieces
            return replace(shape, piece_bytes=power_of_two(row_bytes), num_warps=max(4, shape.num_warps))
        return shape


def as_words(rows_of: Tensor, *others: int) -> Tensor:
    """Rows ``[n, H]``, each without gaps, as words: of the widest type that divides all sizes and addresses."""
    size = rows_of.element_size()
    bytes_of = (rows_of.shape[1] * size, rows_of.stride(0) * size, rows_of.storage_offset() * size)
    widest = math.gcd(8, *bytes_of, rows_of.data_ptr(), *others)
    return rows_of.view(_WORDS[widest]) if widest != size or rows_of.dtype.is_floating_point else rows_of


def rowwise(rows: Tensor, on: Launcher) -> Tensor:
    """Rows ``[n, ...]`` each of which has no gaps: themselves, or copies that are ours."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else on.dense(rows)


def _grid(num_items: int, shape: Shape) -> tuple[int]:
    return (num_items if shape.programs is None else shape.programs,)
