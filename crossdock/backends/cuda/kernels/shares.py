"""A program's share of a whole dispatch: pieces of a few tokens' rows, cast, counted, placed and copied. Triton only.

What can be done before everybody's counts are here is done while they are awaited; then a share is only copied.

Letters: T tokens here, K top-k, E experts, L local experts, P ranks, H hidden, G scale groups.
"""

# Tuples that grow by a value at each turn of an unrolled loop have no type.
# mypy: disable-error-code="assignment, var-annotated", no-warn-unreachable

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import slot_of
from crossdock.backends.cuda.kernels.cast import cast_blocks
from crossdock.backends.cuda.kernels.places import ROW_BITS, are_bad, nth_of_key, picks_at
from crossdock.backends.cuda.kernels.rows import wide
from crossdock.backends.cuda.kernels.scales import group_offset, scale_offset
from crossdock.backends.cuda.kernels.sync import GO, NOTHING, take_verdict

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
def cast_share(
    x,
    data,
    scales,
    first_piece,
    last_piece,
    stride,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIECES: tl.constexpr,
    SCALES: tl.constexpr,
    POW2: tl.constexpr,
    EXPONENTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Casts pieces of rows, each of so many blocks, to where the program's copies begin: bytes, and their scales.

    Loads run STAGES - 1 pieces ahead: one in flight is less than it takes to read at full speed.
    """
    within = tl.arange(0, triton.next_power_of_2(BLOCK))
    for i in tl.range(first_piece, last_piece, num_stages=STAGES):
        token, block = i // PIECES, i % PIECES * BLOCKS + tl.arange(0, BLOCKS)
        at = block[:, None] * BLOCK + within[None, :]
        is_value = (block < H // BLOCK)[:, None] & (within < BLOCK)[None, :]
        value = tl.load(x + wide(token) * stride + at, mask=is_value, other=0.0)
        bytes_of, scale = cast_blocks(value, POW2, EXPONENTS)
        tl.store(data + token * H + at, bytes_of, mask=is_value)
        scale = tl.where(block < H // BLOCK, scale, 0).to(scales.dtype.element_ty)
        tl.store(scales + token * SCALES + block, scale, mask=block < SCALES)


@triton.jit
def count_share(topk_idx, own_picks, nths, refused, room, first_token, last_token, E: tl.constexpr, K: tl.constexpr):
    """Of each pick of some tokens, how many of all that come before are of its expert; and keeps the picks.

    Args:
        refused: becomes 1 where a pick is not allowed.
        room: int32 ``[E]`` of the program's own, in which it counts: in registers that takes hundreds of instructions.
    """
    KP: tl.constexpr = triton.next_power_of_2(K)
    PLACED: tl.constexpr = max(KP, _PLACED)
    bins = tl.arange(0, triton.next_power_of_2(E))
    tl.store(room + bins, tl.zeros_like(bins), mask=bins < E)
    num_counted = tl.zeros([], tl.int32)
    for first in range(first_token, last_token, PLACED // KP):
        tl.debug_barrier()  # there is nothing in the room yet, or the last ones have been looked up
        for earlier in range(num_counted, first * K, _PICKS):
            at = earlier + tl.arange(0, _PICKS)
            expert = picks_at(topk_idx + at, at < first * K)
            is_pick = (expert >= 0) & (expert < E)
            tl.atomic_add(room + expert, tl.full([_PICKS], 1, tl.int32), mask=is_pick, sem="relaxed", scope="gpu")
        num_counted = first * K
        i = tl.arange(0, PLACED)
        at = (first + i // KP) * K + i % KP
        is_here = (at < last_token * K) & (i % KP < K)
        tl.store(own_picks + at, tl.load(topk_idx + at, mask=is_here, other=-1), mask=is_here)
        expert = picks_at(topk_idx + at, is_here)
        is_pick = (expert >= 0) & (expert < E)
        nth = nth_of_key(expert, is_pick, E)
        if are_bad(expert, first + i // KP, E):
            tl.store(refused, 1)
        tl.debug_barrier()  # all are counted
        before = tl.atomic_add(room + expert, tl.zeros_like(expert), mask=is_pick, sem="relaxed", scope="gpu")
        tl.store(nths + at, nth + tl.where(is_pick, before, 0), mask=is_here)


@triton.jit
def place_share(
    segments,
    call,
    outgoing,
    places,
    homes,
    nths,
    to_rows,
    to_scales,
    picks,
    weights,
    has_weights,
    first_token,
    last_token,
    first_owned,
    goes,
    source,
    data_region,
    data_slot_bytes,
    scale_region,
    scale_slot_bytes,
    record_region,
    record_slot_bytes,
    E: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    SCALES: tl.constexpr,
    SEGMENT_ROWS: tl.constexpr,
    SEGMENT_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    RECORD: tl.constexpr,
):
    """Works out where the rows of some tokens go: their addresses, for all warps of the program to see.

    Of the tokens from ``first_owned`` on, whose first piece is the program's, it also writes places, homes and records.
    """
    KP: tl.constexpr = triton.next_power_of_2(K)
    PLACED: tl.constexpr = max(KP, _PLACED)
    for first in range(first_token, last_token, PLACED // KP):
        i = tl.arange(0, PLACED)
        token = first + i // KP
        at = token * K + i % KP
        is_here = (at < last_token * K) & (i % KP < K)
        expert = picks_at(picks + at, is_here)
        nth = tl.load(nths + at, mask=is_here, other=0)
        is_row = (expert >= 0) & (expert < E) & goes
        row = tl.load(outgoing + expert, mask=is_row, other=0) + nth
        home = tl.load(outgoing + E + expert, mask=is_row, other=0) + nth
        peer = tl.where(is_row, expert // L, 0)
        segment, slot = tl.load(segments + peer), slot_of(call, peer)
        to_row = segment + data_region + slot * data_slot_bytes + row.to(tl.int64) * ROW_BYTES
        tl.store(to_rows + at, tl.where(is_row, to_row, 0), mask=is_here)
        if SCALES > 0:
            to_scale = segment + scale_region + slot * scale_slot_bytes
            to_scale += scale_offset(row, SEGMENT_ROWS, SEGMENT_BYTES, SCALE_BYTES)
            tl.store(to_scales + at, to_scale, mask=is_here)
        owns = is_here & (token >= first_owned)
        place = (peer.to(tl.int64) << ROW_BITS) | row
        tl.store(places + at, tl.where(is_row, place, -1), mask=owns)
        tl.store(homes + at, tl.where(is_row, home, -1), mask=owns)
        to_record = segment + record_region + slot * record_slot_bytes + row.to(tl.int64) * (4 * RECORD)
        to_record = to_record.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(to_record, source + token, mask=owns & is_row)
        if has_weights != 0:
            weight = tl.load(weights + at, mask=is_here, other=0)
            tl.store(to_record + 1, weight, mask=owns & is_row)
    tl.debug_barrier()


@triton.jit
def load_piece(rows, i, last_piece, stride, ROW: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """A piece of a row, ``[next_power_of_2(PIECE)]`` words; 0 where there is none."""
    lane = tl.arange(0, triton.next_power_of_2(PIECE))
    at = i % PIECES * PIECE + lane
    return tl.load(rows + wide(i // PIECES) * stride + at, mask=(lane < PIECE) & (at < ROW) & (i < last_piece), other=0)


@triton.jit
def push_share(
    to_rows,
    to_scales,
    rows,
    scales,
    values,
    first_piece,
    last_piece,
    stride,
    scale_stride,
    K: tl.constexpr,
    ROW: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_PIECE: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    SCALES_OF_WORD: tl.constexpr,
):
    """Writes pieces of rows, the first of which is loaded, and their part of the scales, to where the rows go."""
    SCALE_SIZE: tl.constexpr = scales.dtype.element_ty.primitive_bitwidth // 8
    lane = tl.arange(0, triton.next_power_of_2(PIECE))
    for i in range(first_piece, last_piece):
        token, piece = i // PIECES, i % PIECES
        word = piece * PIECE + lane
        is_word = (lane < PIECE) & (word < ROW)
        group = piece * SCALE_PIECE + tl.arange(0, SCALE_PIECE)
        behind = group_offset(group, GROUP_BYTES, SCALES_OF_WORD, SCALE_SIZE)
        if SCALES > 0:
            scale = tl.load(scales + wide(token) * scale_stride + group, mask=group < SCALES)
        now = values
        values = load_piece(rows, i + 1, last_piece, stride, ROW, PIECE, PIECES)
        for first in tl.static_range(0, K, _AT_ONCE):
            there = ()  # all addresses before the first store, behind which each would wait for its own
            scales_there = ()
            for k in tl.static_range(first, min(first + _AT_ONCE, K)):
                there = there + (tl.load(to_rows + token * K + k),)  # noqa: RUF005 - Triton's compiler knows no unpacking
                if SCALES > 0:
                    scales_there = scales_there + (tl.load(to_scales + token * K + k),)  # noqa: RUF005
            for k in tl.static_range(K - first if first + _AT_ONCE > K else _AT_ONCE):
                to_row = there[k].to(rows.dtype, bitcast=True)
                if ROW_BYTES % 16 == 0:
                    to_row = tl.multiple_of(to_row, 16)
                tl.store(to_row + word, now, mask=is_word & (there[k] != 0))
                if SCALES > 0:
                    to_scale = scales_there[k].to(scales.dtype, bitcast=True)
                    tl.store(to_scale + behind, scale, mask=(group < SCALES) & (there[k] != 0))


@triton.jit
def send_share(
    segments,
    call,
    outgoing,
    places,
    homes,
    verdict,
    refused,
    begins,
    nths,
    to_rows,
    to_scales,
    rooms,
    topk_idx,
    picks,
    weights,
    has_weights,
    x,
    rows,
    scales,
    num_tokens,
    x_stride,
    stride,
    scale_stride,
    source,
    data_region,
    data_slot_bytes,
    scale_region,
    scale_slot_bytes,
    record_region,
    record_slot_bytes,
    E: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    ROW: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_PIECE: tl.constexpr,
    SEGMENT_ROWS: tl.constexpr,
    SEGMENT_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    SCALES_OF_WORD: tl.constexpr,
    POW2: tl.constexpr,
    EXPONENTS: tl.constexpr,
    STAGES: tl.constexpr,
    RECORD: tl.constexpr,
):
    """A program's share of the rows: pieces one after another, of a few tokens. See ``dispatch_rows``."""
    program, num_programs, num_pieces = tl.program_id(0) - 1, tl.num_programs(0) - 1, num_tokens * PIECES
    first_piece, last_piece = program * num_pieces // num_programs, (program + 1) * num_pieces // num_programs
    first_token, last_token = first_piece // PIECES, (last_piece + PIECES - 1) // PIECES
    decided = tl.full([], 0, tl.int32)
    if begins == 0:  # most often all has been sent
        decided = take_verdict(verdict)
    if decided != NOTHING:
        count_share(topk_idx, picks, nths, refused, rooms + program * E, first_token, last_token, E, K)
        if BLOCK > 0:
            cast_share(
                x, rows.to(tl.pointer_type(tl.uint8), bitcast=True), scales, first_piece, last_piece, x_stride,
                ROW_BYTES, BLOCK, SCALE_PIECE, PIECES, SCALES, POW2, EXPONENTS, STAGES,
            )  # fmt: skip
        tl.debug_barrier()  # what the program has kept is there for all its warps
        values = load_piece(rows, first_piece, last_piece, stride, ROW, PIECE, PIECES)
        if begins != 0:
            decided = take_verdict(verdict)
        if decided != NOTHING:
            place_share(
                segments, call, outgoing, places, homes, nths, to_rows, to_scales, picks, weights, has_weights,
                first_token, last_token,
                (first_piece + PIECES - 1) // PIECES, decided == GO, source, data_region, data_slot_bytes,
                scale_region, scale_slot_bytes, record_region, record_slot_bytes,
                E, L, K, ROW_BYTES, SCALES, SEGMENT_ROWS, SEGMENT_BYTES, SCALE_BYTES, RECORD,
            )  # fmt: skip
            if decided == GO:
                push_share(
                    to_rows, to_scales, rows, scales, values, first_piece, last_piece, stride, scale_stride,
                    K, ROW, PIECE, PIECES, ROW_BYTES, SCALES, SCALE_PIECE, GROUP_BYTES, SCALES_OF_WORD,
                )  # fmt: skip
