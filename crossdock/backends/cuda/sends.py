"""Dispatches of several kernels: what is bound for one kind of them, from picks and rows to rows in place.

Letters: T tokens here, J rows of a token, K top-k, H hidden, R rows received.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from crossdock.backends.base import Batch
from crossdock.backends.cuda.config import LaunchConfig, Shape, power_of_two
from crossdock.backends.cuda.kernels import calls as call_kernels
from crossdock.backends.cuda.kernels import cast as cast_kernels
from crossdock.backends.cuda.kernels import plan as plan_kernels
from crossdock.backends.cuda.kernels import rows as row_kernels
from crossdock.backends.cuda.kernels.groups import (
    WORDS,
    Beside,
    Cast,
    Copied,
    Ends,
    Expanded,
    Own,
    Pushed,
    PushedCast,
    ScalePlaces,
    Strides,
    Tiles,
    as_constants,
)
from crossdock.backends.cuda.launch import Launch, Launcher
from crossdock.backends.cuda.scales import NO_SCALES, places_of, shared_out
from crossdock.extent import Extent, RowCount
from crossdock.layout import Expanded as ExpandedLayout
from crossdock.wire import Fp8, Quantized

PICKS_TO_PLACE = 128
"""Picks that a program compares with each other."""
_CELLS = 8192
"""Counts of chunks that a program sums at a time."""
_CELLS_OF_THREAD = 4
"""Words of metadata that a program writes at a time, for each of its threads."""
_CAST, _CAST_BY_SM, _WARP_CASTS = 2048, 16384, 512
"""Values that a program casts at a time: many programs, or one for each SM."""
_NO_SHAPE = Shape(piece_bytes=1, num_warps=4, programs=1)


@dataclass(frozen=True, eq=False)
class SendKind:
    """What dispatches of one kind launch. None: such a kind has no need of it."""

    begin: Launch
    """Of a fresh dispatch: counts and words. Else words alone."""
    place: Launch | None
    """Of a fresh dispatch: where rows go, and what travels beside them."""
    push: Launch | None
    """Where the host copies blocks, of what travels beside them."""
    finish: Launch
    """Where the push waits for nobody."""
    expand: Launch | None
    is_cast: bool
    """Whether the push casts."""
    pushes_beside: bool
    """Whether it sends what travels beside rows."""
    most_tokens: int
    """Whose rows a push can end by itself: more tokens are too many programs for that."""
    ends_late: bool
    """Whether ``finish`` tells that rows are in place: once the host has made room for those that come here."""
    end: Launch
    """Behind a push that does not."""


class Sent(NamedTuple):
    """How a dispatch's rows go: in which words, and where they land."""

    region: str
    is_staged: bool
    """Whether one row goes to each rank, to be copied to its places there."""
    is_cast: bool
    row_bytes: int
    """Of a row as it travels."""
    between: int
    """Bytes from row to row where they land."""
    scale_offset: int
    """From a staged row to its scales."""
    scale_bytes: int
    """Of a row's scales as they travel; 0 for none."""
    own: Own
    """What kernels are given for calls of the dispatch's M."""


IN_SLOT = (0, 0, 0, 0)
"""Where staged rows are expanded to, as their kernel takes it: to their places in the slot."""
ONE_WORD = Tiles(ROWS=1, PARTS=1, PIECE=1, PIECES=1, AT_ONCE=1, OWN=0)
"""Of kernels that share out rows by themselves, and look at PIECE at most."""


def where_of(into: Tensor | Quantized) -> tuple[int, int, int, int]:
    """The same of memory that they are expanded into: addresses, words between scales, rows."""
    if isinstance(into, Tensor):
        return into.data_ptr(), 0, 0, into.shape[0]
    return into.data.data_ptr(), into.scale.data_ptr(), into.scale.stride(1), into.data.shape[0]


class SendKinds:
    """Makes the kinds of a buffer's dispatches."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._on = launcher.state
        self.arena = launcher.state.arena
        self._spec = launcher.state.arena.spec
        self._is_staged = self._spec.is_staged

    def key(
        self,
        batch: Batch,
        topk_idx: Tensor | None,
        num_sms: int | None,
        max_tokens: int,
        row_count: RowCount,
        *,
        known: bool,
    ) -> Any:
        """All that may differ between kinds.

        Args:
            batch: rows without gaps; weights and extras as they travel.
            topk_idx: of a fresh dispatch; known: of another, whether the plan knows where its rows come from.
        """
        x, weights, extras, unquantized = batch
        is_fresh = topk_idx is not None
        aligned = topk_idx is not None and topk_idx.data_ptr() & 15
        beside = weights is not None or bool(extras)
        weights_at = None if weights is None else weights.data_ptr() & 15
        counts = self._is_staged and row_count
        given = (aligned, weights_at, bool(extras), known and not beside)
        same = (is_fresh, given, unquantized, num_sms, max_tokens, counts)
        if isinstance(x, Tensor):
            return (x.dtype, x.stride(0), x.data_ptr() & 15, same)
        data, scale = x.data, x.scale
        return (data.stride(0), data.data_ptr() & 15, scale.stride(), scale.data_ptr() & 15, same)

    def make(
        self,
        batch: Batch,
        config: LaunchConfig,
        extent: Extent,
        row_count: RowCount,
        *,
        is_fresh: bool,
        known: bool,
    ) -> SendKind:
        """What such a dispatch launches; see ``key``."""
        sent = self.sent_of(batch, config, self._on.own_of(extent, row_count))
        ends_late = self._is_staged and is_fresh and row_count == "exact"
        has_metadata = not known or batch.weights is not None or bool(batch.extras)
        counted = not batch.unquantized
        is_copied = config.mover == "copy"
        ends = Ends(POSTS=True, AWAITS=call_kernels.ALL.value, COUNTED=counted)
        at_push = Ends(POSTS=False, AWAITS=call_kernels.NOBODY.value, COUNTED=False) if ends_late else ends
        if not is_fresh:
            begin, place = self._bind_begin_cached(), None
        else:
            begin, place = self._bind_begin(sent), self._bind_place(sent, batch)
        push = None
        if not is_copied:
            push = self._bind_push(sent, batch, config, at_push, is_fresh=is_fresh, has_metadata=has_metadata)
        if is_copied and not is_fresh and has_metadata:
            push = self._bind_beside(sent, batch)
        return SendKind(
            begin=begin,
            place=place,
            push=push,
            finish=self.bind_finish(ends._replace(POSTS=is_copied or ends_late)),
            expand=self.bind_expand(
                sent, batch, config, is_fresh=is_fresh, zeroes_gaps=self._is_staged or not is_fresh
            ),
            is_cast=sent.is_cast and not is_copied,
            pushes_beside=has_metadata and not is_fresh,
            most_tokens=0 if push is None else push.most_tokens(MOST_TICKETS),
            ends_late=ends_late,
            end=self.bind_finish(ends),
        )

    def bind_finish(self, ends: Ends) -> Launch:
        """Tells that rows are in place, and waits for others', behind the kernels (or copies) that wrote rows."""
        return self._launcher.bind(call_kernels.finish_call, 1, self._on.own, as_constants(ends), num_warps=1)

    def bind_remake(self) -> tuple[Launch, Launch]:
        """What makes a plan again of picks and counts."""
        on, shape = self._on, self._chunks()
        own = on.own_of(self.arena.extent, "exact")
        no_batch = Batch(x=on.state.new_empty((0, self._spec.hidden), dtype=self._spec.combine_dtype), weights=None,
                         extras=(), unquantized=True)  # fmt: skip
        remake = self._launcher.bind(plan_kernels.remake_plan, self._num_chunks, own, on.scratch, **shape, num_warps=8)
        return remake, self._bind_place(self.sent_of(no_batch, self._launcher.config, own), None)

    def sent_of(self, batch: Batch, config: LaunchConfig, own: Own) -> Sent:
        """How the rows of such a dispatch go."""
        spec, region = self._spec, self.arena.region_of_rows(unquantized=batch.unquantized)
        out_bytes = spec.hidden * spec.combine_dtype.itemsize
        is_wires = region == "data"
        is_staged = self._is_staged or (config.expand == "receiver" and is_wires)
        row_bytes = spec.wire.data_bytes(spec.hidden) if is_wires else out_bytes
        layout, between, scale_offset = self.arena.scales, row_bytes, row_bytes
        if self._is_staged:
            between = self.arena.staged_bytes
            scale_offset = self.arena["scale"].offset - self.arena["data"].offset if layout.num_scales else 0
        elif is_staged:
            region, between = "outputs", out_bytes
        return Sent(
            region=region,
            is_staged=is_staged,
            is_cast=is_wires and isinstance(spec.wire, Fp8) and isinstance(batch.x, Tensor),
            row_bytes=row_bytes,
            between=between,
            scale_offset=scale_offset,
            scale_bytes=layout.num_scales * layout.dtype.itemsize if is_wires else 0,
            own=own,
        )

    def arrivals_of(self, sent: Sent) -> Any:
        """Where rows of this rank land."""
        if sent.is_staged:
            return self._on.arrivals(sent.region, scales=sent.region, scale_offset=sent.scale_offset)
        return self._on.arrivals(sent.region)

    def _final(self, sent: Sent) -> Any:
        """Where they belong, if that is in the slot."""
        return self._on.arrivals("data" if sent.is_staged else sent.region)

    def _chunks(self) -> dict[str, Any]:
        """How picks are counted: tokens of a chunk, and chunks that are summed at a time."""
        return {
            "S": self._on.num_chunk_tokens,
            "TILE": max(1, min(32, _CELLS // power_of_two(self._on.plan_shape.num_counts))),
        }

    def _num_chunks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._on.num_chunk_tokens)

    def _bind_begin(self, sent: Sent) -> Launch:
        return self._launcher.bind(
            plan_kernels.begin_dispatch, self._num_chunks, sent.own, self._on.scratch, **self._chunks(), num_warps=8
        )

    def _bind_begin_cached(self) -> Launch:
        return self._launcher.bind(
            call_kernels.begin_call, 1, self._on.own, AWAITS=call_kernels.NOBODY.value, num_warps=1
        )

    def _bind_place(self, sent: Sent, batch: Batch | None) -> Launch:
        """Where rows go; without a batch no metadata is written."""
        on, spec = self._on, self._spec
        num_tokens = max(1, PICKS_TO_PLACE // power_of_two(spec.num_topk))
        num_tokens = min(num_tokens, on.num_chunk_tokens)
        beside = self.beside(sent, batch, 4, has_metadata=batch is not None)
        beside = beside._replace(GAPS=beside.GAPS and not self._is_staged)
        least = on.num_local if beside.GAPS else 1
        return self._launcher.bind(
            plan_kernels.place_rows,
            lambda tokens: max(least, -(-tokens // num_tokens)),
            sent.own,
            self._final(sent),
            on.scratch,
            as_constants(beside),
            S=num_tokens,
            SUBS=on.num_chunk_tokens // num_tokens,
            num_warps=4,
        )

    def beside(self, sent: Sent, batch: Batch | None, num_warps: int, *, has_metadata: bool) -> Beside:
        """What travels beside rows, and zeros in the gaps between them."""
        spec, layout = self._spec, self.arena.scales
        arena = self.arena
        num_extra = (arena.metadata_bytes - arena.extras_offset) // 4 if has_metadata else 0
        num_words = 1 + (1 if spec.layout.per_pick else 2 * spec.num_topk) + num_extra
        row_word = math.gcd(8, sent.row_bytes)
        has_gaps = isinstance(spec.layout, ExpandedLayout) and spec.layout.alignment > 1 and batch is not None
        is_column = layout.column_major
        scale_word = layout.dtype.itemsize if is_column else math.gcd(8, sent.scale_bytes)
        num_scales = sent.scale_bytes // scale_word if sent.scale_bytes else 0
        return Beside(
            TOKENS=max(1, _CELLS_OF_THREAD * 32 * num_warps // power_of_two(num_words)) if has_metadata else 0,
            WORDS=arena.metadata_bytes // 4,
            EXTRA=num_extra,
            GAPS=has_gaps,
            ROW=sent.row_bytes // row_word,
            ROW_WORD=WORDS[row_word],
            SCALES=num_scales,
            SCALE_WORD=WORDS[scale_word] if num_scales else WORDS[1],
            SCALE_ROW=1 if is_column else max(1, num_scales),
            SCALE_GROUP=layout.group_bytes // scale_word if is_column and num_scales else 1,
        )

    def _bind_push(
        self, sent: Sent, batch: Batch, config: LaunchConfig, ends: Ends, *, is_fresh: bool, has_metadata: bool
    ) -> Launch:
        """Rows to their places. Of a fresh dispatch, what travels beside them has been sent before."""
        given: dict[str, Any] = {"is_fresh": is_fresh, "has_metadata": has_metadata and not is_fresh}
        if sent.is_cast:
            assert isinstance(batch.x, Tensor)
            return self._bind_cast(sent, batch, batch.x, config, ends, **given)
        x = batch.x
        data, scale = (x.data, x.scale) if isinstance(x, Quantized) else (x, None)
        size = data.element_size()
        word = math.gcd(8, sent.row_bytes, data.stride(0) * size, data.data_ptr() & 15)
        shape = config.rows(sent.row_bytes, is_counted=True)
        tiles = tiles_of(shape, sent.row_bytes, word)
        scales, places, scale_strides = NO_SCALES, places_of(self.arena.scales), (0, 1)
        if scale is not None and sent.scale_bytes:
            scales, places, scale_strides = self._scales(sent, scale, shape.num_warps)
        how = Pushed(
            rows=Copied(
                J=self._num_copies(sent),
                STAGED=sent.is_staged,
                WORD=WORDS[word],
                ROW=sent.row_bytes // word,
                ROW_BYTES=sent.between,
                tiles=tiles,
            ),
            scales=scales,
            places=places,
            beside=self._at_push(sent, batch, shape.num_warps, **given),
            ends=ends,
        )
        return self._launcher.bind(
            row_kernels.push_rows,
            over(shape, tiles),
            Strides(data.stride(0) * size // word, *scale_strides),
            sent.own,
            self.arrivals_of(sent),
            as_constants(how),
            num_warps=shape.num_warps,
        )

    def _bind_cast(
        self,
        sent: Sent,
        batch: Batch,
        x: Tensor,
        config: LaunchConfig,
        ends: Ends,
        *,
        is_fresh: bool,
        has_metadata: bool,
    ) -> Launch:
        wire, hidden = self._spec.wire, self._spec.hidden
        assert isinstance(wire, Fp8)
        is_exponents = wire.scale == "ue8m0"
        num_stored = sent.scale_bytes if is_exponents else hidden // wire.block
        block = power_of_two(wire.block)
        groups = max(1, (_CAST_BY_SM if config.is_capped else _CAST) // block)
        side_by_side = math.gcd(power_of_two(num_stored), num_stored, groups)
        if config.is_capped:  # a warp casts groups of one row
            side_by_side = min(side_by_side, max(1, _WARP_CASTS // block))
        num_pieces = num_stored // side_by_side
        pieces = -(-num_pieces // 2) if config.is_capped else 1
        rows, parts = max(1, groups // side_by_side), -(-num_pieces // pieces)
        word_bytes = wire.scale_dtype.itemsize
        places = places_of(self.arena.scales)
        if sent.is_staged:
            places = ScalePlaces(SEGMENT_BYTES=0, ROW_BYTES=sent.between, GROUP_BYTES=word_bytes)
        num_warps = max(1, min(32, groups * block // 512))  # 16 values a thread, for wide stores
        how = PushedCast(
            cast=Cast(
                J=self._num_copies(sent),
                STAGED=sent.is_staged,
                H=hidden,
                BLOCK=wire.block,
                ROW_BYTES=sent.between,
                WORD=word_bytes if is_exponents else 1,
                SCALES=num_stored,
                ROWS=rows,
                SIDE_BY_SIDE=side_by_side,
                PARTS=parts,
                PIECES=pieces,
                POW2=wire.pow2 or is_exponents,
                EXPONENTS=is_exponents,
            ),
            places=places,
            beside=self._at_push(sent, batch, num_warps, is_fresh=is_fresh, has_metadata=has_metadata),
            ends=ends,
        )
        return self._launcher.bind(
            cast_kernels.push_cast,
            config.num_sms if config.is_capped else lambda num_tokens: -(-num_tokens // rows) * parts,
            x.stride(0),
            sent.own,
            self.arrivals_of(sent),
            as_constants(how),
            num_warps=num_warps,
            enable_fp_fusion=False,
        )

    def _at_push(self, sent: Sent, batch: Batch, num_warps: int, *, is_fresh: bool, has_metadata: bool) -> Beside:
        beside = self.beside(sent, batch, num_warps, has_metadata=has_metadata)
        return beside._replace(GAPS=beside.GAPS and not is_fresh and not sent.is_staged)

    def _bind_beside(self, sent: Sent, batch: Batch) -> Launch:
        """What travels beside rows that the host copies, on a plan."""
        beside = self.beside(sent, batch, 4, has_metadata=True)
        return self._launcher.bind(
            row_kernels.send_beside,
            lambda num_tokens: -(-num_tokens // beside.TOKENS),
            sent.own,
            self._final(sent),
            as_constants(beside),
            num_warps=4,
        )

    def bind_pack(self, x: Tensor) -> Launch:
        """Rows ``x [T, ...]`` into this rank's sending order."""
        size = x.element_size()
        num_bytes = x.shape[1] * size
        word = math.gcd(8, num_bytes, x.stride(0) * size, x.data_ptr() & 15)
        shape = self._launcher.config.pieces(num_bytes, is_counted=True)
        tiles = tiles_of(shape, num_bytes, word)
        how = Copied(
            J=self._on.plan_shape.num_columns,
            STAGED=False,
            WORD=WORDS[word],
            ROW=num_bytes // word,
            ROW_BYTES=num_bytes,
            tiles=tiles,
        )
        return self._launcher.bind(
            row_kernels.pack_rows,
            over(shape, tiles),
            Strides(x.stride(0) * size // word, 0, 1),
            self._on.own,
            as_constants(how),
            num_warps=shape.num_warps,
        )

    def _num_copies(self, sent: Sent) -> int:
        return self._on.num_pairs if sent.is_staged else self._on.plan_shape.num_columns

    def _scales(self, sent: Sent, scale: Tensor, num_warps: int) -> tuple[Any, ScalePlaces, tuple[int, int]]:
        """How scales are copied, where they lie there, and their strides."""
        layout, size = self.arena.scales, scale.element_size()
        word = size
        if scale.stride(1) == 1 and not (layout.column_major and not sent.is_staged):
            word = math.gcd(8, sent.scale_bytes, scale.stride(0) * size, scale.data_ptr() & 15, sent.between)
            word = math.gcd(word, sent.scale_offset) if sent.is_staged else word
        places = places_of(layout, word_bytes=None if layout.column_major else word)
        if sent.is_staged:
            places = ScalePlaces(SEGMENT_BYTES=0, ROW_BYTES=sent.between, GROUP_BYTES=word)
        strides = scale.stride(0) * size // word, 1 if word != size else scale.stride(1)
        return shared_out(sent.scale_bytes // word, word, num_warps), places, strides

    def bind_expand(
        self, sent: Sent, batch: Batch, config: LaunchConfig, *, is_fresh: bool, zeroes_gaps: bool
    ) -> Launch | None:
        """Copies of staged rows to their places, and the plan's own table of which rows are a token's.

        Args:
            zeroes_gaps: whether nothing before has zeroed the gaps that alignment leaves.
        """
        if not sent.is_staged and not (is_fresh and self._on.num_pairs):
            return None
        layout, beside = self.arena.scales, self.beside(sent, batch, 4, has_metadata=False)
        word = math.gcd(8, sent.row_bytes, sent.between)
        shape = config.pieces(sent.row_bytes, is_counted=False) if sent.is_staged else _NO_SHAPE
        scales, places = NO_SCALES, places_of(layout)
        if sent.is_staged and sent.scale_bytes:
            scale_word = layout.dtype.itemsize
            if not layout.column_major:
                scale_word = math.gcd(8, sent.scale_bytes, sent.scale_offset, sent.between)
            places = places_of(layout, word_bytes=None if layout.column_major else scale_word)
            scales = shared_out(sent.scale_bytes // scale_word, scale_word, shape.num_warps)
        how = Expanded(
            rows=Copied(
                J=self._spec.num_topk,
                STAGED=sent.is_staged,
                WORD=WORDS[word],
                ROW=sent.row_bytes // word,
                ROW_BYTES=sent.row_bytes,
                tiles=tiles_of(shape, sent.row_bytes, word),
            ),
            scales=scales,
            places=places,
            STAGED_BYTES=sent.between,
            KEEPS=is_fresh,
            IN_SLOT=not self._is_staged,
            COLUMNS=layout.column_major,
            beside=beside._replace(GAPS=beside.GAPS and zeroes_gaps),
        )
        num_copies = self._on.num_ranks * self._spec.max_tokens * self._spec.num_topk // 4096
        programs = shape.programs if sent.is_staged else max(1, min(config.num_sms, num_copies))
        return self._launcher.bind(
            row_kernels.expand_rows,
            programs or 1,
            sent.own,
            self.arrivals_of(sent),
            self._final(sent),
            as_constants(how),
            num_warps=shape.num_warps,
        )


MOST_TICKETS = 2048
"""Programs of a kernel whose last one ends the call; of more another kernel does: see ``kernels.calls.end_call``."""


def tiles_of(shape: Shape, row_bytes: int, word_bytes: int) -> Tiles:
    """How programs share out rows of so many bytes, in words."""
    piece, num_words = max(1, shape.piece_bytes // word_bytes), row_bytes // word_bytes
    num_pieces = max(1, -(-num_words // piece))
    pieces = -(-num_pieces // (num_pieces if shape.parts is None else shape.parts))
    return Tiles(
        ROWS=shape.num_rows,
        PARTS=-(-num_pieces // pieces),
        PIECE=piece,
        PIECES=pieces,
        AT_ONCE=-(-pieces // -(-pieces // shape.at_once)),
        OWN=shape.own_programs,
    )


def over(shape: Shape, tiles: Tiles) -> int | Callable[[int], int]:
    """Programs for rows that are shared out like that."""
    return shape.programs or (lambda num_tokens: -(-num_tokens // tiles.ROWS) * tiles.PARTS)
