"""The small things that travel with a row: source, ids, weights, extras; and which rows make up a pair. Triton only.

A metadata is int32 words: source, then the token's picks and their weights, or the weight of the row's one pick, then
extras; ``crossdock.arena`` has the sizes.

Letters: T tokens here, K top-k, J rows of a token, M max_tokens, L local experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import is_ok, slot_of
from crossdock.backends.cuda.kernels.plan import NUM_ROWS, ROW_BITS, ROW_MASK, src_rows_of
from crossdock.backends.cuda.kernels.sync import words_at


@triton.jit(do_not_specialize=["num_tokens", "source"])
def push_metadata(
    topk_idx,
    weights,
    extras,
    dst_rows,
    segments,
    call,
    state,
    num_tokens,
    source,
    region,
    slot_bytes,
    K: tl.constexpr,
    J: tl.constexpr,
    PER_PICK: tl.constexpr,
    METADATA_WORDS: tl.constexpr,
    EXTRA: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Writes the metadata of each row beside it.

    Args:
        weights: int32 ``[T, K]``, the bits of float32; extras: int32 ``[T, EXTRA]``.
        source: of this rank's token 0.
        METADATA_WORDS: words between metadata.
    """
    PICKS: tl.constexpr = 1 if PER_PICK else 2 * K
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    word = tl.arange(0, triton.next_power_of_2(1 + PICKS + EXTRA))
    at = word[None, :]
    metadata = tl.where(at == 0, (source + token)[:, None], 0)
    if not PER_PICK:
        is_id = is_token[:, None] & (at >= 1) & (at <= K)
        ids = tl.load(topk_idx + token[:, None] * K + at - 1, mask=is_id, other=0).to(tl.int32)
        metadata = tl.where(is_id, ids, metadata)
        if HAS_WEIGHTS:
            is_weight = is_token[:, None] & (at > K) & (at <= 2 * K)
            metadata = tl.where(
                is_weight, tl.load(weights + token[:, None] * K + at - 1 - K, mask=is_weight, other=0), metadata
            )
    if EXTRA > 0:
        is_extra = is_token[:, None] & (at > PICKS) & (at <= PICKS + EXTRA)
        more = tl.load(extras + token[:, None] * EXTRA + at - 1 - PICKS, mask=is_extra, other=0)
        metadata = tl.where(is_extra, more, metadata)
    if is_ok(state):
        for j in tl.static_range(J):
            dst_row = tl.load(dst_rows + token * J + j, mask=is_token, other=-1)
            peer = tl.where(dst_row >= 0, dst_row >> ROW_BITS, 0)
            base = tl.load(segments + peer) + region + slot_of(call, peer) * slot_bytes
            base += (dst_row & ROW_MASK) * (4 * METADATA_WORDS)
            if PER_PICK:  # noqa: SIM102 - Triton's compiler takes no ``and`` of constants that decide on code
                if HAS_WEIGHTS:
                    weight = tl.load(weights + token * K + j, mask=is_token, other=0)
                    metadata = tl.where(at == 1, weight[:, None], metadata)
            there = base.to(tl.pointer_type(tl.int32), bitcast=True)[:, None] + at
            tl.store(there, metadata, mask=(dst_row >= 0)[:, None] & (at < 1 + PICKS + EXTRA))


@triton.jit(do_not_specialize=["num_rows", "first_expert"])
def unpack_metadata(
    metadata,
    incoming,
    scalars,
    src_rows,
    src_idx,
    topk_idx,
    weights,
    state,
    num_rows,
    first_expert,
    L: tl.constexpr,
    K: tl.constexpr,
    PER_PICK: tl.constexpr,
    METADATA_WORDS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IS_FRESH: tl.constexpr,
    BLOCKS: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sources int32 ``[R]``, local experts int32 ``[R, K]`` (rows that serve several), weights ``[R]`` or ``[R, K]``.

    -1 and 0 where no row is, and where a pick is another rank's. Where rows are from is worked out first, where that is
    not known yet (``IS_FRESH``): ``src_rows`` int64 ``[R]``, see ``src_rows_of``.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_here = row < num_rows
    if IS_FRESH:
        src_row = src_rows_of(row, incoming, scalars, NUM_ROWS, BLOCKS, P)
        tl.store(src_rows + row, src_row, mask=is_here)
    else:
        src_row = tl.load(src_rows + row, mask=is_here, other=-1)
    is_row = is_here & (src_row >= 0) & is_ok(state)
    at = metadata + row.to(tl.int64) * METADATA_WORDS
    tl.store(src_idx + row, tl.load(at, mask=is_row, other=-1), mask=is_here)
    if PER_PICK:
        if HAS_WEIGHTS:
            tl.store(weights + row, tl.load(at + 1, mask=is_row, other=0), mask=is_here)
    else:
        pick = tl.arange(0, triton.next_power_of_2(K))
        is_pick = (pick < K)[None, :]
        expert = tl.load(at[:, None] + 1 + pick[None, :], mask=is_row[:, None] & is_pick, other=-1) - first_expert
        is_local = is_row[:, None] & is_pick & (expert >= 0) & (expert < L)
        out = row[:, None] * K + pick[None, :]
        tl.store(topk_idx + out, tl.where(is_local, expert, -1), mask=is_here[:, None] & is_pick)
        if HAS_WEIGHTS:
            weight = tl.load(at[:, None] + 1 + K + pick[None, :], mask=is_local, other=0)
            tl.store(weights + out, weight, mask=is_here[:, None] & is_pick)


@triton.jit(do_not_specialize=["num_tokens"])
def push_partial_rows(
    dst_rows,
    pair_dst_rows,
    segments,
    call,
    state,
    num_tokens,
    region,
    slot_bytes,
    K: tl.constexpr,
    J: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Tells each rank which of its rows belong to one token: int32 ``[K]`` a pair, -1 for picks of other ranks.

    Args:
        dst_rows: int64 ``[T, K]`` of rows; pair_dst_rows: int64 ``[T, J]``.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pick = tl.arange(0, triton.next_power_of_2(K))
    is_pick = (token < num_tokens)[:, None] & (pick < K)[None, :]
    dst_row = tl.load(dst_rows + token[:, None] * K + pick[None, :], mask=is_pick, other=-1)
    if is_ok(state):
        for j in tl.static_range(J):
            pair = tl.load(pair_dst_rows + token * J + j, mask=token < num_tokens, other=-1)
            peer = tl.where(pair >= 0, pair >> ROW_BITS, 0)
            base = tl.load(segments + peer) + region + slot_of(call, peer) * slot_bytes
            there = words_at(base, (pair & ROW_MASK) * (4 * K)).to(tl.pointer_type(tl.int32), bitcast=True)
            is_its = is_pick & (dst_row >= 0) & ((dst_row >> ROW_BITS) == peer[:, None])
            rows = tl.where(is_its, dst_row & ROW_MASK, -1).to(tl.int32)
            tl.store(there[:, None] + pick[None, :], rows, mask=is_pick & (pair >= 0)[:, None])
