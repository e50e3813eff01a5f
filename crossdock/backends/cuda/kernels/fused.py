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
    ALL,
    BEGUN,
    GO_FLAG,
    PROGRESS,
    PUSHED,
    PUSHERS,
    READY,
    REFUSED,
    SENT,
    SEQUENCE,
    SLOT_MASK,
    SLOT_SHIFT,
    TICKET,
    await_rows,
    copy_counts,
    give_word,
    is_ok,
    look_for_abort,
    output_slot_of,
    post_arrived,
    slot_of,
    some_push,
    take_words,
)
from crossdock.backends.cuda.kernels.groups import Given, value_of
from crossdock.backends.cuda.kernels.metadata import as_int64, keep_partial_rows, pointers, region_at
from crossdock.backends.cuda.kernels.picks import ROW_BITS, ROW_MASK
from crossdock.backends.cuda.kernels.plan import NUM_PAIRS, derive_recv_starts, derive_send_starts, tell_host
from crossdock.backends.cuda.kernels.shares import AWAITS, BEGINS, TELLS, TOO_MANY_SHIFT, count_picks, send_share
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
    stamped_word,
    words_at,
)
from crossdock.backends.cuda.kernels.tables import tables_of

_KEPT = tl.constexpr(2048)
"""Words of which rows are a token's that the last program of a dispatch keeps at a time."""


@triton.jit
def derive_and_go(counts, good, tables, send_starts, rank, own, GAPS: tl.constexpr):
    """From everybody's counts: where this rank's blocks begin, the go, and then what else the plan is told.

    See ``plan.derive_blocks``.

    Args:
        GAPS: whether the programs behind the go zero gaps, and so have to know where blocks begin here.
    """
    PAIRS_AT: tl.constexpr = 2 * own.sizes.P * (1 if own.sizes.BY_RANK else own.sizes.L)
    COUNTS: tl.constexpr = own.sizes.COUNTS
    capacity = value_of(own.capacity)
    base, end, good = derive_send_starts(counts, good, tables, send_starts, capacity, rank, False, own.sizes, COUNTS)
    if own.sizes.PAIRS > 0:
        pair_base, pair_end, _ = derive_send_starts(
            counts, good, tables, send_starts + PAIRS_AT, capacity, rank, True, own.sizes, COUNTS
        )
    if GAPS:
        derive_recv_starts(counts, base, end, good, tables, capacity, rank, False, own.sizes, COUNTS)
    release_programs(own.flags + GO_FLAG, tl.where(good, GO, NO_ROWS))
    if not GAPS:
        derive_recv_starts(counts, base, end, good, tables, capacity, rank, False, own.sizes, COUNTS)
    if own.sizes.PAIRS > 0:
        derive_recv_starts(counts, pair_base, pair_end, good, tables, capacity, rank, True, own.sizes, COUNTS)
    copy_counts(counts, tables.counts, good, own.sizes, COUNTS)


@triton.jit
def coordinate(
    call, payload, rank, max_polls, steps, tables, topk_idx, num_tokens, send_starts, own,
    CACHED: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    """The coordinator's part: words, counts, the go, and then what else the plan is told.

    See ``dispatch_rows``; of a plan that is known (CACHED) words and the go.
    """
    P: tl.constexpr = own.sizes.P
    COUNTS: tl.constexpr = not CACHED
    segment = tl.load(own.segments + rank)
    good = is_ok(own.state)
    sequence = tl.load(call + P + SEQUENCE)
    settles = tl.full([], 1, tl.int32)
    if (steps & BEGINS) != 0:
        mine = tl.zeros([1], tl.int64) if CACHED else count_picks(topk_idx, num_tokens, own.sizes).to(tl.int64)
        if good:
            tl.store(call + P + PROGRESS, tl.full([], BEGUN, tl.int64))
            sequence = give_word(own, call, payload, False, mine, steps >> TOO_MANY_SHIFT, rank, COUNTS)
    elif good:
        settles = (tl.load(call + P + PROGRESS) == BEGUN).to(tl.int32)
    if ((steps & AWAITS) == 0) & good:
        words = words_at(segment, own.boxes.words) + (sequence & (own.sizes.RING - 1)) * P
        settles = are_here(words, stamped_word(sequence, 0), max_polls, P).to(tl.int32)
    status = tl.full([], ABORTED, tl.int32)
    if (settles != 0) & good:
        status = take_words(own, call, sequence, payload, rank, max_polls)
    if status == OK:
        tl.store(call + P + PROGRESS, tl.full([], READY, tl.int64))
    if CACHED:
        goes = tl.where(status == OK, GO, NO_ROWS)
        release_programs(own.flags + GO_FLAG, tl.where(settles == 0, NOTHING, goes))
    else:  # noqa: PLR5501 - one is of the compiler, the other of the device
        if settles == 0:
            release_programs(own.flags + GO_FLAG, tl.full([], NOTHING, tl.int32))
        else:
            entry = (sequence & (own.sizes.RING - 1)) * (P * own.sizes.COUNTS)
            counts = words_at(segment, own.boxes.counts) + entry
            derive_and_go(counts, status == OK, tables, send_starts, rank, own, GAPS)


@triton.jit(do_not_specialize=["num_tokens", "payload", "rank", "max_polls", "steps"])
def dispatch_rows(
    topk_idx,
    weights,
    x,
    scale,
    plan,
    call,
    host_counts,
    num_tokens,
    payload: tl.int64,
    rank,
    max_polls: tl.int64,
    steps,
    own,
    arrivals,
    shares,
    how,
):
    """A dispatch of rows ``[T, ...]`` to all their places, or staged, with what travels beside them but extras.

    In one launch, or in two: the first BEGINS, and sends if all words are here within ``max_polls`` polls; the
    second AWAITS, and sends before if the first did not.

    Args:
        topk_idx: int64 ``[T, K]``, copied into the plan's own; not looked at where that is known (CACHED).
        weights: int32 ``[T, K]``, the bits of float32.
        x: values ``[T, H]`` that are cast to rows, if BLOCK > 0: of so many with one scale; else the rows, words
            ``[T, ROW]``.
        scale: ``[T, SCALES]``, of one row, with padding; of rows that are cast those of ``shares``.
        call: see ``calls``; its PROGRESS says what is left to do.
        steps: BEGINS, AWAITS, TELLS, HAS_WEIGHTS, METADATA; see also TOO_MANY_SHIFT.
        how: PIECE: words of a row that a program moves at a time; PIECES of a row, SCALE_PIECE scales of each.
            ROW_BYTES: of a row; BETWEEN rows there. STAGED: one row goes to each rank, which copies it in a kernel
            behind this one. SCALES_OF_WORD: see ``scales``. STAGES: of pieces that are cast. METADATA_WORDS: words
            between metadata. CROWDED: whether rows of several ranks pass through this GPU's cache: then they leave it
            first. gaps: what is zeroed in the slot.
    """
    await_kernels_before()
    tables = tables_of(plan, num_tokens, own.sizes)
    if tl.program_id(0) == 0:
        coordinate(
            call, payload, rank, max_polls, steps, tables, topk_idx, num_tokens, shares.send_starts, own,
            how.CACHED, how.gaps.GAPS,
        )  # fmt: skip
    else:
        rows = (shares.rows if how.BLOCK > 0 else x).to(tl.pointer_type(how.WORD), bitcast=True)
        scales = (shares.scales if how.BLOCK > 0 else scale).to(tl.pointer_type(how.SCALE_WORD), bitcast=True)
        stride = how.ROW if how.BLOCK > 0 else how.strides.rows
        scale_stride = how.SCALES if how.BLOCK > 0 else how.strides.scales
        send_share(
            own,
            call,
            rank,
            Given(num_tokens, topk_idx, weights, steps, x, how.strides.rows, rows, stride, scales,
                  scale_stride, rank * value_of(own.max_tokens), value_of(own.capacity)),
            tables,
            shares,
            arrivals,
            how.places,
            how,
        )  # fmt: skip
    let_next_kernel_launch()
    if is_last_program(own.flags + TICKET):
        tl.atomic_xchg(own.flags + GO_FLAG, 0, sem="relaxed", scope="gpu")
        is_refused = tl.load(own.flags + REFUSED) != 0
        good = is_ok(own.state)
        if good & (tl.load(call + own.sizes.P + PROGRESS) == READY):
            post_arrived(own, call, is_refused, rank)
            tl.store(call + own.sizes.P + PROGRESS, tl.full([], SENT, tl.int64))
        tl.debug_barrier()  # every warp has read it
        tl.store(own.flags + REFUSED, 0)
        if (steps & AWAITS) != 0:
            status = tl.full([], ABORTED, tl.int32)
            if good:
                status = await_rows(own, call, tables.tokens, rank, max_polls, ALL, True)
            if not how.CACHED:
                tell_host(host_counts, tables, steps & TELLS, status == OK, own.sizes)
                if own.sizes.PAIRS > 0:  # noqa: SIM102 - one is of the compiler, the other of the device
                    if not how.STAGED:  # noqa: SIM102
                        if status == OK:
                            segment, num_pairs = tl.load(own.segments + rank), tl.load(tables.scalars + NUM_PAIRS)
                            came = pointers(region_at(segment, arrivals.partial_rows, slot_of(call, rank)), tl.int32)
                            keep_partial_rows(came, tables, num_pairs, 0, 1, own.sizes, _KEPT)


@triton.jit(do_not_specialize=["payload", "rank"])
def begin_combine(call, payload: tl.int64, rank, own):
    """Gives this rank's word for a combine, and waits for nobody."""
    if is_ok(own.state):
        give_word(own, call, payload, False, tl.zeros([1], tl.int64), 0, rank, False)


@triton.jit
def weights_of_rows(weights, picks, token, dst_rows, sizes):
    """Of a token's rows, one to a rank: the sums of its weights of picks there, in pick order; a tuple of J."""
    K: tl.constexpr = sizes.K
    J: tl.constexpr = sizes.J
    sums = (0.0,) * J
    for k in tl.static_range(K):
        expert = tl.load(picks + token * K + k)
        peer = tl.where(expert >= 0, expert // sizes.L, -2)  # not -1, the peer of no row
        weight = tl.load(weights + token * K + k)
        more = ()
        for j in tl.static_range(J):
            more = more + (sums[j] + tl.where(peer == dst_rows[j] >> ROW_BITS, weight, 0.0),)  # noqa: RUF005
        sums = more
    return sums


@triton.jit
def sum_share(out, bias, weights, tables, call, num_tokens, rank, returned, bias_rows, own, returns, how):
    """A program's share of the sums: pieces one after another, the addresses of a token's rows worked out once.

    What is summed, and from where, is as in ``sums.sum_rows``; without any rows where the call is not good.
    """
    J: tl.constexpr = how.J
    H: tl.constexpr = how.H
    PIECE: tl.constexpr = how.tiles.PIECE
    HAS_WEIGHTS: tl.constexpr = how.HAS_WEIGHTS
    PIECES: tl.constexpr = (H + PIECE - 1) // PIECE
    ROW_BYTES: tl.constexpr = H * out.dtype.element_ty.primitive_bitwidth // 8
    program, num_programs, num_pieces = tl.program_id(0), tl.num_programs(0), num_tokens * PIECES
    first_piece, last_piece = program * num_pieces // num_programs, (program + 1) * num_pieces // num_programs
    mine = tl.load(own.segments + rank) + returned
    dst_rows = tables.pair_dst_rows if how.OF_PAIRS else tables.dst_rows
    return_rows = tables.pair_return_rows if how.OF_PAIRS else tables.return_rows
    decided = tl.full([], 0, tl.int32)
    for token in range(first_piece // PIECES, (last_piece + PIECES - 1) // PIECES):
        dst_rows_of = ()
        weights_of = ()
        for j in tl.static_range(J):
            dst_row = tl.load(dst_rows + token * J + j)
            dst_rows_of = dst_rows_of + (dst_row,)  # noqa: RUF005 - Triton's compiler knows no unpacking
            if HAS_WEIGHTS and not own.sizes.BY_RANK:
                weight = tl.load(weights + token * J + j, mask=dst_row >= 0, other=0.0)
                weights_of = weights_of + (weight,)  # noqa: RUF005
        if HAS_WEIGHTS and own.sizes.BY_RANK:
            weights_of = weights_of_rows(weights, tables.picks, token, dst_rows_of, own.sizes)
        if decided == 0:  # the first ones are here when peers' words are
            decided = await_go(own.flags + GO_FLAG)
        rows = ()
        for j in tl.static_range(J):
            dst_row = dst_rows_of[j]
            is_row = (dst_row >= 0) & (decided == GO)
            peer = tl.where(is_row, dst_row >> ROW_BITS, rank)
            slot = output_slot_of(call, peer)
            there = region_at(tl.load(own.segments + peer), returns.outputs, slot) + (dst_row & ROW_MASK) * ROW_BYTES
            if slot == PUSHED:
                there = mine + tl.load(return_rows + token * J + j).to(tl.int64) * ROW_BYTES
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
            if how.HAS_BIAS:
                total += tl.load(bias + as_int64(token) * bias_rows * H + at, mask=at < H, other=0.0).to(tl.float32)
            tl.store(out + as_int64(token) * H + at, total.to(out.dtype.element_ty), mask=at < H)


@triton.jit(do_not_specialize=["num_tokens", "payload", "rank", "max_polls", "steps", "bias_rows"])
def combine_rows(
    out,
    bias,
    weights,
    plan,
    call,
    num_tokens,
    payload: tl.int64,
    rank,
    max_polls: tl.int64,
    steps,
    bias_rows,
    own,
    returns,
    how,
):
    """A combine of outputs that this rank leaves where they are, or has pushed: words, and the sums of ``sum_rows``.

    Args:
        steps: BEGINS: whether this rank's word is still to be given.
    """
    await_kernels_before()
    if tl.program_id(0) == 0:
        status = tl.full([], ABORTED, tl.int32)
        if is_ok(own.state):
            sequence = tl.load(call + own.sizes.P + SEQUENCE)
            if (steps & BEGINS) != 0:
                sequence = give_word(own, call, payload, False, tl.zeros([1], tl.int64), 0, rank, False)
            status = take_words(own, call, sequence, payload, rank, max_polls)
            if status == OK:  # noqa: SIM102 - a call that is not OK has left no words
                if some_push(call, own.sizes.P):
                    status = await_rows(own, call, own.all_tokens, rank, max_polls, PUSHERS, False)
        release_programs(own.flags + GO_FLAG, tl.where(status == OK, GO, NO_ROWS))
    tables = tables_of(plan, num_tokens, own.sizes)
    returned = returns.returned.offset + ((payload >> SLOT_SHIFT) & SLOT_MASK) * returns.returned.slot_bytes
    sum_share(out, bias, weights, tables, call, num_tokens, rank, returned, bias_rows, own, returns, how)
    let_next_kernel_launch()
    if is_last_program(own.flags + TICKET):
        tl.atomic_xchg(own.flags + GO_FLAG, 0, sem="relaxed", scope="gpu")
        if is_ok(own.state):
            look_for_abort(own, call, rank)
