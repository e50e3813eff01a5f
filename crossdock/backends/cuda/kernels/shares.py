"""A program's share of a whole dispatch: pieces of a few tokens' rows, cast, counted, placed and copied. Triton only.

What can be done before everybody's counts are here is done while they are awaited; then a share is only copied.

Letters: T tokens here, K top-k, E experts, L local experts, P ranks, H hidden, G scale groups.
"""

# Tuples that grow by a value at each turn of an unrolled loop have no type.
# mypy: disable-error-code="assignment, var-annotated", no-warn-unreachable

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import GO_FLAG, REFUSED, slot_of
from crossdock.backends.cuda.kernels.cast import cast_blocks
from crossdock.backends.cuda.kernels.metadata import WEIGHTS, as_int64, pointers, push_metadata, region_at
from crossdock.backends.cuda.kernels.picks import (
    ROW_BITS,
    columns_of,
    has_bad_picks,
    load_picks,
    nth_of_key,
    picks_at,
    rows_of,
)
from crossdock.backends.cuda.kernels.scales import group_offset, scale_offset
from crossdock.backends.cuda.kernels.sync import GO, NOTHING, await_go

_PICKS = tl.constexpr(1024)
"""Picks that are counted at a time."""
_COMPARED = tl.constexpr(4096)
"""Pairs of a token's picks that are compared at a time."""
_PLACED = tl.constexpr(32)
"""Picks for which a program works out places at a time, or those of one token."""
_WORDS_BESIDE = tl.constexpr(1024)
"""Words of metadata that a program writes at a time."""
_AT_ONCE = tl.constexpr(8)
"""Copies of a piece whose addresses a program has at a time."""


@triton.jit
def count_picks(topk_idx, num_tokens, sizes):
    """How many of the tokens' picks are of each expert, int32 ``[next_power_of_2(E)]``.

    BY_RANK, behind these how many rows go to each rank: ``[next_power_of_2(E + P)]``.
    """
    E: tl.constexpr = sizes.L * sizes.P
    BINS: tl.constexpr = triton.next_power_of_2(E + sizes.P if sizes.BY_RANK else E)
    KP: tl.constexpr = triton.next_power_of_2(sizes.K)
    S: tl.constexpr = max(1, (_COMPARED // KP if sizes.BY_RANK else _PICKS) // KP)
    total = tl.zeros([BINS], tl.int32)
    for first in range(0, num_tokens, S):
        expert, _, _ = load_picks(topk_idx, num_tokens, first, sizes.K, S)
        is_pick = (expert >= 0) & (expert < E)
        total += tl.histogram(tl.where(is_pick, expert, 0), BINS, mask=is_pick)
        if sizes.BY_RANK:
            peer, is_row = rows_of(expert, sizes, True, S)
            total += tl.histogram(tl.where(is_row, E + peer, 0), BINS, mask=is_row)
    return total


@triton.jit
def cast_share(given, first_piece, last_piece, how):
    """Casts pieces of rows, each of so many blocks, to where the program's copies begin: bytes, and their scales.

    Loads run STAGES - 1 pieces ahead: one in flight is less than it takes to read at full speed.
    """
    BLOCK: tl.constexpr = how.BLOCK
    H: tl.constexpr = how.ROW_BYTES
    within = tl.arange(0, triton.next_power_of_2(BLOCK))
    data, scales = given.rows.to(tl.pointer_type(tl.uint8), bitcast=True), given.scales
    for i in tl.range(first_piece, last_piece, num_stages=how.STAGES):
        token, block = i // how.PIECES, i % how.PIECES * how.SCALE_PIECE + tl.arange(0, how.SCALE_PIECE)
        at = block[:, None] * BLOCK + within[None, :]
        is_value = (block < H // BLOCK)[:, None] & (within < BLOCK)[None, :]
        value = tl.load(given.x + as_int64(token) * given.x_stride + at, mask=is_value, other=0.0)
        bytes_of, scale = cast_blocks(value, how.POW2, how.EXPONENTS)
        tl.store(data + token * H + at, bytes_of, mask=is_value)
        scale = tl.where(block < H // BLOCK, scale, 0).to(scales.dtype.element_ty)
        tl.store(scales + token * how.SCALES + block, scale, mask=block < how.SCALES)


@triton.jit
def count_share(given, tables, shares, flags, room, first_token, last_token, sizes):
    """Of each pick that has a row, how many rows that come before have its key; and keeps the picks.

    Args:
        flags: REFUSED becomes 1 where a pick is not allowed.
        room: int32 ``[E]`` of the program's own, in which it counts: in registers that takes hundreds of instructions.
    """
    E: tl.constexpr = sizes.L * sizes.P
    B: tl.constexpr = sizes.P if sizes.BY_RANK else E
    K: tl.constexpr = sizes.K
    KP: tl.constexpr = triton.next_power_of_2(K)
    PLACED: tl.constexpr = max(KP, _PLACED)
    S: tl.constexpr = max(1, (_COMPARED // KP if sizes.BY_RANK else _PICKS) // KP)
    bins = tl.arange(0, triton.next_power_of_2(B))
    tl.store(room + bins, tl.zeros_like(bins), mask=bins < B)
    num_counted = tl.zeros([], tl.int32)
    for first in range(first_token, last_token, PLACED // KP):
        tl.debug_barrier()  # there is nothing in the room yet, or the last ones have been looked up
        for earlier in range(num_counted, first, S):
            expert, _, _ = load_picks(given.topk_idx, first, earlier, K, S)
            key, is_row = rows_of(expert, sizes, sizes.BY_RANK, S)
            tl.atomic_add(room + key, tl.full([S * KP], 1, tl.int32), mask=is_row, sem="relaxed", scope="gpu")
        num_counted = first
        i = tl.arange(0, PLACED)
        at = (first + i // KP) * K + i % KP
        is_here = (at < last_token * K) & (i % KP < K)
        tl.store(tables.picks + at, tl.load(given.topk_idx + at, mask=is_here, other=-1), mask=is_here)
        expert = picks_at(given.topk_idx + at, is_here)
        key, is_row = rows_of(expert, sizes, sizes.BY_RANK, PLACED // KP)
        nth = nth_of_key(key, is_row, B)
        if has_bad_picks(expert, E, PLACED // KP):
            tl.store(flags + REFUSED, 1)
        tl.debug_barrier()  # all are counted
        before = tl.atomic_add(room + key, tl.zeros_like(key), mask=is_row, sem="relaxed", scope="gpu")
        tl.store(shares.nths + at, nth + tl.where(is_row, before, 0), mask=is_here)


@triton.jit
def address_share(
    segments,
    call,
    given,
    tables,
    shares,
    arrivals,
    first_token,
    last_token,
    first_owned,
    goes,
    sizes,
    places,
    how,
):
    """Works out where the rows of some tokens go: their addresses, for all warps of the program to see.

    Of the tokens from ``first_owned`` on, whose first piece is the program's, it also writes places, return_rows and
    metadata.
    """
    N: tl.constexpr = 1 if sizes.BY_RANK else sizes.L
    B: tl.constexpr = N * sizes.P
    J: tl.constexpr = sizes.J
    K: tl.constexpr = sizes.K
    KP: tl.constexpr = triton.next_power_of_2(K)
    PLACED: tl.constexpr = max(KP, _PLACED)
    for first in range(first_token, last_token, PLACED // KP):
        i = tl.arange(0, PLACED)
        token = first + i // KP
        at = token * K + i % KP
        is_here = (at < last_token * K) & (i % KP < K)
        expert = picks_at(tables.picks + at, is_here)
        nth = tl.load(shares.nths + at, mask=is_here, other=0)
        key, is_row = rows_of(tl.where(goes, expert, -1), sizes, sizes.BY_RANK, PLACED // KP)
        row = tl.load(shares.send_starts + key, mask=is_row, other=0) + nth
        return_row = tl.load(shares.send_starts + B + key, mask=is_row, other=0) + nth
        peer = tl.where(is_row, key // N, 0)
        if sizes.BY_RANK:
            at = token * J + columns_of(key, is_row, PLACED // KP, sizes.RANK_ORDER)
            is_here = (token < last_token) & (at < (token + 1) * J)
        segment, slot = tl.load(segments + peer), slot_of(call, peer)
        to_row = region_at(segment, arrivals.rows, slot) + row.to(tl.int64) * how.ROW_BYTES
        tl.store(shares.to_rows + at, tl.where(is_row, to_row, 0), mask=is_here)
        if how.SCALES > 0:
            to_scale = region_at(segment, arrivals.scales, slot)
            to_scale += scale_offset(row, given.segment_rows, places.SEGMENT_BYTES, places.ROW_BYTES)
            tl.store(shares.to_scales + at, to_scale, mask=is_here)
        owns = is_here & (token >= first_owned)
        dst_row = (peer.to(tl.int64) << ROW_BITS) | row
        tl.store(tables.dst_rows + at, tl.where(is_row, dst_row, -1), mask=owns)
        tl.store(tables.return_rows + at, tl.where(is_row, return_row, -1), mask=owns)
        if not sizes.BY_RANK:
            to_metadata = region_at(segment, arrivals.metadata, slot) + row.to(tl.int64) * (4 * how.METADATA_WORDS)
            to_metadata = pointers(to_metadata, tl.int32)
            tl.store(to_metadata, given.source + token, mask=owns & is_row)
            if given.has_weights != 0:
                weight = tl.load(given.weights + at, mask=is_here, other=0)
                tl.store(to_metadata + 1, weight, mask=owns & is_row)
    tl.debug_barrier()
    if sizes.BY_RANK:
        carries = tl.where(given.has_weights != 0, WEIGHTS, 0)
        TOKENS: tl.constexpr = max(1, _WORDS_BESIDE // triton.next_power_of_2(1 + 2 * K))
        push_metadata(
            call, tables, first_owned, last_token, TOKENS, carries, given.weights, given.weights, given.source,
            segments, arrivals, sizes, how.METADATA_WORDS, 0, TOKENS,
        )  # fmt: skip


@triton.jit
def load_piece(given, i, last_piece, how):
    """A piece of a row, ``[next_power_of_2(PIECE)]`` words; 0 where there is none."""
    lane = tl.arange(0, triton.next_power_of_2(how.PIECE))
    at = i % how.PIECES * how.PIECE + lane
    is_there = (lane < how.PIECE) & (at < how.ROW) & (i < last_piece)
    return tl.load(given.rows + as_int64(i // how.PIECES) * given.stride + at, mask=is_there, other=0)


@triton.jit
def push_share(given, shares, values, first_piece, last_piece, J: tl.constexpr, places, how):
    """Writes pieces of rows, the first of which is loaded, and their part of the scales, to where the rows go."""
    rows, scales = given.rows, given.scales
    SCALES: tl.constexpr = how.SCALES
    SCALE_SIZE: tl.constexpr = scales.dtype.element_ty.primitive_bitwidth // 8
    POLICY: tl.constexpr = "evict_first" if how.CROWDED else ""
    lane = tl.arange(0, triton.next_power_of_2(how.PIECE))
    for i in range(first_piece, last_piece):
        token, piece = i // how.PIECES, i % how.PIECES
        word = piece * how.PIECE + lane
        is_word = (lane < how.PIECE) & (word < how.ROW)
        group = piece * how.SCALE_PIECE + tl.arange(0, how.SCALE_PIECE)
        behind = group_offset(group, places.GROUP_BYTES, how.SCALES_OF_WORD, SCALE_SIZE)
        if SCALES > 0:
            scale = tl.load(scales + as_int64(token) * given.scale_stride + group, mask=group < SCALES)
        now = values
        values = load_piece(given, i + 1, last_piece, how)
        for first in tl.static_range(0, J, _AT_ONCE):
            there = ()  # all addresses before the first store, behind which each would wait for its own
            scales_there = ()
            for j in tl.static_range(first, min(first + _AT_ONCE, J)):
                to_row = tl.load(shares.to_rows + token * J + j)
                there = there + (to_row,)  # noqa: RUF005 - Triton's compiler knows no unpacking
                if SCALES > 0:
                    scales_there = scales_there + (tl.load(shares.to_scales + token * J + j),)  # noqa: RUF005
            for j in tl.static_range(J - first if first + _AT_ONCE > J else _AT_ONCE):
                to_row = there[j].to(rows.dtype, bitcast=True)
                if how.ROW_BYTES % 16 == 0:
                    to_row = tl.multiple_of(to_row, 16)
                tl.store(to_row + word, now, mask=is_word & (there[j] != 0), eviction_policy=POLICY)
                if SCALES > 0:
                    to_scale = scales_there[j].to(scales.dtype, bitcast=True)
                    tl.store(to_scale + behind, scale, mask=(group < SCALES) & (there[j] != 0))


@triton.jit
def send_share(own, call, begins, given, tables, shares, arrivals, places, how):
    """A program's share of the rows: pieces one after another, of a few tokens. See ``dispatch_rows``."""
    program, num_programs = tl.program_id(0) - 1, tl.num_programs(0) - 1
    num_pieces = given.num_tokens * how.PIECES
    first_piece, last_piece = program * num_pieces // num_programs, (program + 1) * num_pieces // num_programs
    first_token, last_token = first_piece // how.PIECES, (last_piece + how.PIECES - 1) // how.PIECES
    decided = tl.full([], 0, tl.int32)
    if begins == 0:  # most often all has been sent
        decided = await_go(own.flags + GO_FLAG)
    if decided != NOTHING:
        room = shares.counts + program * (own.sizes.L * own.sizes.P)
        count_share(given, tables, shares, own.flags, room, first_token, last_token, own.sizes)
        if how.BLOCK > 0:
            cast_share(given, first_piece, last_piece, how)
        tl.debug_barrier()  # what the program has kept is there for all its warps
        values = load_piece(given, first_piece, last_piece, how)
        if begins != 0:
            decided = await_go(own.flags + GO_FLAG)
        if decided != NOTHING:
            first_owned = (first_piece + how.PIECES - 1) // how.PIECES
            address_share(
                own.segments, call, given, tables, shares, arrivals, first_token, last_token, first_owned,
                decided == GO, own.sizes, places, how,
            )  # fmt: skip
            if decided == GO:
                push_share(given, shares, values, first_piece, last_piece, own.sizes.J, places, how)
