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
from crossdock.backends.cuda.kernels.metadata import (
    WEIGHTS,
    as_int64,
    pointers,
    push_metadata,
    push_partial_rows,
    region_at,
    zero_gaps,
)
from crossdock.backends.cuda.kernels.picks import (
    ROW_BITS,
    ROW_MASK,
    columns_of,
    has_bad_picks,
    load_picks,
    nth_of_key,
    picks_at,
    rows_of,
)
from crossdock.backends.cuda.kernels.scales import group_offset, scale_offset
from crossdock.backends.cuda.kernels.sync import GO, NOTHING, await_go

BEGINS = tl.constexpr(1)
AWAITS = tl.constexpr(2)
TELLS = tl.constexpr(4)
HAS_WEIGHTS = tl.constexpr(8)
METADATA = tl.constexpr(16)
"""What a launch of a fused kernel does, or has: gives this rank's word; waits for rows, and tells the host of an
overflow; tells it how many rows come; has weights; on a known plan, sends metadata."""
TOO_MANY_SHIFT = tl.constexpr(5)
"""Above these, this rank's tokens where they are more than the call may have, none of which is sent."""
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

    BY_RANK, or where there are pairs, behind these how many of them go to each rank: ``[next_power_of_2(E + P)]``.
    """
    E: tl.constexpr = sizes.L * sizes.P
    COUNTS_RANKS: tl.constexpr = True if sizes.BY_RANK else sizes.PAIRS > 0
    BINS: tl.constexpr = triton.next_power_of_2(E + sizes.P if COUNTS_RANKS else E)
    KP: tl.constexpr = triton.next_power_of_2(sizes.K)
    S: tl.constexpr = max(1, (_COMPARED // KP if COUNTS_RANKS else _PICKS) // KP)
    total = tl.zeros([BINS], tl.int32)
    for first in range(0, num_tokens, S):
        expert, _, _ = load_picks(topk_idx, num_tokens, first, sizes.K, S)
        is_pick = (expert >= 0) & (expert < E)
        total += tl.histogram(tl.where(is_pick, expert, 0), BINS, mask=is_pick)
        if COUNTS_RANKS:
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
    """Of each pick that has a row, how many rows that come before have its key, and the same of pairs; keeps the picks.

    Args:
        flags: REFUSED becomes 1 where a pick is not allowed.
        room: int32 ``[E + P]`` of the program's own, in which it counts: in registers that takes hundreds of
            instructions.
    """
    E: tl.constexpr = sizes.L * sizes.P
    B: tl.constexpr = sizes.P if sizes.BY_RANK else E
    HAS_PAIRS: tl.constexpr = sizes.PAIRS > 0
    COMPARES: tl.constexpr = True if sizes.BY_RANK else HAS_PAIRS
    K: tl.constexpr = sizes.K
    KP: tl.constexpr = triton.next_power_of_2(K)
    PLACED: tl.constexpr = max(KP, _PLACED)
    S: tl.constexpr = max(1, (_COMPARED // KP if COMPARES else _PICKS) // KP)
    BINS: tl.constexpr = B + sizes.P if HAS_PAIRS else B
    bins = tl.arange(0, triton.next_power_of_2(BINS))
    tl.store(room + bins, tl.zeros_like(bins), mask=bins < BINS)
    num_counted = tl.zeros([], tl.int32)
    for first in range(first_token, last_token, PLACED // KP):
        tl.debug_barrier()  # there is nothing in the room yet, or the last ones have been looked up
        for earlier in range(num_counted, first, S):
            expert, _, _ = load_picks(given.topk_idx, first, earlier, K, S)
            key, is_row = rows_of(expert, sizes, sizes.BY_RANK, S)
            tl.atomic_add(room + key, tl.full([S * KP], 1, tl.int32), mask=is_row, sem="relaxed", scope="gpu")
            if HAS_PAIRS:
                peer, is_pair = rows_of(expert, sizes, True, S)
                tl.atomic_add(room + B + peer, tl.full([S * KP], 1, tl.int32), mask=is_pair, sem="relaxed", scope="gpu")
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
        if HAS_PAIRS:
            peer, is_pair = rows_of(expert, sizes, True, PLACED // KP)
            nth = nth_of_key(peer, is_pair, sizes.P)
            before = tl.atomic_add(room + B + peer, tl.zeros_like(peer), mask=is_pair, sem="relaxed", scope="gpu")
            tl.store(shares.pair_nths + at, nth + tl.where(is_pair, before, 0), mask=is_here)


@triton.jit
def keep_addresses(segments, call, given, shares, arrivals, at, peer, row, is_row, is_here, places, how):
    """Where rows go, and their scales, as entries of ``shares``: 0 where none is."""
    segment, slot = tl.load(segments + peer), slot_of(call, peer)
    to_row = region_at(segment, arrivals.rows, slot) + row.to(tl.int64) * how.BETWEEN
    tl.store(shares.to_rows + at, tl.where(is_row, to_row, 0), mask=is_here)
    if how.SCALES > 0:
        to_scale = region_at(segment, arrivals.scales, slot)
        to_scale += scale_offset(row, given.segment_rows, places.SEGMENT_BYTES, places.ROW_BYTES)
        tl.store(shares.to_scales + at, to_scale, mask=is_here)


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

    Of the tokens from ``first_owned`` on, whose first piece is the program's, it also writes places, return_rows,
    metadata, and which rows are of a pair.
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
        if not how.STAGED:
            keep_addresses(segments, call, given, shares, arrivals, at, peer, row, is_row, is_here, places, how)
        owns = is_here & (token >= first_owned)
        dst_row = (peer.to(tl.int64) << ROW_BITS) | row
        tl.store(tables.dst_rows + at, tl.where(is_row, dst_row, -1), mask=owns)
        tl.store(tables.return_rows + at, tl.where(is_row, return_row, -1), mask=owns)
        if not sizes.BY_RANK:
            to_metadata = region_at(tl.load(segments + peer), arrivals.metadata, slot_of(call, peer))
            to_metadata = pointers(to_metadata + row.to(tl.int64) * (4 * how.METADATA_WORDS), tl.int32)
            tl.store(to_metadata, given.source + token, mask=owns & is_row)
            if (given.steps & HAS_WEIGHTS) != 0:
                weight = tl.load(given.weights + at, mask=is_here, other=0)
                tl.store(to_metadata + 1, weight, mask=owns & is_row)
        if sizes.PAIRS > 0:
            nth = tl.load(shares.pair_nths + at, mask=is_here, other=0)
            peer, is_pair = rows_of(tl.where(goes, expert, -1), sizes, True, PLACED // KP)
            pair = tl.load(shares.send_starts + 2 * B + peer, mask=is_pair, other=0) + nth
            return_row = tl.load(shares.send_starts + 2 * B + sizes.P + peer, mask=is_pair, other=0) + nth
            column = columns_of(peer, is_pair, PLACED // KP, True)
            at = token * sizes.PAIRS + column
            is_here = (token < last_token) & (column < sizes.PAIRS)
            owns = is_here & (token >= first_owned)
            tl.store(
                tables.pair_dst_rows + at, tl.where(is_pair, (peer.to(tl.int64) << ROW_BITS) | pair, -1), mask=owns
            )
            tl.store(tables.pair_return_rows + at, tl.where(is_pair, return_row, -1), mask=owns)
            if how.STAGED:
                peer = tl.where(is_pair, peer, 0)
                keep_addresses(segments, call, given, shares, arrivals, at, peer, pair, is_pair, is_here, places, how)
    tl.debug_barrier()
    if sizes.BY_RANK:
        push_metadata_share(call, given, tables, segments, arrivals, first_owned, last_token, sizes, how)
    if sizes.PAIRS > 0:
        TOKENS: tl.constexpr = PLACED // KP
        for first in range(first_owned, last_token, TOKENS):
            push_partial_rows(call, tables, first, last_token, segments, arrivals, sizes, TOKENS)


@triton.jit
def push_metadata_share(call, given, tables, segments, arrivals, first_owned, last_token, sizes, how):
    """The metadata of a program's tokens, where rows go as the plan says."""
    TOKENS: tl.constexpr = max(1, min(_PLACED, _WORDS_BESIDE // triton.next_power_of_2(1 + 2 * sizes.K)))
    carries = tl.where((given.steps & HAS_WEIGHTS) != 0, WEIGHTS, 0)
    push_metadata(
        call, tables, first_owned, last_token, TOKENS, carries, given.weights, given.weights, given.source,
        segments, arrivals, sizes, how.METADATA_WORDS, 0, TOKENS,
    )  # fmt: skip


@triton.jit
def address_known(segments, call, given, tables, shares, arrivals, first_token, last_token, first_owned, sizes, places,
                  how):  # fmt: skip
    """``address_share`` of a plan that is known: its rows go where they went before."""
    J: tl.constexpr = sizes.PAIRS if how.STAGED else sizes.J
    dst_rows = tables.pair_dst_rows if how.STAGED else tables.dst_rows
    for first in range(first_token * J, last_token * J, _PLACED):
        at = first + tl.arange(0, _PLACED)
        is_here = at < last_token * J
        dst_row = tl.load(dst_rows + at, mask=is_here, other=-1)
        is_row = dst_row >= 0
        peer, row = tl.where(is_row, dst_row >> ROW_BITS, 0), tl.where(is_row, dst_row & ROW_MASK, 0)
        keep_addresses(segments, call, given, shares, arrivals, at, peer, row, is_row, is_here, places, how)
    tl.debug_barrier()
    if (given.steps & METADATA) != 0:
        push_metadata_share(call, given, tables, segments, arrivals, first_owned, last_token, sizes, how)


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
                if how.BETWEEN % 16 == 0:
                    to_row = tl.multiple_of(to_row, 16)
                tl.store(to_row + word, now, mask=is_word & (there[j] != 0), eviction_policy=POLICY)
                if SCALES > 0:
                    to_scale = scales_there[j].to(scales.dtype, bitcast=True)
                    tl.store(to_scale + behind, scale, mask=(group < SCALES) & (there[j] != 0))


@triton.jit
def send_share(own, call, rank, given, tables, shares, arrivals, places, how):
    """A program's share of the rows: pieces one after another, of a few tokens. See ``dispatch_rows``."""
    program, num_programs = tl.program_id(0) - 1, tl.num_programs(0) - 1
    num_pieces = given.num_tokens * how.PIECES
    first_piece, last_piece = program * num_pieces // num_programs, (program + 1) * num_pieces // num_programs
    first_token, last_token = first_piece // how.PIECES, (last_piece + how.PIECES - 1) // how.PIECES
    decided = tl.full([], 0, tl.int32)
    begins = given.steps & BEGINS
    if begins == 0:  # most often all has been sent
        decided = await_go(own.flags + GO_FLAG)
    if decided != NOTHING:
        if not how.CACHED:
            room = shares.counts + program * ((own.sizes.L + 1) * own.sizes.P)
            count_share(given, tables, shares, own.flags, room, first_token, last_token, own.sizes)
        if how.BLOCK > 0:
            cast_share(given, first_piece, last_piece, how)
        tl.debug_barrier()  # what the program has kept is there for all its warps
        values = load_piece(given, first_piece, last_piece, how)
        if begins != 0:
            decided = await_go(own.flags + GO_FLAG)
        if decided != NOTHING:
            first_owned = (first_piece + how.PIECES - 1) // how.PIECES
            if not how.CACHED:
                address_share(
                    own.segments, call, given, tables, shares, arrivals, first_token, last_token, first_owned,
                    decided == GO, own.sizes, places, how,
                )  # fmt: skip
            if decided == GO:
                if how.CACHED:
                    address_known(
                        own.segments, call, given, tables, shares, arrivals, first_token, last_token, first_owned,
                        own.sizes, places, how,
                    )  # fmt: skip
                J: tl.constexpr = own.sizes.PAIRS if how.STAGED else own.sizes.J
                push_share(given, shares, values, first_piece, last_piece, J, places, how)
                zero_gaps(call, tables, rank, program, num_programs, own.segments, arrivals, own.sizes, how.gaps)
