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
from crossdock.backends.cuda.kernels.metadata import as_int64, pointers, region_at
from crossdock.backends.cuda.kernels.picks import ROW_BITS, has_bad_picks, nth_of_key, picks_at
from crossdock.backends.cuda.kernels.scales import group_offset, scale_offset
from crossdock.backends.cuda.kernels.sync import GO, NOTHING, await_go

_PICKS = tl.constexpr(1024)
"""Picks that are counted at a time."""
_PLACED = tl.constexpr(32)
"""Picks for which a program works out places at a time, or those of one token."""
_AT_ONCE = tl.constexpr(8)
"""Copies of a piece whose addresses a program has at a time."""


@triton.jit
def count_picks(topk_idx, num_picks, E: tl.constexpr):
    """How many of the first picks are of each expert, int32 ``[next_power_of_2(E)]``."""
    BINS: tl.constexpr = triton.next_power_of_2(E)
    total = tl.zeros([BINS], tl.int32)
    for first in range(0, num_picks, _PICKS):
        at = first + tl.arange(0, _PICKS)
        expert = picks_at(topk_idx + at, at < num_picks)
        is_pick = (expert >= 0) & (expert < E)
        total += tl.histogram(tl.where(is_pick, expert, 0), BINS, mask=is_pick)
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
    """Of each pick of some tokens, how many of all that come before are of its expert; and keeps the picks.

    Args:
        flags: REFUSED becomes 1 where a pick is not allowed.
        room: int32 ``[E]`` of the program's own, in which it counts: in registers that takes hundreds of instructions.
    """
    E: tl.constexpr = sizes.L * sizes.P
    K: tl.constexpr = sizes.K
    KP: tl.constexpr = triton.next_power_of_2(K)
    PLACED: tl.constexpr = max(KP, _PLACED)
    bins = tl.arange(0, triton.next_power_of_2(E))
    tl.store(room + bins, tl.zeros_like(bins), mask=bins < E)
    num_counted = tl.zeros([], tl.int32)
    for first in range(first_token, last_token, PLACED // KP):
        tl.debug_barrier()  # there is nothing in the room yet, or the last ones have been looked up
        for earlier in range(num_counted, first * K, _PICKS):
            at = earlier + tl.arange(0, _PICKS)
            expert = picks_at(given.topk_idx + at, at < first * K)
            is_pick = (expert >= 0) & (expert < E)
            tl.atomic_add(room + expert, tl.full([_PICKS], 1, tl.int32), mask=is_pick, sem="relaxed", scope="gpu")
        num_counted = first * K
        i = tl.arange(0, PLACED)
        at = (first + i // KP) * K + i % KP
        is_here = (at < last_token * K) & (i % KP < K)
        tl.store(tables.picks + at, tl.load(given.topk_idx + at, mask=is_here, other=-1), mask=is_here)
        expert = picks_at(given.topk_idx + at, is_here)
        is_pick = (expert >= 0) & (expert < E)
        nth = nth_of_key(expert, is_pick, E)
        if has_bad_picks(expert, E, PLACED // KP):
            tl.store(flags + REFUSED, 1)
        tl.debug_barrier()  # all are counted
        before = tl.atomic_add(room + expert, tl.zeros_like(expert), mask=is_pick, sem="relaxed", scope="gpu")
        tl.store(shares.nths + at, nth + tl.where(is_pick, before, 0), mask=is_here)


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
    E: tl.constexpr = sizes.L * sizes.P
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
        is_row = (expert >= 0) & (expert < E) & goes
        row = tl.load(shares.send_starts + expert, mask=is_row, other=0) + nth
        return_row = tl.load(shares.send_starts + E + expert, mask=is_row, other=0) + nth
        peer = tl.where(is_row, expert // sizes.L, 0)
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
        to_metadata = region_at(segment, arrivals.metadata, slot) + row.to(tl.int64) * (4 * how.METADATA_WORDS)
        to_metadata = pointers(to_metadata, tl.int32)
        tl.store(to_metadata, given.source + token, mask=owns & is_row)
        if given.has_weights != 0:
            weight = tl.load(given.weights + at, mask=is_here, other=0)
            tl.store(to_metadata + 1, weight, mask=owns & is_row)
    tl.debug_barrier()


@triton.jit
def load_piece(given, i, last_piece, how):
    """A piece of a row, ``[next_power_of_2(PIECE)]`` words; 0 where there is none."""
    lane = tl.arange(0, triton.next_power_of_2(how.PIECE))
    at = i % how.PIECES * how.PIECE + lane
    is_there = (lane < how.PIECE) & (at < how.ROW) & (i < last_piece)
    return tl.load(given.rows + as_int64(i // how.PIECES) * given.stride + at, mask=is_there, other=0)


@triton.jit
def push_share(given, shares, values, first_piece, last_piece, K: tl.constexpr, places, how):
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
        for first in tl.static_range(0, K, _AT_ONCE):
            there = ()  # all addresses before the first store, behind which each would wait for its own
            scales_there = ()
            for k in tl.static_range(first, min(first + _AT_ONCE, K)):
                to_row = tl.load(shares.to_rows + token * K + k)
                there = there + (to_row,)  # noqa: RUF005 - Triton's compiler knows no unpacking
                if SCALES > 0:
                    scales_there = scales_there + (tl.load(shares.to_scales + token * K + k),)  # noqa: RUF005
            for k in tl.static_range(K - first if first + _AT_ONCE > K else _AT_ONCE):
                to_row = there[k].to(rows.dtype, bitcast=True)
                if how.ROW_BYTES % 16 == 0:
                    to_row = tl.multiple_of(to_row, 16)
                tl.store(to_row + word, now, mask=is_word & (there[k] != 0), eviction_policy=POLICY)
                if SCALES > 0:
                    to_scale = scales_there[k].to(scales.dtype, bitcast=True)
                    tl.store(to_scale + behind, scale, mask=(group < SCALES) & (there[k] != 0))


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
                push_share(given, shares, values, first_piece, last_piece, own.sizes.K, places, how)
