"""Fused calls, each one kernel: from picks to rows in place, and from words to sums. Triton only.

Program 0, the *coordinator*, does what only one can: it counts, gives this rank's word, waits for everybody's, works
out where rows go, and lets the other programs go on with a *go*; these have cast and counted their shares meanwhile,
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
    take_words,
)
from crossdock.backends.cuda.kernels.plan import (
    ROW_BITS,
    ROW_MASK,
    derive_recv_starts,
    derive_send_starts,
)
from crossdock.backends.cuda.kernels.rows import as_int64
from crossdock.backends.cuda.kernels.shares import Given, Regions, Sizes, Tables, count_picks, send_share
from crossdock.backends.cuda.kernels.sync import (
    ABORTED,
    GO,
    NO_ROWS,
    NOTHING,
    OK,
    are_here,
    await_go,
    await_kernels_before,
    is_last_program,
    let_next_kernel_launch,
    release_programs,
    stamped,
    words_at,
)


@triton.jit
def coordinate(
    segments,
    state,
    call,
    failure,
    host_failure,
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
    host_counts,
    send_starts,
    incoming,
    starts,
    tokens,
    capacity,
    go,
    topk_idx,
    num_tokens,
    P: tl.constexpr,
    RING: tl.constexpr,
    L: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    K: tl.constexpr,
):
    """The coordinator's part: words, counts, the go, and then what else the plan and the host are told.

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
        if good:
            tl.store(call + P + PROGRESS, tl.full([], BEGUN, tl.int64))
            sequence = give_word(
                segments, state, call, payload, False, mine, rank, words_offset, counts_offset,
                P, RING, W, AT_ONCE,
            )  # fmt: skip
    elif good:
        settles = (tl.load(call + P + PROGRESS) == BEGUN).to(tl.int32)
    if (awaits == 0) & good:
        words = words_at(own, words_offset) + (sequence & (RING - 1)) * P
        settles = are_here(words, stamped(sequence, 0), patience, P).to(tl.int32)
    if settles == 0:
        release_programs(go, tl.full([], NOTHING, tl.int32))
    else:
        counts = words_at(own, counts_offset) + (sequence & (RING - 1)) * (P * W)
        status = tl.full([], ABORTED, tl.int32)
        if good:
            status = take_words(
                segments, state, call, failure, host_failure, sequence, payload, rank, max_polls,
                words_offset, aborts_offset, P, RING,
            )  # fmt: skip
        base, end, moves, needed, worst = derive_send_starts(
            counts, status == OK, scalars, send_starts, capacity, rank, P, L, L, 0, ALIGNMENT, AT_ONCE, False
        )
        if status == OK:
            tl.store(call + P + PROGRESS, tl.full([], READY, tl.int64))
        release_programs(go, tl.where(moves, GO, NO_ROWS))
        derive_recv_starts(
            counts, base, end, moves, needed, worst, scalars, host_counts, incoming, starts, tokens, capacity, rank,
            P, L, L, 0, ALIGNMENT, AT_ONCE, False,
        )  # fmt: skip
        copy_counts(counts, gathered, moves, P, W, AT_ONCE)


@triton.jit(
    do_not_specialize=[
        "payload", "rank", "max_polls", "patience", "begins", "awaits", "has_weights", "num_tokens", "capacity",
        "source",
    ]
)  # fmt: skip
def dispatch_rows(
    segments,
    state,
    failure,
    host_failure,
    rank,
    patience,
    begins,
    awaits,
    words_offset,
    arrived_offset,
    aborts_offset,
    counts_offset,
    send_starts,
    all_tokens,
    capacity,
    go,
    ticket,
    refused,
    nths,
    to_rows,
    to_scales,
    scratch_counts,
    has_weights,
    num_tokens,
    x_stride,
    stride,
    scale_stride,
    source,
    data_region,
    data_slot_bytes,
    scale_region,
    scale_slot_bytes,
    metadata_region,
    metadata_slot_bytes,
    call,
    payload,
    max_polls,
    host_counts,
    picks,
    gathered,
    scalars,
    tokens,
    starts,
    dst_rows,
    return_rows,
    incoming,
    topk_idx,
    weights,
    x,
    rows,
    scales,
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
    METADATA_WORDS: tl.constexpr,
    CROWDED: tl.constexpr,
):
    """A fresh dispatch of rows with one pick each: ``[T, ...]`` to all their places, with sources and weights.

    In one launch, or in two: the first ``begins``, and sends if all words are here within ``patience`` polls; the
    second ``awaits``, and sends before if the first did not.

    Args:
        call: see ``calls``; its PROGRESS says what is left to do.
        gathered ... return_rows, send_starts, capacity: see ``find_dst_rows``; host_counts: see ``plan``.
        go, ticket, refused: int32, all 0.
        nths, to_rows, to_scales: int32 and twice int64 ``[T, K]``, room for what is known of rows before the go,
            and for the addresses of rows and scales at their receivers.
        scratch_counts: int32 ``[programs, E]``, of nobody in particular.
        topk_idx: int64 ``[T, K]``; picks: the plan's own, filled from it.
        weights: int32 ``[T, K]``, the bits of float32.
        x: values ``[T, H]`` that are cast to rows, if BLOCK > 0: of so many with one scale.
        rows: words ``[T, ROW]``; scales: ``[T, SCALES]``, of one row, with padding.
        PIECE: words of a row that a program moves at a time; PIECES of a row, SCALE_PIECE scales of each.
        ROW_BYTES: between rows there. SEGMENT_ROWS ... SCALES_OF_WORD: where scales lie there, see ``scales``.
        STAGES: of pieces that are cast.
        METADATA_WORDS: words between records.
        CROWDED: whether rows of several ranks pass through this GPU's cache: then they leave it first.
    """
    await_kernels_before()
    if tl.program_id(0) == 0:
        coordinate(
            segments, state, call, failure, host_failure, payload, rank, max_polls, patience, begins, awaits,
            words_offset, aborts_offset, counts_offset, gathered, scalars, host_counts, send_starts, incoming,
            starts, tokens, capacity, go, topk_idx, num_tokens, P, RING, L, ALIGNMENT, AT_ONCE, K,
        )  # fmt: skip
    else:
        send_share(
            segments,
            call,
            go,
            refused,
            begins,
            Given(num_tokens, topk_idx, weights, has_weights, x, x_stride, rows, stride, scales, scale_stride, source),
            Tables(send_starts, dst_rows, return_rows, picks, nths, to_rows, to_scales, scratch_counts),
            Regions(data_region, data_slot_bytes, scale_region, scale_slot_bytes, metadata_region, metadata_slot_bytes),
            Sizes(  # a name would make tensors of them
                L * P, L, K, ROW, PIECE, PIECES, ROW_BYTES, BLOCK, SCALES, SCALE_PIECE, SEGMENT_ROWS, SEGMENT_BYTES,
                SCALE_BYTES, GROUP_BYTES, SCALES_OF_WORD, POW2, EXPONENTS, STAGES, METADATA_WORDS, CROWDED,
            ),
        )  # fmt: skip
    let_next_kernel_launch()
    if is_last_program(ticket):
        tl.atomic_xchg(go, 0, sem="relaxed", scope="gpu")
        is_refused = tl.load(refused) != 0
        good = is_ok(state)
        if good & (tl.load(call + P + PROGRESS) == READY):
            post_arrived(segments, call, is_refused, rank, arrived_offset, P, RING)
            tl.store(call + P + PROGRESS, tl.full([], SENT, tl.int64))
        tl.debug_barrier()  # every warp has read it
        tl.store(refused, 0)
        if good & (awaits != 0):
            await_rows(
                segments, state, call, failure, host_failure, rank, max_polls, arrived_offset, aborts_offset, tokens,
                all_tokens, P, RING, True, L,
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
    dst_rows,
    return_rows,
    segments,
    call,
    go,
    num_tokens,
    rank,
    outputs,
    slot_bytes,
    returned,
    bias_rows,
    J: tl.constexpr,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """A program's share of the sums: pieces one after another, the addresses of a token's rows worked out once.

    What is summed, and from where, is as in ``sums.sum_rows``; without any rows where the call is not good.
    """
    PIECES: tl.constexpr = (H + PIECE - 1) // PIECE
    ROW_BYTES: tl.constexpr = H * out.dtype.element_ty.primitive_bitwidth // 8
    program, num_programs, num_pieces = tl.program_id(0), tl.num_programs(0), num_tokens * PIECES
    first_piece, last_piece = program * num_pieces // num_programs, (program + 1) * num_pieces // num_programs
    own = tl.load(segments + rank) + returned
    decided = tl.full([], 0, tl.int32)
    for token in range(first_piece // PIECES, (last_piece + PIECES - 1) // PIECES):
        dst_rows_of = ()
        weights_of = ()
        for j in tl.static_range(J):
            dst_row = tl.load(dst_rows + token * J + j)
            dst_rows_of = dst_rows_of + (dst_row,)  # noqa: RUF005 - Triton's compiler knows no unpacking
            if HAS_WEIGHTS:
                weight = tl.load(weights + token * J + j, mask=dst_row >= 0, other=0.0)
                weights_of = weights_of + (weight,)  # noqa: RUF005
        if decided == 0:  # the first ones are here when peers' words are
            decided = await_go(go)
        rows = ()
        for j in tl.static_range(J):
            dst_row = dst_rows_of[j]
            is_row = (dst_row >= 0) & (decided == GO)
            peer = tl.where(is_row, dst_row >> ROW_BITS, rank)
            slot = output_slot_of(call, peer)
            there = tl.load(segments + peer) + outputs + slot * slot_bytes + (dst_row & ROW_MASK) * ROW_BYTES
            if slot == PUSHED:
                there = own + tl.load(return_rows + token * J + j).to(tl.int64) * ROW_BYTES
            rows = rows + (tl.where(is_row, there, 0),)  # noqa: RUF005
        first = token * PIECES
        for piece in range(tl.maximum(first_piece - first, 0), tl.minimum(last_piece - first, PIECES)):
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
                total += tl.load(bias + as_int64(token) * bias_rows * H + at, mask=at < H, other=0.0).to(tl.float32)
            tl.store(out + as_int64(token) * H + at, total.to(out.dtype.element_ty), mask=at < H)


@triton.jit(do_not_specialize=["payload", "rank", "max_polls", "begins", "num_tokens", "returned", "bias_rows"])
def combine_rows(
    segments,
    state,
    failure,
    host_failure,
    rank,
    begins,
    words_offset,
    arrived_offset,
    aborts_offset,
    go,
    ticket,
    num_tokens,
    outputs,
    slot_bytes,
    bias_rows,
    call,
    payload,
    max_polls,
    out,
    bias,
    weights,
    dst_rows,
    return_rows,
    returned,
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
        go, ticket: int32, both 0.
    """
    await_kernels_before()
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
                segments, state, call, failure, host_failure, sequence, payload, rank, max_polls,
                words_offset, aborts_offset, P, RING,
            )  # fmt: skip
            if status == OK:
                lanes = tl.arange(0, triton.next_power_of_2(P))
                theirs = tl.load(call + lanes, mask=lanes < P, other=0)
                if tl.max((((theirs >> OUTPUT_SHIFT) & SLOT_MASK) == PUSHED).to(tl.int32), axis=0) != 0:
                    status = await_rows(
                        segments, state, call, failure, host_failure, rank, max_polls, arrived_offset, aborts_offset,
                        failure, failure, P, RING, False, 0,
                    )  # fmt: skip
        release_programs(go, tl.where(status == OK, GO, NO_ROWS))
    sum_share(
        out, bias, weights, dst_rows, return_rows, segments, call, go, num_tokens, rank, outputs, slot_bytes, returned,
        bias_rows, J, H, PIECE, HAS_WEIGHTS, HAS_BIAS,
    )  # fmt: skip
    let_next_kernel_launch()
    if is_last_program(ticket):
        tl.atomic_xchg(go, 0, sem="relaxed", scope="gpu")
        if is_ok(state):
            look_for_abort(segments, state, call, failure, host_failure, rank, aborts_offset, P)
