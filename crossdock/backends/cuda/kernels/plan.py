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

from crossdock.backends.cuda.kernels.calls import begin_call, is_ok
from crossdock.backends.cuda.kernels.sync import PAYLOAD_MASK

NUM_ROWS = tl.constexpr(0)
OVERFLOW = tl.constexpr(1)
NUM_PAIRS = tl.constexpr(2)
SCALARS = tl.constexpr(3)
"""Entries of a plan's int32 scalars: rows here up to the end of the last segment, whether a rank's rows do not fit
anywhere (then nobody has any), and (token, rank) pairs that come here."""

HOST_ROWS = tl.constexpr(0)
HOST_PAIRS = tl.constexpr(1)
HOST_WORST = tl.constexpr(2)
HOST_NEEDED = tl.constexpr(3)
HOST_WORDS = tl.constexpr(4)
"""Entries of the host counts, int64: how many rows (written where the host does not know) and pairs; of an
overflow the receiver (rank, or expert for fixed blocks) that needs most, and how many rows, written only then."""

ROW_BITS = tl.constexpr(32)
ROW_MASK = tl.constexpr(2**32 - 1)


@triton.jit
def picks_at(at, is_there):
    """Picks as int32, -1 where there is none; what does not fit in it becomes -2, which no pick is."""
    pick = tl.load(at, mask=is_there, other=-1)
    narrow = pick.to(tl.int32)
    return tl.where(narrow.to(tl.int64) == pick, narrow, -2)


@triton.jit
def load_picks(topk_idx, num_tokens, chunk, K: tl.constexpr, S: tl.constexpr):
    """A chunk's picks, token by token, ``[S * next_power_of_2(K)]``: expert (-1: none), token, pick."""
    KP: tl.constexpr = triton.next_power_of_2(K)
    i = tl.arange(0, S * KP)
    token, pick = chunk * S + i // KP, i % KP
    return picks_at(topk_idx + token * K + pick, (token < num_tokens) & (pick < K)), token, pick


@triton.jit
def is_first_there(key, S: tl.constexpr):
    """Of picks, token by token: whether no earlier pick of the token has the same key, -1 left out; ``[n]``."""
    KP: tl.constexpr = key.shape[0] // S
    of_token = tl.reshape(key, [S, KP])
    i = tl.arange(0, KP)
    is_earlier = (i[None, :] < i[:, None])[None, :, :]
    is_repeat = tl.max((is_earlier & (of_token[:, :, None] == of_token[:, None, :])).to(tl.int32), axis=2)
    return (key >= 0) & (tl.reshape(is_repeat, [S * KP]) == 0)


@triton.jit
def nth_of_token(key, is_row, S: tl.constexpr, IN_ORDER_OF_KEYS: tl.constexpr):
    """Of picks, token by token: how many rows of the token come before, in the order of keys or of picks; ``[n]``."""
    KP: tl.constexpr = key.shape[0] // S
    of_token, is_row = tl.reshape(key, [S, KP]), tl.reshape(is_row.to(tl.int32), [S, KP])
    if IN_ORDER_OF_KEYS:
        is_before = (of_token[:, None, :] < of_token[:, :, None]).to(tl.int32)
        return tl.reshape(tl.sum(is_before * is_row[:, None, :], axis=2), [S * KP])
    return tl.reshape(tl.cumsum(is_row, axis=1) - is_row, [S * KP])


@triton.jit
def nth_of_key(key, is_row, B: tl.constexpr):
    """Of picks, how many rows come before that have the same key, of as many as B; ``[n]``."""
    KEYS: tl.constexpr = triton.next_power_of_2(B)
    if KEYS <= 32:
        is_its = (key[:, None] == tl.arange(0, KEYS)[None, :]) & is_row[:, None]
        of_key = is_its.to(tl.int32)
        return tl.sum((tl.cumsum(of_key, axis=0) - of_key) * of_key, axis=1)
    i = tl.arange(0, key.shape[0])
    is_before = (key[None, :] == key[:, None]) & is_row[None, :] & (i[None, :] < i[:, None])
    return tl.sum(is_before.to(tl.int32), axis=1)


@triton.jit
def has_bad_picks(expert, E: tl.constexpr, S: tl.constexpr):
    """Of picks of S tokens, token by token: whether any is no expert (-1: no pick), or picked twice by its token."""
    is_bad = (expert < -1) | (expert >= E) | ((expert >= 0) & ~is_first_there(expert, S))
    return tl.max(is_bad.to(tl.int32), axis=0) != 0


@triton.jit(do_not_specialize=["num_tokens"])
def count_picks(
    topk_idx, num_tokens, sums, refused, E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, S: tl.constexpr
):
    """Counts a chunk's rows, per expert and per rank, into its row of ``sums`` int32 ``[chunks, E + P]``.

    ``refused`` becomes 1 where a pick is no expert, or one expert is picked twice by a token.
    """
    L: tl.constexpr = E // P
    expert, _, _ = load_picks(topk_idx, num_tokens, tl.program_id(0), K, S)
    is_pick = (expert >= 0) & (expert < E)
    if has_bad_picks(expert, E, S):
        tl.store(refused, 1)
    here = sums + tl.program_id(0) * (E + P)
    BINS: tl.constexpr = triton.next_power_of_2(E)
    experts = tl.arange(0, BINS)
    of_experts = tl.histogram(tl.where(is_pick, expert, 0), BINS, mask=is_pick)
    tl.store(here + experts, of_experts, mask=experts < E)
    return_row = tl.where(is_pick, expert // L, -1)
    is_row = is_first_there(return_row, S)
    RANKS: tl.constexpr = triton.next_power_of_2(P)
    ranks = tl.arange(0, RANKS)
    of_ranks = tl.histogram(tl.where(is_row, return_row, 0), RANKS, mask=is_row)
    tl.store(here + E + ranks, of_ranks, mask=ranks < P)


@triton.jit(do_not_specialize=["num_chunks"])
def sum_chunks(sums, counts, num_chunks, W: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Each chunk's counts become those of all chunks before it; the totals go to ``counts``, int64 ``[W]``."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, num_chunks, TILE):
        chunk = start + tl.arange(0, TILE)
        at = sums + chunk[:, None] * W + column[None, :]
        is_there = (chunk[:, None] < num_chunks) & (column[None, :] < W)
        tile = tl.load(at, mask=is_there, other=0)
        tl.store(at, total[None, :] + tl.cumsum(tile, axis=0) - tile, mask=is_there)
        total += tl.sum(tile, axis=0)
    tl.store(counts + column, total.to(tl.int64), mask=column < W)


@triton.jit
def load_counts(counts, source, column, is_column, P: tl.constexpr, W: tl.constexpr):
    """Columns of the counts ``[P, W]`` of some sources, int32 ``[sources, columns]``; 0 where there are none.

    Stamped or not.
    """
    at = counts + source[:, None] * W + column[None, :]
    counts = tl.load(at, mask=(source < P)[:, None] & is_column[None, :], other=0)
    return (counts & PAYLOAD_MASK).to(tl.int32)


@triton.jit
def derive_send_starts(
    counts,
    good,
    scalars,
    send_starts,
    capacity,
    rank,
    P: tl.constexpr,
    L: tl.constexpr,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    IS_PAIRS: tl.constexpr,
):
    """From everybody's counts: where this rank's blocks of rows begin. See ``derive_blocks``.

    Returns:
        Where each key's rows begin at their receiver, int32 ``[next_power_of_2(B)]``; the end of this rank's rows;
        whether rows are moved at all; of an overflow, how many rows the fullest receiver needs, and which it is.
    """
    B: tl.constexpr = N * P
    W: tl.constexpr = (L + 1) * P
    key = tl.arange(0, triton.next_power_of_2(B))
    is_key = key < B
    total = tl.zeros_like(key)
    before = tl.zeros_like(key)
    for first in range(0, P, AT_ONCE):
        source = first + tl.arange(0, AT_ONCE)
        sent = load_counts(counts + FIRST, source, key, is_key & good, P, W)
        total += tl.sum(sent, axis=0)
        before += tl.sum(tl.where((source < rank)[:, None], sent, 0), axis=0)
    own = (tl.load(counts + rank * W + FIRST + key, mask=is_key & good, other=0) & PAYLOAD_MASK).to(tl.int32)
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
    most = tl.max(tl.where(is_key, needed, 0), axis=0)
    worst = tl.min(tl.where(is_key & (needed == most), key, B), axis=0)
    worst = worst if ALIGNMENT == 0 else worst // N
    if not IS_PAIRS:
        fits = most <= capacity
        most = tl.where(fits, 0, most)
        tl.store(scalars + OVERFLOW, (fits == 0).to(tl.int32))
        good = good & fits
        base = tl.where(good, base, key % N * capacity if ALIGNMENT == 0 else 0)
        own = tl.where(good, own, 0)
    tl.store(send_starts + key, base + before, mask=is_key)
    tl.store(send_starts + B + key, tl.cumsum(own, axis=0) - own, mask=is_key)
    end = tl.max(tl.where(is_key & (key // N == rank) & good, base + size, 0), axis=0)
    return base, end, good, most, worst


@triton.jit
def derive_recv_starts(
    counts,
    base,
    end,
    good,
    needed,
    worst,
    scalars,
    host_counts,
    incoming,
    starts,
    tokens,
    capacity,
    rank,
    P: tl.constexpr,
    L: tl.constexpr,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    IS_PAIRS: tl.constexpr,
):
    """From what ``derive_send_starts`` gives: where blocks begin here, and the host counts. See ``derive_blocks``."""
    B: tl.constexpr = N * P
    W: tl.constexpr = (L + 1) * P
    key = tl.arange(0, triton.next_power_of_2(B))
    is_mine = (key < B) & (key // N == rank)
    if IS_PAIRS:
        tl.store(scalars + NUM_PAIRS, end)
        tl.store(host_counts + HOST_PAIRS, end.to(tl.int64))
    else:
        end = N * capacity if ALIGNMENT == 0 else end
        tl.store(scalars + NUM_ROWS, end)
        tl.store(starts + key - rank * N, base, mask=is_mine)
        tl.store(starts + N, end)
    tl.store(incoming + (key - rank * N) * P, base, mask=is_mine)
    tl.debug_barrier()
    local = tl.arange(0, triton.next_power_of_2(N))
    here = tl.load(incoming + local * P, mask=local < N, other=0)
    tl.debug_barrier()
    for first in range(0, P, AT_ONCE):
        source = first + tl.arange(0, AT_ONCE)
        sent = load_counts(counts + FIRST + rank * N, source, local, (local < N) & good, P, W)
        all_sent = load_counts(counts + FIRST, source, key, (key < rank * N) & good, P, W)
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
        for first in range(0, P, AT_ONCE):
            source = first + tl.arange(0, AT_ONCE)
            picks += tl.sum(load_counts(counts + rank * L, source, local, (local < L) & good, P, W), axis=0)
        tl.store(tokens + local, picks, mask=local < L)
        if ALIGNMENT > 0:
            tl.store(host_counts + HOST_ROWS, end.to(tl.int64))
        if needed > 0:  # only then, because what is stored for the host takes a kernel microseconds
            tl.store(host_counts + HOST_NEEDED, needed.to(tl.int64))
            tl.store(host_counts + HOST_WORST, worst.to(tl.int64))


@triton.jit
def forget_counts(counts, P: tl.constexpr, W: tl.constexpr):
    """Zeroes the counts of a dispatch whose rows do not move."""
    tl.debug_barrier()
    column = tl.arange(0, triton.next_power_of_2(W))
    for source in range(P):
        tl.store(counts + source * W + column, tl.zeros_like(column).to(tl.int64), mask=column < W)


@triton.jit(do_not_specialize=["capacity", "rank"])
def derive_blocks(
    counts,
    state,
    scalars,
    host_counts,
    send_starts,
    incoming,
    starts,
    tokens,
    capacity,
    rank,
    P: tl.constexpr,
    L: tl.constexpr,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    IS_PAIRS: tl.constexpr,
    KEEPS_COUNTS: tl.constexpr,
):
    """From everybody's counts: where this rank's blocks of rows begin, and where others' begin here. One program.

    Where rows do not fit on some rank, or the call is not OK, nobody has any, and counts become 0.

    Args:
        counts: int64 ``[P, W]``; keys are its columns from FIRST on.
        send_starts: int32 ``[2, B]``: where each of this rank's blocks begins at its receiver, and in its own order.
        incoming: int32 ``[3, N * P]``, block (key, source): where it begins here, its rows, where it begins there.
        starts: int32 ``[N + 1]``, first row of each segment here, and the end.
        tokens: int32 ``[L]``, picks of each local expert.
        ALIGNMENT: of segments; 0: each has ``capacity`` rows.
        AT_ONCE: ranks whose counts are looked at at a time, a power of two.
        IS_PAIRS: (token, rank) pairs are counted; capacity, starts and tokens are not looked at.
    """
    good = is_ok(state)
    if IS_PAIRS:
        good = good & (tl.load(scalars + OVERFLOW) == 0)
    base, end, good, needed, worst = derive_send_starts(
        counts, good, scalars, send_starts, capacity, rank, P, L, N, FIRST, ALIGNMENT, AT_ONCE, IS_PAIRS
    )
    derive_recv_starts(
        counts, base, end, good, needed, worst, scalars, host_counts, incoming, starts, tokens, capacity, rank,
        P, L, N, FIRST, ALIGNMENT, AT_ONCE, IS_PAIRS,
    )  # fmt: skip
    if not (IS_PAIRS or KEEPS_COUNTS):  # noqa: SIM102 - one is of the compiler, the other of the device
        if good == 0:
            forget_counts(counts, P, (L + 1) * P)


@triton.jit(do_not_specialize=["payload", "rank", "max_polls", "capacity"])
def begin_dispatch(
    segments,
    state,
    call,
    failure,
    host_failure,
    payload,
    refused,
    counts,
    gathered,
    rank,
    max_polls,
    words_offset,
    aborts_offset,
    counts_offset,
    scalars,
    host_counts,
    send_starts,
    incoming,
    starts,
    tokens,
    capacity,
    P: tl.constexpr,
    RING: tl.constexpr,
    L: tl.constexpr,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """``begin_call`` of a fresh dispatch, and ``derive_blocks`` from what it has gathered: one launch, not two."""
    begin_call(
        segments, state, call, failure, host_failure, payload, refused, counts, gathered, rank, max_polls,
        words_offset, aborts_offset, counts_offset, P, RING, (L + 1) * P, AT_ONCE,
    )  # fmt: skip
    tl.debug_barrier()  # every warp's part of the state and of the counts is there
    derive_blocks(
        gathered, state, scalars, host_counts, send_starts, incoming, starts, tokens, capacity, rank,
        P, L, N, FIRST, ALIGNMENT, AT_ONCE, False, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def find_dst_rows(
    topk_idx,
    num_tokens,
    sums,
    send_starts,
    scalars,
    state,
    dst_rows,
    return_rows,
    P: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    S: tl.constexpr,
    BY_RANK: tl.constexpr,
    IN_ORDER_OF_RANKS: tl.constexpr,
):
    """For each token of a chunk, in the order in which its rows are summed: where each row lands, and its return_row.

    Its return_row is the row's place in this rank's sending order, where it lands when it is pushed back. One row
    per pick, in a column of its own; or per rank that any pick of the token is at (``BY_RANK``), in the first
    columns, in the order of first picks or of ranks.

    Args:
        dst_rows: int64 ``[T, J]``; return_rows: int32 ``[T, J]``.
    """
    W: tl.constexpr = (L + 1) * P
    N: tl.constexpr = 1 if BY_RANK else L
    FIRST: tl.constexpr = L * P if BY_RANK else 0
    expert, token, pick = load_picks(topk_idx, num_tokens, tl.program_id(0), K, S)
    good = is_ok(state) & (tl.load(scalars + OVERFLOW) == 0)
    is_row = (expert >= 0) & (expert < L * P) & good
    key = tl.where(is_row, expert // L if BY_RANK else expert, -1)
    column = pick
    if BY_RANK:
        is_row = is_first_there(key, S)
        column = nth_of_token(key, is_row, S, IN_ORDER_OF_RANKS)
        slots = tl.program_id(0) * S * J + tl.arange(0, S * triton.next_power_of_2(J))
        is_slot = slots < tl.minimum((tl.program_id(0) + 1) * S, num_tokens) * J
        tl.store(dst_rows + slots, tl.full([slots.shape[0]], -1, tl.int64), mask=is_slot)
        tl.store(return_rows + slots, tl.full([slots.shape[0]], -1, tl.int32), mask=is_slot)
        tl.debug_barrier()
    nth = nth_of_key(key, is_row, N * P)
    nth += tl.load(sums + tl.program_id(0) * W + FIRST + key, mask=is_row, other=0)
    row = tl.load(send_starts + key, mask=is_row, other=0) + nth
    return_row = tl.load(send_starts + N * P + key, mask=is_row, other=0) + nth
    dst_row = ((key // N).to(tl.int64) << ROW_BITS) | row
    at = token * J + column
    is_written = is_row if BY_RANK else (token < num_tokens) & (pick < K)
    tl.store(dst_rows + at, tl.where(is_row, dst_row, -1), mask=is_written)
    tl.store(return_rows + at, tl.where(is_row, return_row, -1), mask=is_written)


@triton.jit
def src_rows_of(row, incoming, scalars, NUM: tl.constexpr, BLOCKS: tl.constexpr, P: tl.constexpr):
    """Where rows are from: ``rank << 32 | place in that rank's sending order``, int64; -1 where none is.

    Args:
        row: int32, those of a program, in order.
        incoming: int32 ``[3, BLOCKS]``; blocks in the order of rows.
        NUM: which of the scalars says how many rows there are.
    """
    num_rows = tl.load(scalars + NUM)
    is_row = row < num_rows
    block = tl.zeros_like(row) - 1
    if tl.min(row, axis=0) < num_rows:
        blocks = tl.arange(0, triton.next_power_of_2(BLOCKS))
        starts = tl.load(incoming + blocks, mask=blocks < BLOCKS, other=2**31 - 1)
        block += tl.sum((starts[None, :] <= row[:, None]).to(tl.int32), axis=1)
    is_row = is_row & (block >= 0)
    nth = row - tl.load(incoming + block, mask=is_row, other=0)
    is_row = is_row & (nth < tl.load(incoming + BLOCKS + block, mask=is_row, other=0))
    there = tl.load(incoming + 2 * BLOCKS + block, mask=is_row, other=0) + nth
    return tl.where(is_row, ((block % P).to(tl.int64) << ROW_BITS) | there, -1)


@triton.jit(do_not_specialize=["num_slots"])
def find_src_rows(incoming, scalars, src_rows, num_slots, NUM: tl.constexpr, BLOCKS: tl.constexpr, P: tl.constexpr,
                 ROWS: tl.constexpr):  # fmt: skip
    """``src_rows_of`` all rows of a slot."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(src_rows + row, src_rows_of(row, incoming, scalars, NUM, BLOCKS, P), mask=row < num_slots)
