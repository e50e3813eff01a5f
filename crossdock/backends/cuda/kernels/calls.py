"""The two ends of every call: words to all and from all, on the device. One program does each; Triton only.

What a buffer's kernels share is an int64 ``state``: the number of the next call and of the one begun last, the epochs
that have ended, whether all is OK, and how many ranks are masked. A call that is not OK ends the epoch: no kernel of
this rank touches peer memory any more, none waits, until the host has begun the next epoch. What belongs to one call is
an int64 ``call``.

Where a rank is masked, ``segments`` has this rank's own segment in its place, and this rank stands in for it: it
gives itself the words that the masked rank would give. So nothing that waits, here or on another rank, knows of it.

Letters: L local experts, P ranks, W counts of a rank.
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
    WORD_BITS,
    WORD_MASK,
    find_abort,
    is_last_program,
    next_call,
    post_words,
    stamped,
    stamped_word,
    wait_words,
    words_at,
    write_failure,
)
from crossdock.backends.cuda.kernels.tables import at_bytes

NEXT = tl.constexpr(0)
CURRENT = tl.constexpr(1)
NUM_ENDED = tl.constexpr(2)
STATUS = tl.constexpr(3)
NUM_MASKED = tl.constexpr(4)
STATE_WORDS = tl.constexpr(5)
"""Entries of the state; CURRENT is the call that was begun last, or the one that has failed. Behind them, for each
rank, the nanoseconds that have been waited for it."""

TICKET = tl.constexpr(0)
REFUSED = tl.constexpr(1)
GO_FLAG = tl.constexpr(2)
FLAGS = tl.constexpr(3)
"""Entries of the flags, int32: how many programs of a grid are done; whether this rank's picks are not allowed; the go
of a fused kernel."""

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

NOBODY = tl.constexpr(0)
PUSHERS = tl.constexpr(1)
ALL = tl.constexpr(2)
"""Whose rows the end of a call waits for: nobody's, those of ranks whose word says that they push, or everybody's."""

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
def has_masked_picks(segments, mine, rank, sizes):
    """Whether any of the counts are of a masked rank's experts; those come first."""
    E: tl.constexpr = sizes.L * sizes.P
    column = tl.arange(0, mine.shape[0])
    peer = column // sizes.L
    is_expert = column < E
    is_own = tl.load(segments + peer, mask=is_expert, other=0) == tl.load(segments + rank)
    return tl.max((is_expert & is_own & (peer != rank) & (mine > 0)).to(tl.int32), axis=0) > 0


@triton.jit
def give_word(own, call, payload, is_refused, mine, too_many, rank, COUNTS: tl.constexpr):
    """Takes the next call's number, and gives this rank's word for it, behind its counts where there are any (COUNTS).

    Args:
        call: int64, see CALL_WORDS.
        payload: int64, this rank's word without its stamp.
        is_refused: whether it is known that this rank's picks are not allowed: its word then has no kind. So it is
            where picks are of a masked rank's experts, which the host drops, but not in a graph captured before.
        mine: int64, a power of two of counts; what there are more than these are 0.
        too_many: this rank's tokens, where these are more than the call may have; else 0. Told behind the counts.
    """
    P: tl.constexpr = own.sizes.P
    W: tl.constexpr = (own.sizes.L + 1) * P
    segments, state = own.segments, own.state
    speaker = speaker_at(segments, rank, P)
    sequence = tl.load(state + NEXT)
    num_masked = tl.load(state + NUM_MASKED)
    tl.debug_barrier()  # every warp has read it
    tl.store(state + CURRENT, sequence)
    tl.store(state + NEXT, next_call(sequence))
    tl.store(call + P + SEQUENCE, sequence)
    entry = (sequence & (own.sizes.RING - 1)) * P
    given = tl.zeros_like(speaker).to(tl.int64) + payload
    if COUNTS:
        is_old = num_masked > 0
        if is_old:
            is_old = has_masked_picks(segments, mine, rank, own.sizes)
        given = tl.where((is_refused | is_old) & (speaker == rank), given & WITHOUT_KIND, given)
        told = tl.zeros([], tl.int64) + too_many
        COLUMNS: tl.constexpr = mine.shape[0]
        columns = tl.arange(0, COLUMNS)
        mine = tl.where(columns == W, told, mine)
        for first in range(0, P, own.sizes.AT_ONCE):
            peer = first + tl.arange(0, own.sizes.AT_ONCE)
            there = words_at(tl.load(segments + peer, mask=peer < P, other=0), own.boxes.counts)
            there += (entry + rank) * own.sizes.COUNTS
            is_there = (peer < P)[:, None] & (columns <= W)[None, :]
            tl.store(there[:, None] + columns[None, :], stamped(sequence, mine)[None, :], mask=is_there)
            if COLUMNS <= W:
                rest = COLUMNS + tl.arange(0, triton.next_power_of_2(W + 1 - COLUMNS))
                of_rest = stamped(sequence, tl.where(rest == W, told, 0))
                is_there = (peer < P)[:, None] & (rest <= W)[None, :]
                tl.store(there[:, None] + rest[None, :], of_rest[None, :], mask=is_there)
    post_words(segments, own.boxes.words + 8 * (entry + speaker), stamped_word(sequence, given), P)
    return sequence


@triton.jit
def take_words(own, call, sequence, payload, rank, max_polls):
    """Waits for everybody's words for a call, and leaves them in ``call``; everybody's counts are visible then."""
    P: tl.constexpr = own.sizes.P
    lanes = tl.arange(0, triton.next_power_of_2(P))
    is_rank = lanes < P
    entry = (sequence & (own.sizes.RING - 1)) * P
    segment = tl.load(own.segments + rank)
    words, aborts = words_at(segment, own.boxes.words) + entry, words_at(segment, own.boxes.aborts)
    ended = tl.load(own.state + NUM_ENDED)
    status, theirs = wait_words(
        words,
        aborts,
        stamped_word(sequence, 0),
        True,
        ended,
        max_polls,
        BEGIN,
        own.failure,
        P,
        WORD_BITS,
        own.state + STATE_WORDS,
        sequence,
    )
    theirs = theirs & WORD_MASK
    if status == OK:
        differs = is_rank & ((theirs >> KIND_SHIFT) != (payload >> KIND_SHIFT))
        peer = tl.min(tl.where(differs, lanes, P), axis=0)
        if peer == P:
            differs = is_rank & ((theirs & SIGNATURE_MASK) != (payload & SIGNATURE_MASK))
            peer = tl.min(tl.where(differs, lanes, P), axis=0)
        if peer < P:
            status = tl.full([], MISMATCHED, tl.int32)
            write_failure(own.failure, status, peer, BEGIN, payload, tl.sum(tl.where(lanes == peer, theirs, 0), axis=0))
    tl.store(call + lanes, theirs, mask=is_rank)
    tell_status(own, sequence, status)
    return status


@triton.jit
def copy_counts(came, gathered, good, sizes, COUNTS: tl.constexpr):
    """Everybody's counts as they came, stamped, into ``gathered``, int64 ``[P, W]``; zeros where not good.

    Args:
        COUNTS: from one rank's counts to the next.
    """
    P: tl.constexpr = sizes.P
    W: tl.constexpr = (sizes.L + 1) * P
    columns = tl.arange(0, triton.next_power_of_2(W))
    for first in range(0, P, sizes.AT_ONCE):
        peer = first + tl.arange(0, sizes.AT_ONCE)
        is_there = (peer < P)[:, None] & (columns < W)[None, :]
        here = tl.load(came + peer[:, None] * COUNTS + columns[None, :], mask=is_there & good, other=0)
        tl.store(gathered + peer[:, None] * W + columns[None, :], here & PAYLOAD_MASK, mask=is_there)


@triton.jit
def some_push(call, P: tl.constexpr):
    """Whether the word of any rank says that it pushes."""
    lanes = tl.arange(0, triton.next_power_of_2(P))
    theirs = tl.load(call + lanes, mask=lanes < P, other=0)
    return tl.max((((theirs >> OUTPUT_SHIFT) & SLOT_MASK) == PUSHED).to(tl.int32), axis=0) != 0


@triton.jit(do_not_specialize=["payload", "rank", "max_polls"])
def begin_call(call, payload: tl.int64, rank, max_polls: tl.int64, own, AWAITS: tl.constexpr):
    """Takes the next call's number, gives this rank's word for it, and waits for everybody's; leaves them in ``call``.

    Args:
        AWAITS: PUSHERS where this rank pushes nothing in a combine: what others push is then waited for at once.
    """
    if is_ok(own.state):
        nothing = tl.zeros([1], tl.int64)
        sequence = give_word(own, call, payload, False, nothing, 0, rank, False)
        status = take_words(own, call, sequence, payload, rank, max_polls)
        if AWAITS != NOBODY:  # noqa: SIM102 - one is of the compiler, the other of the device
            if (status == OK) & some_push(call, own.sizes.P):
                await_rows(own, call, own.all_tokens, rank, max_polls, AWAITS, False)


@triton.jit(do_not_specialize=["payload", "rank", "max_polls", "num_trips"])
def exchange_words(payload: tl.int64, rank, max_polls: tl.int64, num_trips, call, own):
    """Calls of nothing but words, one behind the other, until one is not OK."""
    for _ in range(num_trips):
        if is_ok(own.state):
            nothing = tl.zeros([1], tl.int64)
            sequence = give_word(own, call, payload, False, nothing, 0, rank, False)
            take_words(own, call, sequence, payload, rank, max_polls)
        tl.debug_barrier()  # every warp sees how it went


@triton.jit
def await_rows(own, call, tokens, rank, max_polls, AWAITS: tl.constexpr, COUNTED: tl.constexpr):
    """Waits until the rows of a call are here (see PUSHERS, ALL); then they count: ``tokens`` int32 ``[L]``."""
    P: tl.constexpr = own.sizes.P
    lanes = tl.arange(0, triton.next_power_of_2(P))
    sequence = tl.load(call + P + SEQUENCE)
    entry = (sequence & (own.sizes.RING - 1)) * P
    is_awaited = lanes < P
    if AWAITS == PUSHERS:
        theirs = tl.load(call + lanes, mask=lanes < P, other=0)
        is_awaited = is_awaited & (((theirs >> OUTPUT_SHIFT) & SLOT_MASK) == PUSHED)
    segment = tl.load(own.segments + rank)
    words, aborts = words_at(segment, own.boxes.arrived) + entry, words_at(segment, own.boxes.aborts)
    ended, word = tl.load(own.state + NUM_ENDED), stamped(sequence, 0)
    status, _ = wait_words(
        words, aborts, word, is_awaited, ended, max_polls, ARRIVE, own.failure, P, PAYLOAD_BITS,
        own.state + STATE_WORDS, REFUSALS=1,
    )  # fmt: skip
    if COUNTED:  # noqa: SIM102 - one is of the compiler, the other of the device
        if status == OK:
            local = tl.arange(0, triton.next_power_of_2(own.sizes.L))
            so_far = tl.load(own.all_tokens + local, mask=local < own.sizes.L)
            more = tl.load(tokens + local, mask=local < own.sizes.L)
            tl.store(own.all_tokens + local, so_far + more, mask=local < own.sizes.L)
    tell_status(own, sequence, status)
    return status


@triton.jit
def post_arrived(own, call, is_refused, rank):
    """Tells every rank that this rank's rows of a call are in place.

    Args:
        is_refused: whether its picks are not allowed, in a call whose word has not told that. This word then has a
            payload, and the call is void on all ranks.
    """
    P: tl.constexpr = own.sizes.P
    sequence = tl.load(call + P + SEQUENCE)
    entry = (sequence & (own.sizes.RING - 1)) * P
    speaker = speaker_at(own.segments, rank, P)
    word = stamped(sequence, (is_refused & (speaker == rank)).to(tl.int64))
    post_words(own.segments, own.boxes.arrived + 8 * (entry + speaker), word, P)


@triton.jit
def finish(own, call, tokens, rank, max_polls, ends):
    """What one program does when all rows of this rank are written, see ``Ends``: tells it to all ranks, and waits.

    Args:
        max_polls: 0: nobody is waited for here.
        ends: POSTS: whether this rank has written anything; AWAITS: whose rows are waited for; COUNTED: whether
            ``tokens``, int32 ``[L]``, are added to those of all calls that were OK.
    """
    if is_ok(own.state):
        if ends.POSTS:
            post_arrived(own, call, False, rank)
        if ends.AWAITS != NOBODY:  # noqa: SIM102 - one is of the compiler, the other of the device
            if max_polls > 0:
                await_rows(own, call, tokens, rank, max_polls, ends.AWAITS, ends.COUNTED)


@triton.jit
def end_call(own, call, tokens, rank, max_polls, ends):
    """The end of every program of a wide kernel: the last one does what ``finish`` does for all of them.

    With ``max_polls < 0`` nobody does: ``finish_call`` follows. A ticket makes each program wait for its own stores,
    and all take it from one word. Calls of 16,384 such programs took 15 to 20 us more on an H200 than with an ending of
    their own; that the tickets are the cause is inferred, not measured.
    """
    if ends.POSTS:  # noqa: SIM102 - one is of the compiler, the other of the device
        if max_polls >= 0:  # noqa: SIM102 - only then a ticket is taken
            if is_last_program(own.flags + TICKET):
                finish(own, call, tokens, rank, max_polls, ends)


@triton.jit(do_not_specialize=["rank", "max_polls"])
def finish_call(call, rank, max_polls: tl.int64, plan, own, ends):
    """``finish`` in a kernel of one program, behind those that wrote rows, so that its release covers them."""
    finish(own, call, at_bytes(plan, own.sizes.TABLES.tokens, tl.int32), rank, max_polls, ends)


@triton.jit(do_not_specialize=["rank"])
def check_call(call, rank, own):
    """``look_for_abort`` in a kernel of one program, behind those that read rows."""
    if is_ok(own.state):
        look_for_abort(own, call, rank)


@triton.jit
def tell_status(own, sequence, status):
    """Where a call is not OK, says so to the kernels that follow, and gives the host the failure."""
    tl.debug_barrier()  # every warp has read the state
    if status != OK:
        tl.store(own.state + STATUS, status.to(tl.int64))
        tl.store(own.state + CURRENT, sequence)
        words = tl.arange(0, triton.next_power_of_2(FAILURE_WORDS))
        is_word = words < FAILURE_WORDS
        tl.debug_barrier()
        tl.store(own.host_failure + words, tl.load(own.failure + words, mask=is_word, volatile=True), mask=is_word)


@triton.jit
def look_for_abort(own, call, rank):
    """Ends a call where a rank has given it up: what it let this rank read may have changed since."""
    P: tl.constexpr = own.sizes.P
    lanes = tl.arange(0, triton.next_power_of_2(P))
    sequence = tl.load(call + P + SEQUENCE)
    aborts = words_at(tl.load(own.segments + rank), own.boxes.aborts)
    peer, flag = find_abort(aborts, lanes < P, tl.load(own.state + NUM_ENDED), sequence & CALL_MASK, P)
    status = tl.where(peer == P, OK, ABORTED)
    if status != OK:
        write_failure(own.failure, status, peer, ARRIVE, stamped(sequence, 0), flag)
    tell_status(own, sequence, status)
