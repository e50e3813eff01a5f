"""What travels beside rows: metadata, and which rows make up a pair; and zeros where no rows come. Triton only.

A metadata is int32 words: source, then the token's picks and their weights, or the weight of the row's one pick, then
extras; ``crossdock.arena`` has the sizes.

Letters: T tokens here, K top-k, J rows of a token, M max_tokens, L local experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import is_ok, slot_of
from crossdock.backends.cuda.kernels.picks import ROW_BITS, ROW_MASK, src_rows_of
from crossdock.backends.cuda.kernels.tables import tables_of

TELLS = tl.constexpr(1)
WEIGHTS = tl.constexpr(2)
EXTRAS = tl.constexpr(4)
"""What a dispatch has, or does: the host waits for its counts; weights and extras travel with the rows."""
_ZEROS = tl.constexpr(1024)
"""Words that a program zeroes at a time."""


@triton.jit
def as_int64(index):
    """An index as int64, so that its product with a row's size does not wrap around."""
    return tl.zeros([], tl.int64) + index


@triton.jit
def row_at(address, row, like, ROW_BYTES: tl.constexpr):
    """A pointer of the type of ``like`` to a row behind an address (int64, a multiple of 16 bytes)."""
    return as_row(address + row.to(tl.int64) * ROW_BYTES, like, ROW_BYTES)


@triton.jit
def as_row(address, like, ROW_BYTES: tl.constexpr):
    """A pointer of the type of ``like`` to a row of so many bytes, or a multiple of them, at an address (int64)."""
    at = address.to(like.dtype, bitcast=True)
    if ROW_BYTES % 16 == 0:  # of an address from a table the compiler does not know
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def region_at(segment, region, slot):
    """Where a slot of a region begins in a segment, int64 addresses."""
    return segment + region.offset + slot * region.slot_bytes


@triton.jit
def pointers(address, dtype: tl.constexpr):
    """Addresses as pointers."""
    return address.to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def push_metadata(
    call, tables, begin, end, step, carries, weights, extras, source, segments, arrivals, sizes,
    WORDS: tl.constexpr, EXTRA: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes the metadata of each row beside it, of the tokens from ``begin`` to ``end``, TOKENS of each ``step``.

    Args:
        carries: WEIGHTS, EXTRAS.
        weights: int32 ``[T, K]``, the bits of float32; extras: int32 ``[T, EXTRA]``.
        source: of this rank's token 0.
        WORDS: between metadata; EXTRA of them for extras.
    """
    K: tl.constexpr = sizes.K
    J: tl.constexpr = sizes.J
    PICKS: tl.constexpr = 2 * K if sizes.BY_RANK else 1
    has_weights, has_extras = (carries & WEIGHTS) != 0, (carries & EXTRAS) != 0
    word = tl.arange(0, triton.next_power_of_2(1 + PICKS + EXTRA))
    at = word[None, :]
    for first in range(begin, end, step):
        token = first + tl.arange(0, TOKENS)
        is_token = token < end
        metadata = tl.where(at == 0, (source + token)[:, None], 0)
        if sizes.BY_RANK:
            is_id = is_token[:, None] & (at >= 1) & (at <= K)
            ids = tl.load(tables.picks + token[:, None] * K + at - 1, mask=is_id, other=0).to(tl.int32)
            metadata = tl.where(is_id, ids, metadata)
            is_weight = is_token[:, None] & (at > K) & (at <= 2 * K) & has_weights
            weight = tl.load(weights + token[:, None] * K + at - 1 - K, mask=is_weight, other=0)
            metadata = tl.where(is_weight, weight, metadata)
        if EXTRA > 0:
            is_extra = is_token[:, None] & (at > PICKS) & (at <= PICKS + EXTRA) & has_extras
            more = tl.load(extras + token[:, None] * EXTRA + at - 1 - PICKS, mask=is_extra, other=0)
            metadata = tl.where(is_extra, more, metadata)
        for j in tl.static_range(J):
            dst_row = tl.load(tables.dst_rows + token * J + j, mask=is_token, other=-1)
            peer = tl.where(dst_row >= 0, dst_row >> ROW_BITS, 0)
            there = region_at(tl.load(segments + peer), arrivals.metadata, slot_of(call, peer))
            there += (dst_row & ROW_MASK) * (4 * WORDS)
            if not sizes.BY_RANK:
                weight = tl.load(weights + token * K + j, mask=is_token & has_weights, other=0)
                metadata = tl.where(at == 1, weight[:, None], metadata)
            is_there = (dst_row >= 0)[:, None] & ((at < 1 + PICKS) | ((at < 1 + PICKS + EXTRA) & has_extras))
            tl.store(pointers(there, tl.int32)[:, None] + at, metadata, mask=is_there)


@triton.jit
def push_partial_rows(call, tables, begin, end, segments, arrivals, sizes, TOKENS: tl.constexpr):
    """Tells each rank which of its rows belong to one token: int32 ``[K]`` a pair, -1 for picks of other ranks."""
    K: tl.constexpr = sizes.K
    PAIRS: tl.constexpr = sizes.PAIRS
    token = begin + tl.arange(0, TOKENS)
    pick = tl.arange(0, triton.next_power_of_2(K))
    is_pick = (token < end)[:, None] & (pick < K)[None, :]
    dst_row = tl.load(tables.dst_rows + token[:, None] * K + pick[None, :], mask=is_pick, other=-1)
    for j in tl.static_range(PAIRS):
        pair = tl.load(tables.pair_dst_rows + token * PAIRS + j, mask=token < end, other=-1)
        peer = tl.where(pair >= 0, pair >> ROW_BITS, 0)
        there = region_at(tl.load(segments + peer), arrivals.partial_rows, slot_of(call, peer))
        there = pointers(there + (pair & ROW_MASK) * (4 * K), tl.int32)
        is_its = is_pick & (dst_row >= 0) & ((dst_row >> ROW_BITS) == peer[:, None])
        rows = tl.where(is_its, dst_row & ROW_MASK, -1).to(tl.int32)
        tl.store(there[:, None] + pick[None, :], rows, mask=is_pick & (pair >= 0)[:, None])


@triton.jit
def keep_partial_rows(came, tables, num_pairs, program, num_programs, sizes, AT_ONCE: tl.constexpr):
    """A program's share of which rows are a token's, as that has come: into the plan, AT_ONCE words at a time."""
    num_words = num_pairs * sizes.K
    for first in range(program * AT_ONCE, num_words, num_programs * AT_ONCE):
        at = first + tl.arange(0, AT_ONCE)
        is_there = at < num_words
        tl.store(tables.partial_rows + at, tl.load(came + at, mask=is_there), mask=is_there)


@triton.jit
def zero_words(address, first, last, WORDS: tl.constexpr, DTYPE: tl.constexpr, ROW: tl.constexpr, GROUP):
    """Zeroes the words of rows from ``first`` to ``last``: ROW words between rows, GROUP between the words of one."""
    PIECE: tl.constexpr = min(triton.next_power_of_2(WORDS), _ZEROS)
    memory = pointers(address, DTYPE)
    for start in range(0, WORDS, PIECE):
        word = start + tl.arange(0, PIECE)
        for row in range(first, last):
            there = memory + (tl.zeros([], tl.int64) + row) * ROW + word.to(tl.int64) * GROUP
            tl.store(there, tl.zeros([PIECE], DTYPE), mask=word < WORDS)


@triton.jit
def zero_gaps(call, tables, rank, program, num_programs, segments, arrivals, sizes, beside):
    """Zeroes the rows of a slot that alignment leaves behind the last row of each segment, and their scales.

    Each program of so many takes its share of the segments.
    """
    if beside.GAPS:
        segment, slot = tl.load(segments + rank), slot_of(call, rank)
        to_rows, to_scales = region_at(segment, arrivals.rows, slot), region_at(segment, arrivals.scales, slot)
        zero_gaps_at(tables, to_rows, to_scales, beside.SCALE_GROUP, program, num_programs, sizes, beside)


@triton.jit
def zero_gaps_at(tables, to_rows, to_scales, scale_group, program, num_programs, sizes, beside):
    """The same of rows, and scales, behind addresses.

    Args:
        scale_group: words between those of a row's scales.
    """
    P: tl.constexpr = sizes.P
    L: tl.constexpr = sizes.L
    for local in range(program, L, num_programs):
        block = tables.incoming + local * P + P - 1
        first, last = tl.load(block) + tl.load(block + L * P), tl.load(tables.starts + local + 1)
        zero_rows(to_rows, to_scales, first, last, scale_group, beside)


@triton.jit
def zero_rows(to_rows, to_scales, first, last, scale_group, beside):
    """Zeroes rows from ``first`` to ``last``, and their scales."""
    zero_words(to_rows, first, last, beside.ROW, beside.ROW_WORD, beside.ROW, 1)
    if beside.SCALES > 0:
        zero_words(to_scales, first, last, beside.SCALES, beside.SCALE_WORD, beside.SCALE_ROW, scale_group)


@triton.jit(do_not_specialize=["num_tokens", "slot", "num_rows", "rank"])
def unpack_metadata(
    plan,
    num_tokens,
    slot,
    src_idx,
    topk_idx,
    weights,
    num_rows,
    rank,
    own,
    arrivals,
    METADATA_WORDS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sources int32 ``[R]``, local experts int32 ``[R, K]`` (rows that serve several), weights ``[R]`` or ``[R, K]``.

    -1 and 0 where no row is, and where a pick is another rank's.
    """
    P: tl.constexpr = own.sizes.P
    K: tl.constexpr = own.sizes.K
    BLOCKS: tl.constexpr = P if own.sizes.BY_RANK else own.sizes.L * P
    tables = tables_of(plan, num_tokens, own.sizes)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_here = row < num_rows
    src_row = src_rows_of(row, tables.incoming, tl.load(tables.scalars), BLOCKS, P)
    is_row = is_here & (src_row >= 0) & is_ok(own.state)
    at = pointers(region_at(tl.load(own.segments + rank), arrivals.metadata, slot), tl.int32)
    at += row.to(tl.int64) * METADATA_WORDS
    tl.store(src_idx + row, tl.load(at, mask=is_row, other=-1), mask=is_here)
    if own.sizes.BY_RANK:
        pick = tl.arange(0, triton.next_power_of_2(K))
        is_pick = (pick < K)[None, :]
        is_there = is_row[:, None] & is_pick
        expert = tl.load(at[:, None] + 1 + pick[None, :], mask=is_there, other=-1) - rank * own.sizes.L
        is_local = is_there & (expert >= 0) & (expert < own.sizes.L)
        out = row[:, None] * K + pick[None, :]
        tl.store(topk_idx + out, tl.where(is_local, expert, -1), mask=is_here[:, None] & is_pick)
        if HAS_WEIGHTS:
            weight = tl.load(at[:, None] + 1 + K + pick[None, :], mask=is_local, other=0)
            tl.store(weights + out, weight, mask=is_here[:, None] & is_pick)
    elif HAS_WEIGHTS:
        tl.store(weights + row, tl.load(at + 1, mask=is_row, other=0), mask=is_here)
