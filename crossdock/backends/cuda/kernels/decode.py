"""Whole calls of few tokens, each one kernel: from picks to rows in place, and from words to sums. Triton only.

Program 0, the *clerk*, does what only one can: it counts, gives this rank's word, waits for everybody's, works out
where rows go, and lets the other programs go on with a *verdict*; these have cast and counted their shares meanwhile,
and now only copy. Whoever is last tells the peers that this rank's rows are in place, and waits for theirs.

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
    nth_of_key,
    picks_at,
)
from crossdock.backends.cuda.kernels.rows import wide
from crossdock.backends.cuda.kernels.scales import group_offset, scale_offset
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

_PICKS = tl.constexpr(1024)
"""Picks that are counted at a time."""
_TOKENS = tl.constexpr(256)
"""Tokens whose picks are looked at at a time."""
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
def do_books(
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
    gathered,
    scalars,
    told,
    outgoing,
    incoming,
    starts,
    tokens,
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
    """The clerk's part: words, counts, the verdict, and then what else the plan and the host are told.

    See ``dispatch_rows``.
    """
    E: tl.constexpr = L * P
    W: tl.constexpr = E + P
    own = tl.load(segments + rank)
    good = is_ok(state)
    sequence = tl.load(call + P + SEQUENCE)
    settles = tl.full([], 1, tl.int32)
    if begins != 0:  # pairs of tokens and ranks, whose counts lie behind those of experts, are not counted here
        mine = count_picks(topk_idx, num_tokens * K, E).to(tl.int64)
        is_refused = has_bad_picks(topk_idx, 0, num_tokens, E, K, _TOKENS)
        if good:
            sequence = give_word(
                segments, state, call, payload, is_refused, mine, rank, words_offset, counts_offset,
                P, RING, W, AT_ONCE,
            )  # fmt: skip
    elif good:
        settles = (tl.load(call + P + PROGRESS) == BEGUN).to(tl.int32)
    if (awaits == 0) & good:
        words = words_at(own, words_offset) + (sequence & (RING - 1)) * P
        settles = are_here(words, stamped(sequence, 0), patience, P).to(tl.int32)
    if settles == 0:
        release_programs(verdict, tl.full([], NOTHING, tl.int32))
    else:
        counts = words_at(own, counts_offset) + (sequence & (RING - 1)) * (P * W)
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
        derive_incoming(
            counts, base, end, moves, needed, worst, scalars, told, incoming, starts, tokens, capacity, rank,
            P, L, L, 0, ALIGNMENT, AT_ONCE, False,
        )  # fmt: skip
        copy_counts(counts, gathered, moves, P, W, AT_ONCE)


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
        value = tl.load(x + wide(token) * stride + at, mask=is_value, other=0.0).to(tl.float32)
        bytes_of, scale = cast_blocks(value, POW2, EXPONENTS)
        tl.store(data + token * H + at, bytes_of, mask=is_value)
        scale = tl.where(block < H // BLOCK, scale, 0).to(scales.dtype.element_ty)
        tl.store(scales + token * SCALES + block, scale, mask=block < SCALES)


@triton.jit
def count_share(topk_idx, own_picks, nths, room, first_token, last_token, E: tl.constexpr, K: tl.constexpr):
    """Of each pick of some tokens, how many of all that come before are of its expert; and keeps the picks.

    Args:
        room: int32 ``[E]`` of the program's own, to look counts up in: in registers that takes hundreds of these.
    """
    KP: tl.constexpr = triton.next_power_of_2(K)
    PLACED: tl.constexpr = max(KP, _PLACED)
    bins = tl.arange(0, triton.next_power_of_2(E))
    for first in range(first_token, last_token, PLACED // KP):
        before = count_picks(topk_idx, first * K, E)
        i = tl.arange(0, PLACED)
        at = (first + i // KP) * K + i % KP
        is_here = (at < last_token * K) & (i % KP < K)
        tl.store(own_picks + at, tl.load(topk_idx + at, mask=is_here, other=-1), mask=is_here)
        expert = picks_at(topk_idx + at, is_here)
        is_pick = (expert >= 0) & (expert < E)
        nth = nth_of_key(expert, is_pick, E)
        tl.debug_barrier()  # the last ones have been looked up
        tl.store(room + bins, before, mask=bins < E)
        tl.debug_barrier()
        tl.store(nths + at, nth + tl.load(room + expert, mask=is_pick, other=0), mask=is_here)


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
    HAS_WEIGHTS: tl.constexpr,
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
        if HAS_WEIGHTS:
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
    nths,
    to_rows,
    to_scales,
    rooms,
    topk_idx,
    picks,
    weights,
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
    HAS_WEIGHTS: tl.constexpr,
):
    """A program's share of the rows: pieces one after another, of a few tokens. See ``dispatch_rows``."""
    program, num_programs, num_pieces = tl.program_id(0) - 1, tl.num_programs(0) - 1, num_tokens * PIECES
    first_piece, last_piece = program * num_pieces // num_programs, (program + 1) * num_pieces // num_programs
    first_token, last_token = first_piece // PIECES, (last_piece + PIECES - 1) // PIECES
    count_share(topk_idx, picks, nths, rooms + program * E, first_token, last_token, E, K)
    if BLOCK > 0:
        cast_share(
            x, rows.to(tl.pointer_type(tl.uint8), bitcast=True), scales, first_piece, last_piece, x_stride,
            ROW_BYTES, BLOCK, SCALE_PIECE, PIECES, SCALES, POW2, EXPONENTS, STAGES,
        )  # fmt: skip
    tl.debug_barrier()  # what the program has kept is there for all its warps
    values = load_piece(rows, first_piece, last_piece, stride, ROW, PIECE, PIECES)
    decided = take_verdict(verdict)
    if decided != NOTHING:
        place_share(
            segments, call, outgoing, places, homes, nths, to_rows, to_scales, picks, weights, first_token, last_token,
            (first_piece + PIECES - 1) // PIECES, decided == GO, source, data_region, data_slot_bytes,
            scale_region, scale_slot_bytes, record_region, record_slot_bytes,
            E, L, K, ROW_BYTES, SCALES, SEGMENT_ROWS, SEGMENT_BYTES, SCALE_BYTES, RECORD, HAS_WEIGHTS,
        )  # fmt: skip
        if decided == GO:
            push_share(
                to_rows, to_scales, rows, scales, values, first_piece, last_piece, stride, scale_stride,
                K, ROW, PIECE, PIECES, ROW_BYTES, SCALES, SCALE_PIECE, GROUP_BYTES, SCALES_OF_WORD,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "payload", "rank", "max_polls", "patience", "begins", "awaits", "num_tokens", "capacity", "source",
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
    nths,
    to_rows,
    to_scales,
    rooms,
    topk_idx,
    picks,
    weights,
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
    P: tl.constexpr,
    RING: tl.constexpr,
    L: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    AT_ONCE: tl.constexpr,
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
    HAS_WEIGHTS: tl.constexpr,
):
    """A fresh dispatch of rows with one pick each: ``[T, ...]`` to all their places, with sources and weights.

    In one launch, or in two: the first ``begins``, and sends if all words are here within ``patience`` polls; the
    second ``awaits``, and sends before if the first did not.

    Args:
        call: see ``calls``; its PROGRESS says what is left to do.
        gathered ... homes, capacity: see ``places``; told: the report there.
        verdict, ticket: int32, both 0.
        nths, to_rows, to_scales: int32 and twice int64 ``[T, K]``, room for what is known of rows before the verdict,
            and for the addresses of rows and scales at their receivers.
        rooms: int32 ``[programs, E]``, of nobody in particular.
        topk_idx: int64 ``[T, K]``; picks: the plan's own, filled from it.
        weights: int32 ``[T, K]``, the bits of float32.
        x: values ``[T, H]`` that are cast to rows, if BLOCK > 0: of so many with one scale.
        rows: words ``[T, ROW]``; scales: ``[T, SCALES]``, of one row, with padding.
        PIECE: words of a row that a program moves at a time; PIECES of a row, SCALE_PIECE scales of each.
        ROW_BYTES: between rows there. SEGMENT_ROWS ... SCALES_OF_WORD: where scales lie there, see ``scales``.
        STAGES: of pieces that are cast.
        RECORD: words between records.
    """
    if tl.program_id(0) == 0:
        do_books(
            segments, state, call, record, report, payload, rank, max_polls, patience, begins, awaits,
            words_offset, aborts_offset, counts_offset, gathered, scalars, told, outgoing, incoming, starts, tokens,
            capacity, verdict, topk_idx, num_tokens, P, RING, L, ALIGNMENT, AT_ONCE, K,
        )  # fmt: skip
    else:
        send_share(
            segments, call, outgoing, places, homes, verdict, nths, to_rows, to_scales, rooms, topk_idx, picks,
            weights, x, rows, scales, num_tokens, x_stride, stride, scale_stride, source, data_region, data_slot_bytes,
            scale_region, scale_slot_bytes, record_region, record_slot_bytes,
            L * P, L, K, ROW, PIECE, PIECES, ROW_BYTES, BLOCK, SCALES, SCALE_PIECE, SEGMENT_ROWS,
            SEGMENT_BYTES, SCALE_BYTES, GROUP_BYTES, SCALES_OF_WORD, POW2, EXPONENTS, STAGES, RECORD, HAS_WEIGHTS,
        )  # fmt: skip
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


@triton.jit
def sum_share(
    out,
    bias,
    weights,
    places,
    homes,
    segments,
    call,
    verdict,
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
    decided = tl.full([], 0, tl.int32)
    for token in range(share * num_tokens // num_shares, (share + 1) * num_tokens // num_shares):
        places_of = ()
        weights_of = ()
        for j in tl.static_range(J):
            place = tl.load(places + token * J + j)
            places_of = places_of + (place,)  # noqa: RUF005 - Triton's compiler knows no unpacking
            if HAS_WEIGHTS:
                weight = tl.load(weights + token * J + j, mask=place >= 0, other=0.0)
                weights_of = weights_of + (weight,)  # noqa: RUF005
        if decided == 0:  # the first ones are here when peers' words are
            decided = take_verdict(verdict)
        rows = ()
        for j in tl.static_range(J):
            place = places_of[j]
            is_row = (place >= 0) & (decided == GO)
            peer = tl.where(is_row, place >> ROW_BITS, rank)
            slot = output_slot_of(call, peer)
            there = tl.load(segments + peer) + outputs + slot * slot_bytes + (place & ROW_MASK) * ROW_BYTES
            if slot == PUSHED:
                there = own + tl.load(homes + token * J + j).to(tl.int64) * ROW_BYTES
            rows = rows + (tl.where(is_row, there, 0),)  # noqa: RUF005
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
        out, bias, weights, places, homes, segments, call, verdict, num_shares, parts, num_tokens,
        rank, outputs, slot_bytes, landing, bias_rows, J, H, PIECE, HAS_WEIGHTS, HAS_BIAS,
    )  # fmt: skip
    if is_last_program(ticket):
        tl.atomic_xchg(verdict, 0, sem="relaxed", scope="gpu")
        if is_ok(state):
            look_for_abort(segments, state, call, record, report, rank, aborts_offset, P)
