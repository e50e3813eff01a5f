"""Whole calls of few tokens, each one kernel: from picks to rows in place, and from words to sums. Triton only.

Program 0, the *clerk*, does what only one can: it counts, gives this rank's word, waits for everybody's, works out
where rows go, and releases the others of its grid with a *verdict*. These have loaded, and cast, their rows meanwhile.
Whoever is last tells the peers that this rank's rows are in place, and may wait for theirs.

The grid's programs wait for the clerk, so all of them that run must leave room for it: half of a multiprocessor's
registers is theirs. On the wire such a call is the same as one by several kernels: ranks may do either.

Letters: T tokens here, K top-k, E experts, L local experts, P ranks, S tokens of a program, H hidden, G scale groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import (
    BEGUN,
    OUTPUT_SHIFT,
    PROGRESS,
    PUSHED,
    READY,
    SENT,
    SEQUENCE,
    SLOT_MASK,
    await_rows,
    give_word,
    is_ok,
    look_for_abort,
    post_arrived,
    slot_of,
    take_words,
)
from crossdock.backends.cuda.kernels.cast import cast_blocks
from crossdock.backends.cuda.kernels.places import (
    ROW_BITS,
    derive_incoming,
    derive_outgoing,
    forget_counts,
    has_bad_picks,
    load_picks,
    nth_of_key,
)
from crossdock.backends.cuda.kernels.rows import wide
from crossdock.backends.cuda.kernels.sums import sum_share
from crossdock.backends.cuda.kernels.sync import (
    ABORTED,
    OK,
    are_here,
    is_last_program,
    release_programs,
    stamped,
    take_verdict,
    words_at,
)

GO = tl.constexpr(1)
NO_ROWS = tl.constexpr(2)
NOTHING = tl.constexpr(3)
"""Verdicts: rows go where the tables say; the call is void, or rows do not fit; there is nothing to do (any more)."""

_PICKS = tl.constexpr(512)
"""Picks that the clerk counts at a time."""
_OTHERS = tl.constexpr(512)
"""Earlier picks that a program counts at a time."""


@triton.jit
def count_all(topk_idx, num_tokens, E: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """Picks of each expert, int64 ``[next_power_of_2(E + P)]`` (pairs of tokens and ranks are not counted here), and
    whether any pick is not allowed."""
    S: tl.constexpr = _PICKS // triton.next_power_of_2(K)
    BINS: tl.constexpr = triton.next_power_of_2(E + P)
    total = tl.zeros([BINS], tl.int32)
    is_bad = tl.full([], 0, tl.int32)
    for chunk in range(0, (num_tokens + S - 1) // S):
        expert, _, _ = load_picks(topk_idx, num_tokens, chunk, K, S)
        is_pick = (expert >= 0) & (expert < E)
        is_bad = tl.maximum(is_bad, has_bad_picks(expert, E, S).to(tl.int32))
        total += tl.histogram(tl.where(is_pick, expert, 0), BINS, mask=is_pick)
    return total.to(tl.int64), is_bad != 0


@triton.jit
def nth_of_expert(expert, topk_idx, num_before, room, E: tl.constexpr):
    """Of a program's picks, how many rows of their experts come before: of earlier tokens' picks, and of these.

    Args:
        num_before: picks of all earlier tokens.
        room: int32 ``[E]`` of the program's own.
    """
    BINS: tl.constexpr = triton.next_power_of_2(E)
    before = tl.zeros([BINS], tl.int32)
    for first in range(0, num_before, _OTHERS):
        at = first + tl.arange(0, _OTHERS)
        other = tl.load(topk_idx + at, mask=at < num_before, other=-1).to(tl.int32)
        is_pick = (other >= 0) & (other < E)
        before += tl.histogram(tl.where(is_pick, other, 0), BINS, mask=is_pick)
    bins = tl.arange(0, BINS)
    tl.store(room + bins, before, mask=bins < E)  # to look it up by a block of experts: from registers takes hundreds
    tl.debug_barrier()
    return nth_of_key(expert, expert >= 0, E) + tl.load(room + expert, mask=expert >= 0, other=0)


@triton.jit
def piece_at(piece, ROW: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """Which values of a row a piece is, and which of these there are: ``[PIECE, BLOCK]`` if BLOCK > 0, else ``[PIECE]``."""
    words = piece * PIECE + tl.arange(0, PIECE)
    is_word = words < ROW
    if BLOCK > 0:
        within = tl.arange(0, triton.next_power_of_2(BLOCK))
        blocks, words = words, words[:, None] * BLOCK + within[None, :]
        is_word = (blocks < ROW // BLOCK)[:, None] & (within < BLOCK)[None, :]
    return words, is_word


@triton.jit
def load_piece(
    x,
    first_token,
    item,
    num_items,
    stride,
    ROW: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One of the pieces of rows ``x`` from a token on, counted through; 0 where there is none."""
    words, is_word = piece_at(item % PIECES, ROW, PIECE, BLOCK)
    row = x + wide(first_token + item // PIECES) * stride
    return tl.load(row + words, mask=is_word & (item < num_items), other=0)


@triton.jit(
    do_not_specialize=["payload", "rank", "max_polls", "patience", "num_tokens", "capacity", "source", "begins", "awaits", "parts"]
)
def dispatch_rows(
    segments,
    state,
    call,
    record,
    report,
    payload,
    rank,
    max_polls,
    patience,
    begins,
    awaits,
    words_offset,
    arrived_offset,
    aborts_offset,
    counts_offset,
    gathered,
    scalars,
    told,
    outgoing,
    incoming,
    starts,
    tokens,
    all_tokens,
    places,
    homes,
    capacity,
    verdict,
    ticket,
    to_rows,
    to_scales,
    rooms,
    parts,
    topk_idx,
    weights,
    x,
    scale,
    num_tokens,
    stride,
    scale_stride,
    source,
    data_region,
    data_slot_bytes,
    scale_region,
    scale_slot_bytes,
    record_region,
    record_slot_bytes,
    P: tl.constexpr,
    RING: tl.constexpr,
    L: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    ROW: tl.constexpr,
    PIECE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    POW2: tl.constexpr,
    EXPONENTS: tl.constexpr,
    RECORD: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    """A fresh dispatch of rows with one pick each: ``x [T, ...]`` to all its places, with sources and weights.

    In one launch, or in two: the first ``begins``, and sends if all words are here within ``patience`` polls; the second
    ``awaits``, and sends before if the first did not.

    Args:
        call: see ``calls``; its PROGRESS says what is left to do.
        gathered ... homes, capacity: see ``places``; told: the report there.
        verdict, ticket: int32, both 0.
        to_rows, to_scales: int64 ``[T, K]``, room for the addresses of rows and scales at their receivers.
        rooms: int32 ``[programs, E]``, of nobody in particular.
        parts: programs that share the pieces of S tokens.
        topk_idx: int64 ``[T, K]``; weights: int32 ``[T, K]``, the bits of float32.
        x: words ``[T, ROW]``, or values that are cast (BLOCK > 0: of so many with one scale); scale: words
            ``[T, SCALES]`` of rows that were cast before.
        ROW_BYTES, SCALE_BYTES: between rows there. SCALES: of a row there, with padding.
        PIECE: words of a row that a program moves (a power of two), or blocks, where they are cast.
        RECORD: words between records.
    """
    E: tl.constexpr = L * P
    ITS: tl.constexpr = SCALES if BLOCK > 0 else ROW
    PIECES: tl.constexpr = (ITS + PIECE - 1) // PIECE
    if tl.program_id(0) == 0:
        good = is_ok(state)
        sequence = tl.load(call + P + SEQUENCE)
        settles = tl.full([], 1, tl.int32)
        if good:
            if begins != 0:
                mine, is_refused = count_all(topk_idx, num_tokens, E, P, K)
                sequence = give_word(
                    segments, state, call, payload, is_refused, mine, rank, words_offset, counts_offset,
                    P, RING, E + P, AT_ONCE,
                )  # fmt: skip
            else:
                settles = (tl.load(call + P + PROGRESS) == BEGUN).to(tl.int32)
            if awaits == 0:
                words = words_at(tl.load(segments + rank), words_offset) + (sequence & (RING - 1)) * P
                settles = are_here(words, stamped(sequence, 0), patience, P).to(tl.int32)
        if settles != 0:
            status = tl.full([], ABORTED, tl.int32)
            if good:
                status = take_words(
                    segments, state, call, record, report, sequence, payload, gathered, rank, max_polls,
                    words_offset, aborts_offset, counts_offset, P, RING, E + P, AT_ONCE,
                )  # fmt: skip
                tl.debug_barrier()  # every warp's part of the counts is there
            base, end, moves = derive_outgoing(
                gathered, status == OK, scalars, told, outgoing, capacity, rank,
                P, L, L, 0, ALIGNMENT, AT_ONCE, False,
            )  # fmt: skip
            if status == OK:
                tl.store(call + P + PROGRESS, tl.full([], READY, tl.int64))
            release_programs(verdict, tl.where(moves, GO, NO_ROWS))
            derive_incoming(
                gathered, base, end, moves, scalars, told, incoming, starts, tokens, capacity, rank,
                P, L, L, 0, ALIGNMENT, AT_ONCE, False,
            )  # fmt: skip
            if moves == 0:
                forget_counts(gathered, P, E + P)
        else:
            release_programs(verdict, tl.full([], NOTHING, tl.int32))
    else:
        PARTS_TYPE: tl.constexpr = tl.uint8 if BLOCK > 0 else x.dtype.element_ty
        block, part = (tl.program_id(0) - 1) // parts, (tl.program_id(0) - 1) % parts
        expert, token, pick = load_picks(topk_idx, num_tokens, block, K, S)
        expert = tl.where(expert < E, expert, -1)
        nth = nth_of_expert(expert, topk_idx, block * (S * K), rooms + tl.program_id(0) * E, E)
        decided = tl.full([], 0, tl.int32)
        num_items = tl.minimum(S, num_tokens - block * S) * PIECES
        values = load_piece(x, block * S, part, num_items, stride, ROW, PIECE, PIECES, BLOCK)
        for item in range(part, num_items, parts):
            row_token, piece = block * S + item // PIECES, item % PIECES
            words, is_word = piece_at(piece, ROW, PIECE, BLOCK)
            if BLOCK > 0:
                at = piece * PIECE + tl.arange(0, PIECE)
                data, scales = cast_blocks(values.to(tl.float32), POW2, EXPONENTS)
                scales = tl.where(at < ROW // BLOCK, scales, 0).to(tl.uint8 if EXPONENTS else tl.float32)
                is_scale = at < SCALES
            else:
                data = values
                if SCALES > 0:
                    at = tl.arange(0, triton.next_power_of_2(SCALES))
                    is_scale = (at < SCALES) & (piece == 0)
                    scales = tl.load(scale + wide(row_token) * scale_stride + at, mask=is_scale)
            if decided == 0:  # the first rows are here, and cast, when peers' words are
                decided = take_verdict(verdict)
                is_row = (expert >= 0) & (decided == GO)
                row = tl.load(outgoing + expert, mask=is_row, other=0) + nth
                home = tl.load(outgoing + E + expert, mask=is_row, other=0) + nth
                peer = tl.where(is_row, expert // L, 0)
                segment, slot, place = tl.load(segments + peer), slot_of(call, peer), token * K + pick
                is_pick = (token < num_tokens) & (pick < K) & (decided != NOTHING)
                there = segment + data_region + slot * data_slot_bytes + row.to(tl.int64) * ROW_BYTES
                tl.store(to_rows + place, tl.where(is_row, there, 0), mask=is_pick)
                if SCALES > 0:
                    there = segment + scale_region + slot * scale_slot_bytes + row.to(tl.int64) * SCALE_BYTES
                    tl.store(to_scales + place, there, mask=is_pick)
                if part == 0:
                    there = (peer.to(tl.int64) << ROW_BITS) | row
                    tl.store(places + place, tl.where(is_row, there, -1), mask=is_pick)
                    tl.store(homes + place, tl.where(is_row, home, -1), mask=is_pick)
                    there = segment + record_region + slot * record_slot_bytes + row.to(tl.int64) * (4 * RECORD)
                    to_record = there.to(tl.pointer_type(tl.int32), bitcast=True)
                    tl.store(to_record, source + token, mask=is_row)
                    if HAS_WEIGHTS:
                        tl.store(to_record + 1, tl.load(weights + place, mask=is_row, other=0), mask=is_row)
                tl.debug_barrier()
            values = load_piece(x, block * S, item + parts, num_items, stride, ROW, PIECE, PIECES, BLOCK)
            if decided == GO:
                for k in tl.static_range(K):
                    there = tl.load(to_rows + row_token * K + k)
                    to_row = there.to(tl.pointer_type(PARTS_TYPE), bitcast=True)
                    if ROW_BYTES % 16 == 0:
                        to_row = tl.multiple_of(to_row, 16)
                    tl.store(to_row + words, data, mask=is_word & (there != 0))
                    if SCALES > 0:
                        to_scale = tl.load(to_scales + row_token * K + k)
                        to_scale = to_scale.to(tl.pointer_type(scales.dtype), bitcast=True)
                        tl.store(to_scale + at, scales, mask=is_scale & (there != 0))
    if is_last_program(ticket):
        tl.atomic_xchg(verdict, 0, sem="relaxed", scope="gpu")
        if is_ok(state):
            if tl.load(call + P + PROGRESS) == READY:
                post_arrived(segments, call, rank, arrived_offset, P, RING)
                tl.store(call + P + PROGRESS, tl.full([], SENT, tl.int64))
            if awaits != 0:
                await_rows(
                    segments, state, call, record, report, rank, max_polls, arrived_offset, aborts_offset,
                    tokens, all_tokens, P, RING, True, L,
                )  # fmt: skip


@triton.jit(do_not_specialize=["payload", "rank"])
def begin_combine(segments, state, call, payload, rank, words_offset, P: tl.constexpr, RING: tl.constexpr):
    """Gives this rank's word for a combine, and waits for nobody."""
    if is_ok(state):
        give_word(segments, state, call, payload, False, tl.zeros([1], tl.int64), rank, words_offset, 0, P, RING, 0, 1)


@triton.jit(do_not_specialize=["payload", "rank", "max_polls", "begins", "num_tokens", "landing", "bias_rows"])
def combine_rows(
    segments,
    state,
    call,
    record,
    report,
    payload,
    rank,
    max_polls,
    begins,
    words_offset,
    arrived_offset,
    aborts_offset,
    verdict,
    ticket,
    out,
    bias,
    weights,
    places,
    homes,
    num_tokens,
    outputs,
    slot_bytes,
    landing,
    bias_rows,
    P: tl.constexpr,
    RING: tl.constexpr,
    J: tl.constexpr,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """A combine of outputs that this rank leaves where they are: words, and the sums of ``sum_rows``.

    Args:
        begins: whether this rank's word is still to be given.
        verdict, ticket: int32, both 0.
    """
    if tl.program_id(0) == 0:
        status = tl.full([], ABORTED, tl.int32)
        if is_ok(state):
            sequence = tl.load(call + P + SEQUENCE)
            if begins != 0:
                sequence = give_word(
                    segments, state, call, payload, False, tl.zeros([1], tl.int64), rank, words_offset, 0,
                    P, RING, 0, 1,
                )  # fmt: skip
            status = take_words(
                segments, state, call, record, report, sequence, payload, record, rank, max_polls,
                words_offset, aborts_offset, 0, P, RING, 0, 1,
            )  # fmt: skip
            if status == OK:
                lanes = tl.arange(0, triton.next_power_of_2(P))
                theirs = tl.load(call + lanes, mask=lanes < P, other=0)
                if tl.max((((theirs >> OUTPUT_SHIFT) & SLOT_MASK) == PUSHED).to(tl.int32), axis=0) != 0:
                    status = await_rows(
                        segments, state, call, record, report, rank, max_polls, arrived_offset, aborts_offset,
                        record, record, P, RING, False, 0,
                    )  # fmt: skip
        release_programs(verdict, tl.where(status == OK, GO, NO_ROWS))
    good = take_verdict(verdict) == GO
    sum_share(
        out, bias, weights, places, homes, segments, call, good, num_tokens, rank, outputs, slot_bytes, landing,
        bias_rows, J, H, PIECE, HAS_WEIGHTS, HAS_BIAS,
    )  # fmt: skip
    if is_last_program(ticket):
        tl.atomic_xchg(verdict, 0, sem="relaxed", scope="gpu")
        if is_ok(state):
            look_for_abort(segments, state, call, record, report, rank, aborts_offset, P)
