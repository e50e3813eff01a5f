"""Where rows go, worked out on the device: counts of picks, prefix sums, dst_rows. Triton only.

The same numbers as ``crossdock.plan`` has on the host. A *key* is what rows are sorted by where they land: the expert
of a row that serves one pick, the rank of a row that serves all of a token's picks there. A dst_row is
``rank << 32 | row`` in an int64, -1 where there is none.

Letters: T tokens here, K top-k, J rows of a token, E experts, L local experts, P ranks, N keys of a rank,
B = N * P keys, W = E + P counts, S tokens of a chunk.
"""

# Tuples that grow by a value at each turn of an unrolled loop have no type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import REFUSED, TICKET, copy_counts, give_word, is_ok, take_words
from crossdock.backends.cuda.kernels.groups import value_of
from crossdock.backends.cuda.kernels.metadata import TELLS, push_metadata, push_partial_rows, zero_gaps
from crossdock.backends.cuda.kernels.picks import (
    ROW_BITS,
    columns_of,
    has_bad_picks,
    is_first_there,
    load_picks,
    nth_of_key,
    rows_of,
)
from crossdock.backends.cuda.kernels.sync import OK, PAYLOAD_MASK, is_last_program, release_to_host, words_at
from crossdock.backends.cuda.kernels.tables import tables_of

_RANK_BITS = tl.constexpr(16)
_RANK_MASK = tl.constexpr(2**16 - 1)
NUM_ROWS = tl.constexpr(0)
OVERFLOW = tl.constexpr(1)
NUM_PAIRS = tl.constexpr(2)
WORST = tl.constexpr(3)
NEEDED = tl.constexpr(4)
SCALARS = tl.constexpr(5)
"""Entries of a plan's int32 scalars: rows here up to the end of the last segment, whether a rank's rows do not fit
anywhere (then nobody has any), and (token, rank) pairs that come here; of an overflow the receiver (rank, or expert for
fixed blocks) that needs most, and how many rows (0: they fit). A rank that brings too many tokens is an overflow too:
of -1 - rank, and of so many tokens."""

HOST_ROWS = tl.constexpr(0)
HOST_PAIRS = tl.constexpr(1)
HOST_WORST = tl.constexpr(2)
HOST_NEEDED = tl.constexpr(3)
HOST_STAMP = tl.constexpr(4)
HOST_WORDS = tl.constexpr(6)
"""Entries of the host counts, int64, in whole multiples of 16 bytes: those scalars, and a stamp that comes last,
1; behind HOST_WORDS the picks of each local expert. All is written where the host waits for it, but for the two of an
overflow, which are written where rows do not fit."""


@triton.jit
def count_chunk(topk_idx, num_tokens, tables, sums, flags, sizes, S: tl.constexpr):
    """Counts a chunk's rows, per expert and per rank, into its row of ``sums`` int32 ``[chunks, E + P]``.

    Copies the picks into the plan's own. REFUSED becomes 1 where a pick is no expert, or one expert is picked twice by
    a token.
    """
    P: tl.constexpr = sizes.P
    L: tl.constexpr = sizes.L
    K: tl.constexpr = sizes.K
    E: tl.constexpr = L * P
    expert, token, pick = load_picks(topk_idx, num_tokens, tl.program_id(0) * S, K, S)
    is_here = (token < num_tokens) & (pick < K)
    at = token * K + pick
    tl.store(tables.picks + at, tl.load(topk_idx + at, mask=is_here, other=-1), mask=is_here)
    is_pick = (expert >= 0) & (expert < E)
    if has_bad_picks(expert, E, S):
        tl.store(flags + REFUSED, 1)
    here = sums + tl.program_id(0) * (E + P)
    BINS: tl.constexpr = triton.next_power_of_2(E)
    experts = tl.arange(0, BINS)
    of_experts = tl.histogram(tl.where(is_pick, expert, 0), BINS, mask=is_pick)
    tl.store(here + experts, of_experts, mask=experts < E)
    peer = tl.where(is_pick, expert // L, -1)
    is_row = is_first_there(peer, S)
    RANKS: tl.constexpr = triton.next_power_of_2(P)
    ranks = tl.arange(0, RANKS)
    of_ranks = tl.histogram(tl.where(is_row, peer, 0), RANKS, mask=is_row)
    tl.store(here + E + ranks, of_ranks, mask=ranks < P)


@triton.jit
def sum_chunks(sums, num_chunks, W: tl.constexpr, TILE: tl.constexpr):
    """Each chunk's counts become those of all chunks before it; gives the totals, int32 ``[next_power_of_2(W)]``."""
    column = tl.arange(0, triton.next_power_of_2(W))
    total = tl.zeros_like(column)
    for start in range(0, num_chunks, TILE):
        chunk = start + tl.arange(0, TILE)
        at = sums + chunk[:, None] * W + column[None, :]
        is_there = (chunk[:, None] < num_chunks) & (column[None, :] < W)
        tile = tl.load(at, mask=is_there, other=0)
        tl.store(at, total[None, :] + tl.cumsum(tile, axis=0) - tile, mask=is_there)
        total += tl.sum(tile, axis=0)
    return total


@triton.jit
def load_counts(counts, source, column, is_column, P: tl.constexpr, COUNTS: tl.constexpr):
    """Columns of the counts ``[P, COUNTS]`` of some sources, int32 ``[sources, columns]``; 0 where there are none.

    Stamped or not.
    """
    at = counts + source[:, None] * COUNTS + column[None, :]
    counts = tl.load(at, mask=(source < P)[:, None] & is_column[None, :], other=0)
    return (counts & PAYLOAD_MASK).to(tl.int32)


@triton.jit
def most_brought(told, good, sizes, COUNTS: tl.constexpr):
    """Of the ranks with more tokens than the call may have, the one that brings most: ``tokens << 16 | 65535 - rank``.

    Args:
        told: behind each rank's counts, its tokens, or 0.
    """
    most = tl.full([], 0, tl.int64)
    for first in range(0, sizes.P, sizes.AT_ONCE):
        source = first + tl.arange(0, sizes.AT_ONCE)
        tokens = tl.load(told + source * COUNTS, mask=(source < sizes.P) & good, other=0) & PAYLOAD_MASK
        most = tl.maximum(most, tl.max((tokens << _RANK_BITS) | (source ^ _RANK_MASK), axis=0))
    return most


@triton.jit
def derive_send_starts(
    counts, good, tables, send_starts, capacity, rank, IS_PAIRS: tl.constexpr, sizes, COUNTS: tl.constexpr
):
    """From everybody's counts: where this rank's blocks of rows begin. See ``derive_blocks``.

    Returns:
        Where each key's rows begin at their receiver, int32 ``[next_power_of_2(B)]``; the end of this rank's rows;
        whether rows are moved at all.
    """
    P: tl.constexpr = sizes.P
    L: tl.constexpr = sizes.L
    N: tl.constexpr = 1 if IS_PAIRS else (1 if sizes.BY_RANK else L)
    FIRST: tl.constexpr = L * P if IS_PAIRS or sizes.BY_RANK else 0
    ALIGNMENT: tl.constexpr = 1 if IS_PAIRS else sizes.ALIGNMENT
    B: tl.constexpr = N * P
    key = tl.arange(0, triton.next_power_of_2(B))
    is_key = key < B
    total = tl.zeros_like(key)
    before = tl.zeros_like(key)
    for first in range(0, P, sizes.AT_ONCE):
        source = first + tl.arange(0, sizes.AT_ONCE)
        sent = load_counts(counts + FIRST, source, key, is_key & good, P, COUNTS)
        total += tl.sum(sent, axis=0)
        before += tl.sum(tl.where((source < rank)[:, None], sent, 0), axis=0)
    mine = (tl.load(counts + rank * COUNTS + FIRST + key, mask=is_key & good, other=0) & PAYLOAD_MASK).to(tl.int32)
    if ALIGNMENT == 0:
        base = key % N * capacity
        size = total
        needed = total
    else:
        size = (total + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        ends = tl.cumsum(size, axis=0)
        tl.store(send_starts + key, ends - size, mask=is_key)
        tl.debug_barrier()
        of_rank = tl.load(send_starts + key // N * N, mask=is_key, other=0)
        tl.debug_barrier()
        base = ends - size - of_rank
        needed = tl.where(key % N == N - 1, base + size, 0)
    if not IS_PAIRS:
        most = tl.max(tl.where(is_key, needed, 0), axis=0)
        worst = tl.min(tl.where(is_key & (needed == most), key, B), axis=0)
        worst = worst if ALIGNMENT == 0 else worst // N
        fits = most <= capacity
        if COUNTS > (L + 1) * P:
            brought = most_brought(counts + (L + 1) * P, good, sizes, COUNTS)
            tokens, rank_of = (brought >> _RANK_BITS).to(tl.int32), ((brought & _RANK_MASK) ^ _RANK_MASK).to(tl.int32)
            fits = fits & (tokens == 0)
            most = tl.where(tokens > 0, tokens, most)
            worst = tl.where(tokens > 0, -rank_of - 1, worst)
        tl.store(tables.scalars + OVERFLOW, (fits == 0).to(tl.int32))
        tl.store(tables.scalars + NEEDED, tl.where(fits, 0, most))
        tl.store(tables.scalars + WORST, worst)
        good = good & fits
        base = tl.where(good, base, key % N * capacity if ALIGNMENT == 0 else 0)
        mine = tl.where(good, mine, 0)
    tl.store(send_starts + key, base + before, mask=is_key)
    tl.store(send_starts + B + key, tl.cumsum(mine, axis=0) - mine, mask=is_key)
    end = tl.max(tl.where(is_key & (key // N == rank) & good, base + size, 0), axis=0)
    return base, end, good


@triton.jit
def derive_recv_starts(
    counts, base, end, good, tables, capacity, rank, IS_PAIRS: tl.constexpr, sizes, COUNTS: tl.constexpr
):
    """From what ``derive_send_starts`` gives: where blocks begin here. See ``derive_blocks``."""
    P: tl.constexpr = sizes.P
    L: tl.constexpr = sizes.L
    N: tl.constexpr = 1 if IS_PAIRS else (1 if sizes.BY_RANK else L)
    FIRST: tl.constexpr = L * P if IS_PAIRS or sizes.BY_RANK else 0
    B: tl.constexpr = N * P
    key = tl.arange(0, triton.next_power_of_2(B))
    is_mine = (key < B) & (key // N == rank)
    incoming = tables.pair_incoming if IS_PAIRS else tables.incoming
    if IS_PAIRS:
        tl.store(tables.scalars + NUM_PAIRS, end)
    else:
        end = N * capacity if sizes.ALIGNMENT == 0 else end
        tl.store(tables.scalars + NUM_ROWS, end)
        tl.store(tables.starts + key - rank * N, base, mask=is_mine)
        tl.store(tables.starts + N, end)
    tl.store(incoming + (key - rank * N) * P, base, mask=is_mine)
    tl.debug_barrier()
    local = tl.arange(0, triton.next_power_of_2(N))
    here = tl.load(incoming + local * P, mask=local < N, other=0)
    tl.debug_barrier()
    for first in range(0, P, sizes.AT_ONCE):
        source = first + tl.arange(0, sizes.AT_ONCE)
        sent = load_counts(counts + FIRST + rank * N, source, local, (local < N) & good, P, COUNTS)
        all_sent = load_counts(counts + FIRST, source, key, (key < rank * N) & good, P, COUNTS)
        at = incoming + local[None, :] * P + source[:, None]
        is_block = (source < P)[:, None] & (local < N)[None, :]
        tl.store(at, here[None, :] + tl.cumsum(sent, axis=0) - sent, mask=is_block)
        tl.store(at + N * P, sent, mask=is_block)
        there = tl.sum(all_sent, axis=1)[:, None] + tl.cumsum(sent, axis=1) - sent
        tl.store(at + 2 * N * P, there, mask=is_block)
        here += tl.sum(sent, axis=0)
    if not IS_PAIRS:
        local = tl.arange(0, triton.next_power_of_2(L))
        picks = tl.zeros_like(local)
        for first in range(0, P, sizes.AT_ONCE):
            source = first + tl.arange(0, sizes.AT_ONCE)
            picks += tl.sum(load_counts(counts + rank * L, source, local, (local < L) & good, P, COUNTS), axis=0)
        tl.store(tables.tokens + local, picks, mask=local < L)


@triton.jit
def derive_blocks(counts, good, tables, send_starts, capacity, rank, sizes, COUNTS: tl.constexpr):
    """From everybody's counts: where this rank's blocks of rows and of pairs begin, and where others' begin here.

    Where rows do not fit on some rank, or the call is not good, nobody has any. Gives whether they move.

    Args:
        counts: int64 ``[P, COUNTS]``, stamped or not; keys are its columns from those of experts or of ranks on.
        send_starts: see ``Scratch``.
    """
    PAIRS_AT: tl.constexpr = 2 * sizes.P * (1 if sizes.BY_RANK else sizes.L)
    base, end, good = derive_send_starts(counts, good, tables, send_starts, capacity, rank, False, sizes, COUNTS)
    derive_recv_starts(counts, base, end, good, tables, capacity, rank, False, sizes, COUNTS)
    if sizes.PAIRS > 0:
        base, end, _ = derive_send_starts(
            counts, good, tables, send_starts + PAIRS_AT, capacity, rank, True, sizes, COUNTS
        )
        derive_recv_starts(counts, base, end, good, tables, capacity, rank, True, sizes, COUNTS)
    return good


@triton.jit(do_not_specialize=["num_tokens", "too_many", "payload", "rank", "max_polls"])
def begin_dispatch(
    topk_idx,
    plan,
    call,
    num_tokens,
    too_many,
    payload: tl.int64,
    rank,
    max_polls: tl.int64,
    own,
    scratch,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """The begin of a fresh dispatch: counts picks, gives this rank's word, and derives where blocks begin.

    A program for each chunk of S tokens, at least one. The last one sums what all have counted, gives the counts and
    the word, waits for everybody's, and leaves counts and blocks in the plan.

    Args:
        topk_idx: int64 ``[T, K]``.
        too_many: this rank's tokens where they are more than the call may have, and none is counted; else 0.
        TILE: chunks that are summed at a time, a power of two.
    """
    W: tl.constexpr = (own.sizes.L + 1) * own.sizes.P
    tables = tables_of(plan, num_tokens, own.sizes)
    count_chunk(topk_idx, num_tokens, tables, scratch.sums, own.flags, own.sizes, S)
    if is_last_program(own.flags + TICKET):
        total = sum_chunks(scratch.sums, (num_tokens + S - 1) // S, W, TILE)
        is_refused = tl.load(own.flags + REFUSED) != 0
        good = is_ok(own.state)
        segment = tl.load(own.segments + rank)
        counts = words_at(segment, own.boxes.counts)
        tl.debug_barrier()  # every warp has read whether it is OK
        tl.store(own.flags + REFUSED, 0)
        if good:
            sequence = give_word(own, call, payload, is_refused, total.to(tl.int64), too_many, rank, True)
            status = take_words(own, call, sequence, payload, rank, max_polls)
            counts += (sequence & (own.sizes.RING - 1)) * (own.sizes.P * own.sizes.COUNTS)
            good = status == OK
        capacity = value_of(own.capacity)
        good = derive_blocks(counts, good, tables, scratch.send_starts, capacity, rank, own.sizes, own.sizes.COUNTS)
        copy_counts(counts, tables.counts, good, own.sizes, own.sizes.COUNTS)


@triton.jit(do_not_specialize=["num_tokens", "rank"])
def remake_plan(topk_idx, given, plan, num_tokens, rank, own, scratch, S: tl.constexpr, TILE: tl.constexpr):
    """What ``begin_dispatch`` leaves in a plan, from counts that are known: ``given``, int64 ``[P, W]``."""
    W: tl.constexpr = (own.sizes.L + 1) * own.sizes.P
    tables = tables_of(plan, num_tokens, own.sizes)
    count_chunk(topk_idx, num_tokens, tables, scratch.sums, own.flags, own.sizes, S)
    if is_last_program(own.flags + TICKET):
        sum_chunks(scratch.sums, (num_tokens + S - 1) // S, W, TILE)
        tl.store(own.flags + REFUSED, 0)
        capacity = value_of(own.capacity)
        derive_blocks(given, is_ok(own.state), tables, scratch.send_starts, capacity, rank, own.sizes, W)
        copy_counts(given, tables.counts, True, own.sizes, W)


@triton.jit
def before_there(topk_idx, num_tokens, key, first, num_before, sizes, IS_PAIRS: tl.constexpr, S: tl.constexpr):
    """Of a chunk's picks before its ``first`` sub-chunk: how many rows have the key of each of those here; ``[n]``.

    By comparing, sub-chunk by sub-chunk: there are few of them.
    """
    BY_RANK: tl.constexpr = True if IS_PAIRS else sizes.BY_RANK
    num = tl.zeros_like(key)
    for sub in range(first, first + num_before):
        expert, _, _ = load_picks(topk_idx, num_tokens, sub * S, sizes.K, S)
        other, is_row = rows_of(expert, sizes, BY_RANK, S)
        num += tl.sum(((other[None, :] == key[:, None]) & is_row[None, :]).to(tl.int32), axis=1)
    return num


@triton.jit
def place_chunk(num_tokens, sub, tables, good, scratch, sizes, IS_PAIRS: tl.constexpr, S: tl.constexpr,
                SUBS: tl.constexpr):  # fmt: skip
    """For each token, in the order in which its rows are summed: where each row lands, and its return_row.

    Its return_row is the row's place in this rank's sending order, where it lands when it is pushed back. One row
    per pick, in a column of its own; or per rank that any pick of the token is at (pairs, BY_RANK), in the first
    columns, in the order of first picks or of ranks.

    Args:
        sub: of S tokens; SUBS of them are a chunk of which counts are known.
    """
    P: tl.constexpr = sizes.P
    L: tl.constexpr = sizes.L
    W: tl.constexpr = (L + 1) * P
    BY_RANK: tl.constexpr = True if IS_PAIRS else sizes.BY_RANK
    RANK_ORDER: tl.constexpr = True if IS_PAIRS else sizes.RANK_ORDER
    N: tl.constexpr = 1 if BY_RANK else L
    FIRST: tl.constexpr = L * P if BY_RANK else 0
    J: tl.constexpr = sizes.PAIRS if IS_PAIRS else sizes.J
    STARTS_AT: tl.constexpr = 2 * P * (1 if sizes.BY_RANK else L) if IS_PAIRS else 0
    dst_rows = tables.pair_dst_rows if IS_PAIRS else tables.dst_rows
    return_rows = tables.pair_return_rows if IS_PAIRS else tables.return_rows
    send_starts = scratch.send_starts + STARTS_AT
    expert, token, pick = load_picks(tables.picks, num_tokens, sub * S, sizes.K, S)
    key, is_row = rows_of(tl.where(good, expert, -1), sizes, BY_RANK, S)
    column = columns_of(key, is_row, S, RANK_ORDER) if BY_RANK else pick
    chunk = sub // SUBS
    nth = nth_of_key(key, is_row, N * P)
    nth += before_there(tables.picks, num_tokens, key, chunk * SUBS, sub - chunk * SUBS, sizes, IS_PAIRS, S)
    nth += tl.load(scratch.sums + chunk * W + FIRST + key, mask=is_row, other=0)
    row = tl.load(send_starts + key, mask=is_row, other=0) + nth
    return_row = tl.load(send_starts + N * P + key, mask=is_row, other=0) + nth
    dst_row = ((key // N).to(tl.int64) << ROW_BITS) | row
    at = token * J + column
    is_written = (token < num_tokens) & (column < J)
    tl.store(dst_rows + at, tl.where(is_row, dst_row, -1), mask=is_written)
    tl.store(return_rows + at, tl.where(is_row, return_row, -1), mask=is_written)


@triton.jit
def tell_host(host_counts, tables, tells, stands, sizes):
    """What the host is told of a dispatch: how many rows come, if it waits for that; an overflow in any case.

    Only then, because what is stored for the host takes a kernel microseconds.

    Args:
        stands: whether the call has not failed so far. Of one that has, an overflow is nobody's matter: it may come of
            picks that were refused.
    """
    scalars = tables.scalars
    needed = tl.load(scalars + NEEDED)
    if (needed > 0) & stands:
        tl.store(host_counts + HOST_NEEDED, needed.to(tl.int64))
        tl.store(host_counts + HOST_WORST, tl.load(scalars + WORST).to(tl.int64))
    if tells != 0:
        tl.store(host_counts + HOST_ROWS, tl.load(scalars + NUM_ROWS).to(tl.int64))
        tl.store(host_counts + HOST_PAIRS, tl.load(scalars + NUM_PAIRS).to(tl.int64))
        local = tl.arange(0, triton.next_power_of_2(sizes.L))
        tokens = tl.load(tables.tokens + local, mask=local < sizes.L)
        tl.store(host_counts + HOST_WORDS + local, tokens.to(tl.int64), mask=local < sizes.L)
        release_to_host(host_counts + HOST_STAMP, tl.full([], 1, tl.int64))


@triton.jit(do_not_specialize=["num_tokens", "rank", "carries"])
def place_rows(
    plan,
    call,
    host_counts,
    num_tokens,
    rank,
    carries,
    weights,
    extras,
    own,
    arrivals,
    scratch,
    beside,
    S: tl.constexpr,
    SUBS: tl.constexpr,
):
    """Where each of this rank's rows goes, and what travels beside it; see ``place_chunk`` and ``metadata``.

    A program for each S tokens, at least one; behind ``begin_dispatch``. The first one tells the host.

    Args:
        carries: TELLS, WEIGHTS, EXTRAS.
    """
    tables = tables_of(plan, num_tokens, own.sizes)
    if tl.program_id(0) == 0:
        tell_host(host_counts, tables, carries & TELLS, True, own.sizes)
    good = is_ok(own.state) & (tl.load(tables.scalars + OVERFLOW) == 0)
    sub = tl.program_id(0)
    if sub * S < num_tokens:
        place_chunk(num_tokens, sub, tables, good, scratch, own.sizes, False, S, SUBS)
        if own.sizes.PAIRS > 0:
            place_chunk(num_tokens, sub, tables, good, scratch, own.sizes, True, S, SUBS)
    tl.debug_barrier()  # every warp sees where the rows go
    if beside.TOKENS > 0:  # noqa: SIM102 - one is of the compiler, the other of the device
        if is_ok(own.state):
            end = tl.minimum((sub + 1) * S, num_tokens)
            push_metadata(
                call, tables, sub * S, end, S, carries, weights, extras, rank * value_of(own.max_tokens), own.segments,
                arrivals, own.sizes, beside.WORDS, beside.EXTRA, S,
            )  # fmt: skip
            if own.sizes.PAIRS > 0:
                push_partial_rows(call, tables, sub * S, num_tokens, own.segments, arrivals, own.sizes, S)
            zero_gaps(call, tables, rank, sub, tl.num_programs(0), own.segments, arrivals, own.sizes, beside)
