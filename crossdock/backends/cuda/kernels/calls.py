"""The two ends of every call: words to all and from all, on the device. One program each; Triton only.

What a buffer's kernels share is an int64 ``state``: the number of the next call and of the one begun last, the epochs
that have ended, whether all is OK, and how many ranks are masked. A call that is not OK ends the epoch: no kernel of
this rank touches peer memory any more, none waits, until the host has begun the next epoch. What belongs to one call is
an int64 ``call``.

Where a rank is masked, ``segments`` has this rank's own segment in its place, and this rank stands in for it: it
gives itself the words that the masked rank would give. So nothing that waits, here or on another rank, knows of it.

Letters: P ranks, W counts of a rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock import consent
from crossdock.backends.cuda.kernels.sync import (
    ABORTED,
    CALL_MASK,
    FAILURE_WORDS,
    MISMATCHED,
    OK,
    PAYLOAD_BITS,
    PAYLOAD_MASK,
    find_abort,
    next_call,
    post_words,
    stamped,
    wait_words,
    words_at,
    write_failure,
)

NEXT = tl.constexpr(0)
CURRENT = tl.constexpr(1)
NUM_ENDED = tl.constexpr(2)
STATUS = tl.constexpr(3)
NUM_MASKED = tl.constexpr(4)
STATE_WORDS = tl.constexpr(5)
"""Entries of the state; CURRENT is the call that was begun last, or the one that has failed. Behind them, for each
rank, the nanoseconds that have been waited for it."""

SEQUENCE = tl.constexpr(0)
PROGRESS = tl.constexpr(1)
CALL_WORDS = tl.constexpr(2)
"""Entries of a call, int64, behind the words of all ranks: its number, and how far this rank is."""

BEGUN = tl.constexpr(1)
READY = tl.constexpr(2)
SENT = tl.constexpr(3)
"""Progress of a dispatch that one kernel does: its word is given; it knows where rows go; they are there."""

BEGIN = tl.constexpr(1)
ARRIVE = tl.constexpr(2)
"""Phases of a failure."""

KIND_SHIFT = tl.constexpr(consent.KIND_SHIFT)
SLOT_SHIFT = tl.constexpr(consent.SLOT_SHIFT)
OUTPUT_SHIFT = tl.constexpr(consent.OUTPUT_SHIFT)
SLOT_MASK = tl.constexpr(consent.SLOT_MASK)
SIGNATURE_MASK = tl.constexpr(consent.SIGNATURE_MASK)
PUSHED = tl.constexpr(consent.PUSHED)
WITHOUT_KIND = tl.constexpr((1 << consent.KIND_SHIFT) - 1)


@triton.jit
def is_ok(state):
    """Whether the call under way may go on."""
    return tl.load(state + STATUS) == OK


@triton.jit
def slot_of(call, peer):
    """Where a peer wants the rows of this call."""
    return (tl.load(call + peer) >> SLOT_SHIFT) & SLOT_MASK


@triton.jit
def output_slot_of(call, peer):
    """Where a peer's outputs lie, or PUSHED."""
    return (tl.load(call + peer) >> OUTPUT_SHIFT) & SLOT_MASK


@triton.jit
def speaker_at(segments, rank, P: tl.constexpr):
    """As whom this rank speaks to each rank, ``[next_power_of_2(P)]``: as itself, and as each masked one to itself."""
    lanes = tl.arange(0, triton.next_power_of_2(P))
    is_own = tl.load(segments + lanes, mask=lanes < P, other=0) == tl.load(segments + rank)
    return tl.where(is_own, lanes, rank)


@triton.jit
def has_masked_picks(segments, mine, rank, P: tl.constexpr, W: tl.constexpr):
    """Whether any of the counts are of a masked rank's experts; those come first."""
    column = tl.arange(0, mine.shape[0])
    return_row = column // (W // P - 1)
    is_expert = column < W - P
    is_own = tl.load(segments + return_row, mask=is_expert, other=0) == tl.load(segments + rank)
    return tl.max((is_expert & is_own & (return_row != rank) & (mine > 0)).to(tl.int32), axis=0) > 0


@triton.jit
def give_word(
    segments,
    state,
    call,
    payload,
    is_refused,
    mine,
    rank,
    words_offset,
    counts_offset,
    P: tl.constexpr,
    RING: tl.constexpr,
    W: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Takes the next call's number, and gives this rank's word for it, behind its counts where there are any (W > 0).

    Args:
        payload: int64, this rank's word without its stamp.
        is_refused: whether it is known that this rank's picks are not allowed: its word then has no kind. So it is
            where picks are of a masked rank's experts, which the host drops, but not in a graph captured before.
        mine: int64, a power of two of counts; what there are more than these are 0.
        AT_ONCE: ranks whose counts are moved at a time, a power of two.
    """
    speaker = speaker_at(segments, rank, P)
    sequence = tl.load(state + NEXT)
    num_masked = tl.load(state + NUM_MASKED)
    tl.debug_barrier()  # every warp has read it
    tl.store(state + CURRENT, sequence)
    tl.store(state + NEXT, next_call(sequence))
    tl.store(call + P + SEQUENCE, sequence)
    entry = (sequence & (RING - 1)) * P
    given = tl.zeros_like(speaker).to(tl.int64) + payload
    if W > 0:
        is_old = num_masked > 0
        if is_old:
            is_old = has_masked_picks(segments, mine, rank, P, W)
        given = tl.where((is_refused | is_old) & (speaker == rank), given & WITHOUT_KIND, given)
        COLUMNS: tl.constexpr = mine.shape[0]
        columns = tl.arange(0, COLUMNS)
        for first in range(0, P, AT_ONCE):
            peer = first + tl.arange(0, AT_ONCE)
            there = words_at(tl.load(segments + peer, mask=peer < P, other=0), counts_offset) + (entry + rank) * W
            is_there = (peer < P)[:, None] & (columns < W)[None, :]
            tl.store(there[:, None] + columns[None, :], stamped(sequence, mine)[None, :], mask=is_there)
            if COLUMNS < W:
                rest = COLUMNS + tl.arange(0, triton.next_power_of_2(W - COLUMNS))
                is_there = (peer < P)[:, None] & (rest < W)[None, :]
                tl.store(there[:, None] + rest[None, :], stamped(sequence, tl.zeros_like(rest))[None, :], mask=is_there)
    post_words(segments, words_offset + 8 * (entry + speaker), stamped(sequence, given), P)
    return sequence


@triton.jit
def take_words(
    segments,
    state,
    call,
    failure,
    host_failure,
    sequence,
    payload,
    rank,
    max_polls,
    words_offset,
    aborts_offset,
    P: tl.constexpr,
    RING: tl.constexpr,
):
    """Waits for everybody's words for a call, and leaves them in ``call``; everybody's counts are visible then."""
    lanes = tl.arange(0, triton.next_power_of_2(P))
    is_rank = lanes < P
    entry = (sequence & (RING - 1)) * P
    own = tl.load(segments + rank)
    words, aborts = words_at(own, words_offset) + entry, words_at(own, aborts_offset)
    ended = tl.load(state + NUM_ENDED)
    status, theirs = wait_words(
        words,
        aborts,
        stamped(sequence, 0),
        True,
        ended,
        max_polls,
        BEGIN,
        failure,
        P,
        PAYLOAD_BITS,
        state + STATE_WORDS,
    )
    theirs = theirs & PAYLOAD_MASK
    if status == OK:
        differs = is_rank & ((theirs >> KIND_SHIFT) != (payload >> KIND_SHIFT))
        peer = tl.min(tl.where(differs, lanes, P), axis=0)
        if peer == P:
            differs = is_rank & ((theirs & SIGNATURE_MASK) != (payload & SIGNATURE_MASK))
            peer = tl.min(tl.where(differs, lanes, P), axis=0)
        if peer < P:
            status = tl.full([], MISMATCHED, tl.int32)
            write_failure(failure, status, peer, BEGIN, payload, tl.sum(tl.where(lanes == peer, theirs, 0), axis=0))
    tl.store(call + lanes, theirs, mask=is_rank)
    tell_status(state, sequence, status, failure, host_failure)
    return status


@triton.jit
def copy_counts(came, gathered, good, P: tl.constexpr, W: tl.constexpr, AT_ONCE: tl.constexpr):
    """Everybody's counts as they came, stamped, into ``gathered``, int64 ``[P, W]``; zeros where not good."""
    columns = tl.arange(0, triton.next_power_of_2(W))
    for first in range(0, P, AT_ONCE):
        peer = first + tl.arange(0, AT_ONCE)
        is_there = (peer < P)[:, None] & (columns < W)[None, :]
        at = peer[:, None] * W + columns[None, :]
        tl.store(gathered + at, tl.load(came + at, mask=is_there & good, other=0) & PAYLOAD_MASK, mask=is_there)


@triton.jit(do_not_specialize=["payload", "rank", "max_polls"])
def begin_call(
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
    P: tl.constexpr,
    RING: tl.constexpr,
    W: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Takes the next call's number, gives this rank's word for it, and waits for everybody's; leaves them in ``call``.

    In a fresh dispatch (W > 0) the counts go first, stamped like every word, and everybody's are left in ``gathered``.

    Args:
        payload: int64, this rank's word without its stamp.
        refused: int32, not 0 where this rank's picks are not allowed: its word then has no kind. Set to 0 again.
        counts, gathered: int64 ``[W]`` and ``[P, W]``.
        AT_ONCE: ranks whose counts are moved at a time, a power of two.
    """
    if is_ok(state):
        is_refused = False
        mine = tl.zeros([1], tl.int64)
        if W > 0:
            is_refused = tl.load(refused) != 0
            tl.debug_barrier()  # every warp has read it
            tl.store(refused, 0)
            columns = tl.arange(0, triton.next_power_of_2(W))
            mine = tl.load(counts + columns, mask=columns < W, other=0)
        sequence = give_word(
            segments, state, call, payload, is_refused, mine, rank, words_offset, counts_offset, P, RING, W, AT_ONCE
        )
        status = take_words(
            segments, state, call, failure, host_failure, sequence, payload, rank, max_polls, words_offset,
            aborts_offset, P, RING,
        )  # fmt: skip
        if W > 0:
            came = words_at(tl.load(segments + rank), counts_offset) + (sequence & (RING - 1)) * (P * W)
            copy_counts(came, gathered, status == OK, P, W, AT_ONCE)


@triton.jit(do_not_specialize=["payload", "rank", "max_polls", "num_trips"])
def exchange_words(
    segments,
    state,
    call,
    failure,
    host_failure,
    payload,
    rank,
    max_polls,
    words_offset,
    aborts_offset,
    num_trips,
    P: tl.constexpr,
    RING: tl.constexpr,
):
    """Calls of nothing but words, one behind the other, until one is not OK."""
    for _ in range(num_trips):
        if is_ok(state):
            sequence = give_word(
                segments, state, call, payload, False, tl.zeros([1], tl.int64), rank, words_offset, 0, P, RING, 0, 1
            )
            take_words(
                segments, state, call, failure, host_failure, sequence, payload, rank, max_polls, words_offset,
                aborts_offset, P, RING,
            )  # fmt: skip
        tl.debug_barrier()  # every warp sees how it went


@triton.jit
def await_rows(
    segments,
    state,
    call,
    failure,
    host_failure,
    rank,
    max_polls,
    arrived_offset,
    aborts_offset,
    tokens,
    all_tokens,
    P: tl.constexpr,
    RING: tl.constexpr,
    AWAITS_ALL: tl.constexpr,
    L: tl.constexpr,
):
    """Waits until the rows of a call are here; then they count. See ``finish_call``."""
    lanes = tl.arange(0, triton.next_power_of_2(P))
    sequence = tl.load(call + P + SEQUENCE)
    entry = (sequence & (RING - 1)) * P
    is_awaited = lanes < P
    if not AWAITS_ALL:
        theirs = tl.load(call + lanes, mask=lanes < P, other=0)
        is_awaited = is_awaited & (((theirs >> OUTPUT_SHIFT) & SLOT_MASK) == PUSHED)
    own = tl.load(segments + rank)
    words, aborts = words_at(own, arrived_offset) + entry, words_at(own, aborts_offset)
    ended, word = tl.load(state + NUM_ENDED), stamped(sequence, 0)
    status, _ = wait_words(
        words, aborts, word, is_awaited, ended, max_polls, ARRIVE, failure, P, PAYLOAD_BITS, state + STATE_WORDS,
        REFUSALS=1,
    )  # fmt: skip
    if L > 0:  # noqa: SIM102 - one is of the compiler, the other of the device
        if status == OK:
            local = tl.arange(0, triton.next_power_of_2(L))
            so_far = tl.load(all_tokens + local, mask=local < L)
            tl.store(all_tokens + local, so_far + tl.load(tokens + local, mask=local < L), mask=local < L)
    tell_status(state, sequence, status, failure, host_failure)
    return status


@triton.jit
def post_arrived(segments, call, is_refused, rank, arrived_offset, P: tl.constexpr, RING: tl.constexpr):
    """Tells every rank that this rank's rows of a call are in place.

    Args:
        is_refused: whether its picks are not allowed, in a call whose word has not told that. This word then has a
            payload, and the call is void on all ranks.
    """
    sequence = tl.load(call + P + SEQUENCE)
    entry = (sequence & (RING - 1)) * P
    speaker = speaker_at(segments, rank, P)
    word = stamped(sequence, (is_refused & (speaker == rank)).to(tl.int64))
    post_words(segments, arrived_offset + 8 * (entry + speaker), word, P)


@triton.jit(do_not_specialize=["rank", "max_polls"])
def finish_call(
    segments,
    state,
    call,
    failure,
    host_failure,
    rank,
    max_polls,
    arrived_offset,
    aborts_offset,
    tokens,
    all_tokens,
    P: tl.constexpr,
    RING: tl.constexpr,
    POSTS: tl.constexpr,
    AWAITS_ALL: tl.constexpr,
    L: tl.constexpr,
):
    """Tells every rank that this rank's rows are in place, and waits for theirs; ends a call that a rank gave up.

    Runs behind the kernels that wrote rows, so that its release covers them.

    Args:
        POSTS: whether this rank has written anything.
        AWAITS_ALL: whether every rank has; else those whose word says that they push.
        tokens, all_tokens: int32 and int64 ``[L]``, picks of each local expert in this call, and in all that were OK;
            L is 0 in calls that are not counted.
    """
    if is_ok(state):
        if POSTS:
            post_arrived(segments, call, False, rank, arrived_offset, P, RING)
        await_rows(
            segments, state, call, failure, host_failure, rank, max_polls, arrived_offset, aborts_offset, tokens,
            all_tokens, P, RING, AWAITS_ALL, L,
        )  # fmt: skip


@triton.jit
def tell_status(state, sequence, status, failure, host_failure):
    """Where a call is not OK, says so to the kernels that follow, and gives the host the failure."""
    tl.debug_barrier()  # every warp has read the state
    if status != OK:
        tl.store(state + STATUS, status.to(tl.int64))
        tl.store(state + CURRENT, sequence)
        words = tl.arange(0, triton.next_power_of_2(FAILURE_WORDS))
        is_word = words < FAILURE_WORDS
        tl.debug_barrier()
        tl.store(host_failure + words, tl.load(failure + words, mask=is_word, volatile=True), mask=is_word)


@triton.jit
def look_for_abort(segments, state, call, failure, host_failure, rank, aborts_offset, P: tl.constexpr):
    """Ends a call where a rank has given it up: what it let this rank read may have changed since."""
    lanes = tl.arange(0, triton.next_power_of_2(P))
    sequence = tl.load(call + P + SEQUENCE)
    aborts = words_at(tl.load(segments + rank), aborts_offset)
    peer, flag = find_abort(aborts, lanes < P, tl.load(state + NUM_ENDED), sequence & CALL_MASK, P)
    status = tl.where(peer == P, OK, ABORTED)
    if status != OK:
        write_failure(failure, status, peer, ARRIVE, stamped(sequence, 0), flag)
    tell_status(state, sequence, status, failure, host_failure)


@triton.jit(do_not_specialize=["rank"])
def check_call(segments, state, call, failure, host_failure, rank, aborts_offset, P: tl.constexpr):
    """``look_for_abort``, behind the kernels that read."""
    if is_ok(state):
        look_for_abort(segments, state, call, failure, host_failure, rank, aborts_offset, P)
