"""Whole calls of few tokens, each one kernel: from picks to rows in place, and from words to sums. Triton only.

Program 0, the *clerk*, does what only one can: it counts, gives this rank's word, waits for everybody's, works out
where rows go, and releases the grid's programs with a *verdict*; they have loaded, and cast, their first rows
meanwhile. Whoever is last tells the peers that this rank's rows are in place, and waits for theirs, while the clerk,
who has had its share of rows too, works out where these lie.

On the wire such a call is the same as one by several kernels: ranks may do either.

Letters: T tokens here, K top-k, E experts, L local experts, P ranks, H hidden, G scale groups.
"""

# Tuples that grow by a value at each turn of an unrolled loop have no type.
# mypy: disable-error-code="assignment, var-annotated", no-warn-unreachable

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
    copy_counts,
    give_word,
    is_ok,
    look_for_abort,
    output_slot_of,
    post_arrived,
    slot_of,
    take_words,
)
from crossdock.backends.cuda.kernels.cast import cast_blocks
from crossdock.backends.cuda.kernels.places import (
    ROW_BITS,
    ROW_MASK,
    derive_incoming,
    derive_outgoing,
    has_bad_picks,
    load_picks,
)
from crossdock.backends.cuda.kernels.rows import wide
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
    """Picks of each expert, int64 ``[next_power_of_2(E + P)]``, and whether any pick is not allowed.

    Pairs of tokens and ranks, whose counts lie behind those of experts, are not counted here.
    """
    S: tl.constexpr = _PICKS // triton.next_power_of_2(K)
    BINS: tl.constexpr = triton.next_power_of_2(E + P)
    total = tl.zeros([BINS], tl.int32)
    is_bad = tl.full([], 0, tl.int32)
    for chunk in range((num_tokens + S - 1) // S):
        expert, _, _ = load_picks(topk_idx, num_tokens, chunk, K, S)
        is_pick = (expert >= 0) & (expert < E)
        is_bad = tl.maximum(is_bad, has_bad_picks(expert, E, S).to(tl.int32))
        total += tl.histogram(tl.where(is_pick, expert, 0), BINS, mask=is_pick)
    return total.to(tl.int64), is_bad != 0


@triton.jit
def count_before(topk_idx, num_picks, E: tl.constexpr):
    """Picks of each expert among the first ones, int32 ``[next_power_of_2(E)]``."""
    BINS: tl.constexpr = triton.next_power_of_2(E)
    total = tl.zeros([BINS], tl.int32)
    for first in range(0, num_picks, _OTHERS):
        at = first + tl.arange(0, _OTHERS)
        expert = tl.load(topk_idx + at, mask=at < num_picks, other=-1).to(tl.int32)
        is_pick = (expert >= 0) & (expert < E)
        total += tl.histogram(tl.where(is_pick, expert, 0), BINS, mask=is_pick)
    return total


@triton.jit
def look_up(table, room, index, is_there, E: tl.constexpr):
    """Values of a block ``[next_power_of_2(E)]`` at some indices, 0 where none is asked for.

    Through memory: to look them up in registers takes hundreds of these.

    Args:
        room: int32 ``[E]`` of the program's own.
    """
    at = tl.arange(0, table.shape[0])
    tl.debug_barrier()  # the last ones have been looked up
    tl.store(room + at, table, mask=at < E)
    tl.debug_barrier()
    return tl.load(room + index, mask=is_there, other=0)


@triton.jit
def piece_at(piece, ROW: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """Which values of a row a piece is, and which there are: ``[PIECE, BLOCK]`` if BLOCK > 0, else ``[PIECE]``."""
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
    token,
    piece,
    is_there,
    stride,
    ROW: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece of a token's row; 0 where there is none."""
    words, is_word = piece_at(piece, ROW, PIECE, BLOCK)
    return tl.load(x + wide(token) * stride + words, mask=is_word & is_there, other=0)


@triton.jit
def open_dispatch(
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
    aborts_offset,
    counts_offset,
    scalars,
    outgoing,
    capacity,
    verdict,
    topk_idx,
    num_tokens,
    P: tl.constexpr,
    RING: tl.constexpr,
    L: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    K: tl.constexpr,
):
    """The clerk's part up to the verdict. See ``dispatch_rows``.

    Returns:
        Whether the plan is settled now; everybody's counts as they came; and what ``derive_outgoing`` gives.
    """
    E: tl.constexpr = L * P
    settles = tl.full([], 1, tl.int32)
    moves = tl.full([], 0, tl.int1)
    end = tl.full([], 0, tl.int32)
    needed = tl.full([], 0, tl.int32)
    worst = tl.full([], 0, tl.int32)
    base = tl.zeros([triton.next_power_of_2(E)], tl.int32)
    own = tl.load(segments + rank)
    good = is_ok(state)
    sequence = tl.load(call + P + SEQUENCE)
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
            words = words_at(own, words_offset) + (sequence & (RING - 1)) * P
            settles = are_here(words, stamped(sequence, 0), patience, P).to(tl.int32)
    counts = words_at(own, counts_offset) + (sequence & (RING - 1)) * (P * (E + P))
    if settles != 0:
        status = tl.full([], ABORTED, tl.int32)
        if good:
            status = take_words(
                segments, state, call, record, report, sequence, payload, rank, max_polls,
                words_offset, aborts_offset, P, RING,
            )  # fmt: skip
        base, end, moves, needed, worst = derive_outgoing(
            counts, status == OK, scalars, outgoing, capacity, rank, P, L, L, 0, ALIGNMENT, AT_ONCE, False
        )
        if status == OK:
            tl.store(call + P + PROGRESS, tl.full([], READY, tl.int64))
        release_programs(verdict, tl.where(moves, GO, NO_ROWS))
    else:
        release_programs(verdict, tl.full([], NOTHING, tl.int32))
    return settles, counts, base, end, moves.to(tl.int32), needed, worst


@triton.jit
def place_token(
    segments,
    call,
    outgoing,
    places,
    homes,
    to_rows,
    to_scales,
    weights,
    token,
    pick,
    expert,
    nth,
    is_row,
    is_first,
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
    SCALE_BYTES: tl.constexpr,
    RECORD: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    """Works out where a token's rows go: their addresses, for all warps of the program to see.

    The first of the programs that share its pieces also writes the plan's places and homes, and the records.

    Args:
        nth: of each pick, how many rows of its expert come before.
    """
    row = tl.load(outgoing + expert, mask=is_row, other=0) + nth
    peer = tl.where(is_row, expert // L, 0)
    segment, slot, at = tl.load(segments + peer), slot_of(call, peer), token * K + pick
    to_row = segment + data_region + slot * data_slot_bytes + row.to(tl.int64) * ROW_BYTES
    tl.store(to_rows + at, tl.where(is_row, to_row, 0), mask=pick < K)
    if SCALES > 0:
        to_scale = segment + scale_region + slot * scale_slot_bytes + row.to(tl.int64) * SCALE_BYTES
        tl.store(to_scales + at, to_scale, mask=pick < K)
    tl.debug_barrier()
    if is_first:
        home = tl.load(outgoing + E + expert, mask=is_row, other=0) + nth
        place = (peer.to(tl.int64) << ROW_BITS) | row
        tl.store(places + at, tl.where(is_row, place, -1), mask=pick < K)
        tl.store(homes + at, tl.where(is_row, home, -1), mask=pick < K)
        to_record = segment + record_region + slot * record_slot_bytes + row.to(tl.int64) * (4 * RECORD)
        to_record = to_record.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(to_record, source + tl.zeros_like(pick) + token, mask=is_row)
        if HAS_WEIGHTS:
            tl.store(to_record + 1, tl.load(weights + at, mask=is_row, other=0), mask=is_row)


@triton.jit
def send_share(
    segments,
    call,
    outgoing,
    places,
    homes,
    verdict,
    to_rows,
    to_scales,
    rooms,
    num_shares,
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
    E: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
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
    """A program's share of the rows: its tokens one after another, each in pieces. See ``dispatch_rows``."""
    ITS: tl.constexpr = SCALES if BLOCK > 0 else ROW
    PIECES: tl.constexpr = (ITS + PIECE - 1) // PIECE
    WORD: tl.constexpr = tl.uint8 if BLOCK > 0 else x.dtype.element_ty
    share, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first_token = share * num_tokens // num_shares
    last_token = (share + 1) * num_tokens // num_shares
    pick = tl.arange(0, triton.next_power_of_2(K))
    before = count_before(topk_idx, first_token * K, E)
    values = load_piece(x, first_token, part, first_token < last_token, stride, ROW, PIECE, BLOCK)
    decided = tl.full([], 0, tl.int32)
    for token in range(first_token, last_token):
        expert = tl.load(topk_idx + token * K + pick, mask=pick < K, other=-1).to(tl.int32)
        is_pick = (expert >= 0) & (expert < E)
        nth = look_up(before, rooms + tl.program_id(0) * E, expert, is_pick, E)
        before += tl.histogram(tl.where(is_pick, expert, 0), before.shape[0], mask=is_pick)
        for piece in range(part, PIECES, parts):
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
                    scales = tl.load(scale + wide(token) * scale_stride + at, mask=is_scale)
            if decided == 0:  # the first rows are here, and cast, when peers' words are
                decided = take_verdict(verdict)
            if (piece == part) & (decided != NOTHING):
                place_token(
                    segments, call, outgoing, places, homes, to_rows, to_scales, weights, token, pick, expert, nth,
                    is_pick & (decided == GO), part == 0, source, data_region, data_slot_bytes,
                    scale_region, scale_slot_bytes, record_region, record_slot_bytes,
                    E, L, K, ROW_BYTES, SCALES, SCALE_BYTES, RECORD, HAS_WEIGHTS,
                )  # fmt: skip
            is_next = piece + parts < PIECES
            next_token, next_piece = token + tl.where(is_next, 0, 1), tl.where(is_next, piece + parts, part)
            values = load_piece(x, next_token, next_piece, next_token < last_token, stride, ROW, PIECE, BLOCK)
            if decided == GO:
                for k in tl.static_range(K):
                    there = tl.load(to_rows + token * K + k)
                    to_row = there.to(tl.pointer_type(WORD), bitcast=True)
                    if ROW_BYTES % 16 == 0:
                        to_row = tl.multiple_of(to_row, 16)
                    tl.store(to_row + words, data, mask=is_word & (there != 0))
                    if SCALES > 0:
                        to_scale = tl.load(to_scales + token * K + k)
                        to_scale = to_scale.to(tl.pointer_type(scales.dtype), bitcast=True)
                        tl.store(to_scale + at, scales, mask=is_scale & (there != 0))


@triton.jit(
    do_not_specialize=[
        "payload", "rank", "max_polls", "patience", "begins", "awaits", "num_shares", "parts", "num_tokens", "capacity",
        "source",
    ]
)  # fmt: skip
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
    num_shares,
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

    In one launch, or in two: the first ``begins``, and sends if all words are here within ``patience`` polls; the
    second ``awaits``, and sends before if the first did not.

    Args:
        call: see ``calls``; its PROGRESS says what is left to do.
        gathered ... homes, capacity: see ``places``; told: the report there.
        verdict, ticket: int32 ``[2]`` and ``[1]``, all 0.
        to_rows, to_scales: int64 ``[T, K]``, room for the addresses of rows and scales at their receivers.
        rooms: int32 ``[programs, E]``, of nobody in particular.
        num_shares, parts: tokens are shared out, and the pieces of each token's row.
        topk_idx: int64 ``[T, K]``; weights: int32 ``[T, K]``, the bits of float32.
        x: words ``[T, ROW]``, or values that are cast (BLOCK > 0: of so many with one scale); scale: words
            ``[T, SCALES]`` of rows that were cast before.
        ROW_BYTES, SCALE_BYTES: between rows there. SCALES: of a row there, with padding.
        PIECE: words of a row that a program moves (a power of two), or blocks, where they are cast.
        RECORD: words between records.
    """
    E: tl.constexpr = L * P
    settles = tl.full([], 0, tl.int32)
    moves = tl.full([], 0, tl.int32)
    end = tl.full([], 0, tl.int32)
    needed = tl.full([], 0, tl.int32)
    worst = tl.full([], 0, tl.int32)
    base = tl.zeros([triton.next_power_of_2(E)], tl.int32)
    counts = words_at(tl.load(segments + rank), counts_offset)
    if tl.program_id(0) == 0:
        settles, counts, base, end, moves, needed, worst = open_dispatch(
            segments, state, call, record, report, payload, rank, max_polls, patience, begins, awaits,
            words_offset, aborts_offset, counts_offset, scalars, outgoing, capacity, verdict, topk_idx, num_tokens,
            P, RING, L, ALIGNMENT, AT_ONCE, K,
        )  # fmt: skip
    send_share(
        segments, call, outgoing, places, homes, verdict, to_rows, to_scales, rooms, num_shares, parts,
        topk_idx, weights, x, scale, num_tokens, stride, scale_stride, source, data_region, data_slot_bytes,
        scale_region, scale_slot_bytes, record_region, record_slot_bytes,
        E, L, K, ROW, PIECE, ROW_BYTES, BLOCK, SCALES, SCALE_BYTES, POW2, EXPONENTS, RECORD, HAS_WEIGHTS,
    )  # fmt: skip
    is_last = is_last_program(ticket)
    if is_last:
        tl.atomic_xchg(verdict, 0, sem="relaxed", scope="gpu")
        if is_ok(state):  # noqa: SIM102 - the second is not to be read of a void call
            if tl.load(call + P + PROGRESS) == READY:
                post_arrived(segments, call, rank, arrived_offset, P, RING)
                tl.store(call + P + PROGRESS, tl.full([], SENT, tl.int64))
    if tl.program_id(0) == 0:  # behind its rows, which peers wait for; what is stored for the host delays a release
        if settles != 0:
            derive_incoming(
                counts, base, end, moves != 0, needed, worst, scalars, told, incoming, starts, tokens, capacity, rank,
                P, L, L, 0, ALIGNMENT, 1, False,
            )  # fmt: skip
            copy_counts(counts, gathered, moves != 0, P, E + P, 1)
        release_programs(verdict + 1, tl.full([], GO, tl.int32))
    if is_last:
        take_verdict(verdict + 1)
        tl.atomic_xchg(verdict + 1, 0, sem="relaxed", scope="gpu")
        if (awaits != 0) & is_ok(state):
            await_rows(
                segments, state, call, record, report, rank, max_polls, arrived_offset, aborts_offset,
                tokens, all_tokens, P, RING, True, L,
            )  # fmt: skip


@triton.jit(do_not_specialize=["payload", "rank"])
def begin_combine(segments, state, call, payload, rank, words_offset, P: tl.constexpr, RING: tl.constexpr):
    """Gives this rank's word for a combine, and waits for nobody."""
    if is_ok(state):
        give_word(segments, state, call, payload, False, tl.zeros([1], tl.int64), rank, words_offset, 0, P, RING, 0, 1)


@triton.jit
def sum_share(
    out,
    bias,
    weights,
    places,
    homes,
    segments,
    call,
    good,
    num_shares,
    parts,
    num_tokens,
    rank,
    outputs,
    slot_bytes,
    landing,
    bias_rows,
    J: tl.constexpr,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """A program's share of the sums: its tokens one after another, the addresses of a token's rows worked out once.

    What is summed, and from where, is as in ``sums.sum_rows``; without any rows where the call is not good.
    """
    PIECES: tl.constexpr = (H + PIECE - 1) // PIECE
    ROW_BYTES: tl.constexpr = H * out.dtype.element_ty.primitive_bitwidth // 8
    share, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    own = tl.load(segments + rank) + landing
    for token in range(share * num_tokens // num_shares, (share + 1) * num_tokens // num_shares):
        rows = ()
        weights_of = ()
        for j in tl.static_range(J):
            place = tl.load(places + token * J + j)
            is_row = (place >= 0) & good
            peer = tl.where(is_row, place >> ROW_BITS, rank)
            slot = output_slot_of(call, peer)
            there = tl.load(segments + peer) + outputs + slot * slot_bytes + (place & ROW_MASK) * ROW_BYTES
            if slot == PUSHED:
                there = own + tl.load(homes + token * J + j).to(tl.int64) * ROW_BYTES
            rows = rows + (tl.where(is_row, there, 0),)  # noqa: RUF005 - Triton's compiler knows no unpacking
            if HAS_WEIGHTS:
                weight = tl.load(weights + token * J + j, mask=is_row, other=0.0)
                weights_of = weights_of + (weight,)  # noqa: RUF005
        for piece in range(part, PIECES, parts):
            at = piece * PIECE + tl.arange(0, PIECE)
            total = tl.zeros([PIECE], tl.float32)
            for j in tl.static_range(J):
                row = rows[j].to(out.dtype, bitcast=True)
                if ROW_BYTES % 16 == 0:
                    row = tl.multiple_of(row, 16)
                value = tl.load(row + at, mask=(at < H) & (rows[j] != 0), other=0.0).to(tl.float32)
                if HAS_WEIGHTS:
                    value = value * weights_of[j]
                total += value
            if HAS_BIAS:
                total += tl.load(bias + wide(token) * bias_rows * H + at, mask=at < H, other=0.0).to(tl.float32)
            tl.store(out + wide(token) * H + at, total.to(out.dtype.element_ty), mask=at < H)


@triton.jit(
    do_not_specialize=[
        "payload", "rank", "max_polls", "begins", "num_shares", "parts", "num_tokens", "landing", "bias_rows",
    ]
)  # fmt: skip
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
    num_shares,
    parts,
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
    """A combine of outputs that this rank leaves where they are: words, and the sums that ``sum_rows`` makes.

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
                segments, state, call, record, report, sequence, payload, rank, max_polls,
                words_offset, aborts_offset, P, RING,
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
    sum_share(
        out, bias, weights, places, homes, segments, call, take_verdict(verdict) == GO, num_shares, parts, num_tokens,
        rank, outputs, slot_bytes, landing, bias_rows, J, H, PIECE, HAS_WEIGHTS, HAS_BIAS,
    )  # fmt: skip
    if is_last_program(ticket):
        tl.atomic_xchg(verdict, 0, sem="relaxed", scope="gpu")
        if is_ok(state):
            look_for_abort(segments, state, call, record, report, rank, aborts_offset, P)
