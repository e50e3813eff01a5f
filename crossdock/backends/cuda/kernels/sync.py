"""Words between ranks and tickets inside a grid: the only place where memory is ordered. Triton only.

A word is 64 bits at a place of its own in a peer's segment: a stamp (the call's sequence number) over a payload, as
``crossdock.consent.stamped`` makes it. It is written by an atomic and read by atomics, never by a load or a store.
A single thread releases or acquires, and Triton (up to 3.8) puts no barrier between it and the program's others: so one
stands before every release and after every acquire. tests/unit/test_cuda_sync.py looks for them in what is emitted.

Letters: P ranks. A block of words has one lane per rank, padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock import consent

OK = tl.constexpr(0)
TIMED_OUT = tl.constexpr(1)
ABORTED = tl.constexpr(2)
MISMATCHED = tl.constexpr(3)
"""Why a call ended; OK is the only one after which peer memory may be touched."""

GO = tl.constexpr(1)
NO_ROWS = tl.constexpr(2)
NOTHING = tl.constexpr(3)
"""Values of the go flag of a grid's first program: rows go where the tables say; the call is void, or rows do not
fit; there is nothing to do (any more)."""

FAILURE_STATUS = tl.constexpr(0)
FAILURE_PEER = tl.constexpr(1)
FAILURE_PHASE = tl.constexpr(2)
FAILURE_EXPECTED = tl.constexpr(3)
FAILURE_SEEN = tl.constexpr(4)
FAILURE_WORDS = tl.constexpr(5)
"""Entries of a failure, int64; all zero while nothing has failed."""
CLAIMED = tl.constexpr(-1)
"""In place of a failure's status: a program is writing the rest."""

PAYLOAD_BITS = tl.constexpr(consent.PAYLOAD_BITS)
PAYLOAD_MASK = tl.constexpr(consent.PAYLOAD_MASK)
WORD_BITS = tl.constexpr(consent.WORD_BITS)
WORD_MASK = tl.constexpr(consent.WORD_MASK)
WORD_CALL_BITS = tl.constexpr(consent.WORD_CALL_BITS)
WORD_CALL_MASK = tl.constexpr(2**consent.WORD_CALL_BITS - 1)
CALL_MASK = tl.constexpr(consent.CALL_MASK)
EPOCH_SHIFT = tl.constexpr(consent.EPOCH_SHIFT)
FLAG_EPOCH_SHIFT = tl.constexpr(consent.FLAG_EPOCH_SHIFT)
FLAG_EPOCH_UP = tl.constexpr(64 - consent.FLAG_EPOCH_BITS)
MOST_MORE = tl.constexpr(consent.MOST_MORE)

ABORT_EVERY = tl.constexpr(16)
"""Polls of the words for one of the abort words, which would double the time of each."""
WRITE_BACK = tl.constexpr("buffer_wbl2 sc0 sc1\ns_waitcnt vmcnt(0)\nv_mov_b32 $0, $1")
"""gfx942: this wave's stores are visible to the system."""


@triton.jit
def words_at(segment, offset):
    """The int64 words at a byte offset of segments, from their addresses (a scalar or a block of int64)."""
    return (segment + offset).to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit
def complete_stores():
    """A barrier of the program, behind which any of its threads can release what all of them have stored.

    On AMD each wave also waits for its stores to be visible everywhere: s_barrier does not wait for them, and another
    wave's release waits only for its own (LLVM repaired that for gfx10 and later, llvm-project#160501, not for gfx942).
    """
    if tl.target_info.is_hip():
        tl.inline_asm_elementwise(
            WRITE_BACK, "=v,v,~{memory}", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def post_words(segments, offset, word, P: tl.constexpr):
    """Writes one word at each rank, this one included: all that this program has stored before is there with it.

    One vector atomic releases at system scope, behind a barrier. Stores of other programs are covered if this one has
    seen them through ``is_last_program``.

    Args:
        segments: the ranks' segments here, int64 addresses ``[P]``.
        offset: where in each of them, in bytes; the same for all, or a block with one lane per rank.
        word: int64; the same for all, or a block with one lane per rank.
        P: number of ranks.
    """
    lanes = tl.arange(0, triton.next_power_of_2(P))
    addresses = tl.load(segments + lanes, mask=lanes < P, other=0)
    values = tl.zeros_like(addresses) + word
    complete_stores()
    tl.atomic_xchg(words_at(addresses, offset), values, mask=lanes < P, sem="release", scope="sys")


@triton.jit
def makes_void(flags, num_ended, call):
    """Which flags make a call void, as ``crossdock.consent.Flag.makes_void`` says; 0 is no flag."""
    behind = ((num_ended - (flags >> FLAG_EPOCH_SHIFT)) << FLAG_EPOCH_UP) >> FLAG_EPOCH_UP
    num_more = (flags >> 1) & MOST_MORE
    is_late = ((call - (flags >> EPOCH_SHIFT)) & CALL_MASK) <= CALL_MASK // 2
    return (flags != 0) & (behind <= num_more) & ((behind != 0) | is_late)


@triton.jit
def find_abort(aborts, is_rank, num_ended, call, P: tl.constexpr):
    """The first rank whose flag makes the call void, and the flag; P and 0 where there is none. Acquires."""
    lanes = tl.arange(0, triton.next_power_of_2(P))
    nothing = tl.zeros_like(lanes).to(tl.int64)
    flags = tl.atomic_or(aborts + lanes, nothing, mask=is_rank, sem="acquire", scope="sys")
    tl.debug_barrier()
    peer = tl.min(tl.where(is_rank & makes_void(flags, num_ended, call), lanes, P), axis=0)
    return peer, tl.sum(tl.where(lanes == peer, flags, 0), axis=0)


@triton.jit
def now_ns():
    """A clock of the GPU, int64 nanoseconds; 0 where there is none."""
    if tl.target_info.cuda_capability_geq(7, 0):
        return tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l,r", [tl.program_id(0)], dtype=tl.int64, is_pure=False, pack=1
        )
    if tl.target_info.is_hip():  # 100 MHz on gfx942
        ticks = tl.inline_asm_elementwise(
            "s_memrealtime $0\ns_waitcnt lgkmcnt(0)", "=s,v", [tl.program_id(0)], dtype=tl.int64, is_pure=False, pack=1
        )
        return ticks * 10
    return tl.full([], 0, tl.int64)


@triton.jit
def wait_words(
    words,
    aborts,
    expected,
    is_awaited,
    num_ended,
    max_polls,
    phase,
    failure,
    P: tl.constexpr,
    BITS: tl.constexpr = PAYLOAD_BITS,
    waits=None,
    call=None,
    REFUSALS: tl.constexpr = 0,
):
    """Why the wait ended, and the words: ``status, seen``. If OK, all that was before the words is visible here.

    Peers signal with ``post_words``. The wait ends when every awaited word equals the expected one above its lowest
    ``BITS`` bits, or a flag in ``aborts`` makes the call void, or after ``max_polls`` polls. Polls are relaxed atomics;
    then one vector atomic acquires at system scope, a barrier follows it, and what it has read decides: words that are
    there at last make it OK, whatever else was seen. Otherwise the first failure since the failure was zeroed is
    written there: the rank that aborted and its flag, or the first rank that is missing and its word.

    Args:
        words: this rank's words, int64 ``[P]``.
        aborts: this rank's abort words, int64 ``[P]``: packed ``crossdock.consent.Flag``s.
        expected: int64; the same from all, or a block with one lane per rank.
        is_awaited: whether a rank's word is waited for; the same for all, or a block with one lane per rank.
        num_ended: int64, the epochs that have ended before that of the call.
        max_polls: the deadline; a poll takes about 0.3 us on an H200, with 2 to 8 ranks on it.
        phase: a number for the failure.
        failure: int64 ``[FAILURE_WORDS]``.
        P: number of ranks.
        BITS: size of the payload, which is not compared; 0 compares whole words.
        waits: int64 ``[P]``, nanoseconds that have been waited for each rank, or None; added to.
        call: the call's sequence number, by which flags are judged; None: that of ``expected``, which is ``stamped``.
        REFUSALS: not 0 where a word with a payload refuses the call: that is MISMATCHED, and the failure has seen 0.
    """
    lanes = tl.arange(0, triton.next_power_of_2(P))
    is_rank = lanes < P
    nothing = tl.zeros_like(lanes).to(tl.int64)
    expected = nothing + expected
    if call is None:
        call = expected >> PAYLOAD_BITS
    call = (nothing + call) & CALL_MASK
    is_awaited = is_rank & is_awaited
    num_missing = tl.full([], P, tl.int32)
    is_aborted = tl.full([], 0, tl.int32)
    num_polls = tl.full([], 0, tl.int64)
    polled = now_ns()
    while (num_missing > 0) & (is_aborted == 0) & (num_polls < max_polls):  # scalars: Triton 3.6 carries no tensor here
        here = tl.atomic_or(words + lanes, nothing, mask=is_rank, sem="relaxed", scope="sys")
        is_late = is_awaited & (here >> BITS != expected >> BITS)
        num_missing = tl.sum(is_late.to(tl.int32), axis=0)
        if waits is not None:
            now = now_ns()
            tl.atomic_add(waits + lanes, nothing + (now - polled), mask=is_late, sem="relaxed", scope="gpu")
            polled = now
        num_polls += 1
        if num_polls % ABORT_EVERY == 0:
            flags = tl.atomic_or(aborts + lanes, nothing, mask=is_rank, sem="relaxed", scope="sys")
            is_aborted = tl.max((is_rank & makes_void(flags, num_ended, call)).to(tl.int32), axis=0)
    peer = tl.full([], P, tl.int32)
    flag = tl.full([], 0, tl.int64)
    if num_missing > 0:  # who aborts has posted its words before: the flags first, then another look at the words
        peer, flag = find_abort(aborts, is_rank, num_ended, call, P)
    seen = tl.atomic_or(words + lanes, nothing, mask=is_rank, sem="acquire", scope="sys")
    tl.debug_barrier()
    is_missing = is_awaited & (seen >> BITS != expected >> BITS)
    first = tl.min(tl.where(is_missing, lanes, P), axis=0)
    status = tl.where(first == P, OK, tl.where(peer < P, ABORTED, TIMED_OUT))
    if REFUSALS:
        refusing = tl.min(tl.where(is_awaited & ((seen & PAYLOAD_MASK) != 0), lanes, P), axis=0)
        is_refused = (status == OK) & (refusing < P)
        status = tl.where(is_refused, MISMATCHED, status)
        peer = tl.where(is_refused, refusing, peer)
        flag = tl.where(is_refused, 0, flag)
    if status != OK:
        if status == TIMED_OUT:
            peer = first
            flag = tl.sum(tl.where(lanes == peer, seen, 0), axis=0)
        awaited = tl.sum(tl.where(lanes == peer, expected, 0), axis=0)
        write_failure(failure, status, peer, phase, awaited, flag)
    return status, tl.where(is_rank, seen, 0)


@triton.jit
def are_here(words, expected, num_polls, P: tl.constexpr):
    """Whether all begin words are those expected, but for their payloads, within so many polls. Orders nothing.

    Args:
        words: this rank's words, int64 ``[P]``; expected: int64, the same for all.
    """
    lanes = tl.arange(0, triton.next_power_of_2(P))
    nothing = tl.zeros_like(lanes).to(tl.int64)
    num_missing = tl.full([], P, tl.int32)
    while (num_missing > 0) & (num_polls > 0):
        here = tl.atomic_or(words + lanes, nothing, mask=lanes < P, sem="relaxed", scope="sys")
        is_missing = (lanes < P) & (here >> WORD_BITS != expected >> WORD_BITS)
        num_missing = tl.sum(is_missing.to(tl.int32), axis=0)
        num_polls -= 1
    return num_missing == 0


@triton.jit
def write_failure(failure, status, peer, phase, expected, seen):
    """Leaves a failure for the host, unless an earlier one is there; the status comes last, and releases the rest."""
    free, claimed = tl.full([], 0, tl.int64), tl.full([], CLAIMED, tl.int64)
    if tl.atomic_cas(failure + FAILURE_STATUS, free, claimed, sem="relaxed", scope="sys") == 0:
        tl.store(failure + FAILURE_PEER, peer)
        tl.store(failure + FAILURE_PHASE, phase)
        tl.store(failure + FAILURE_EXPECTED, expected)
        tl.store(failure + FAILURE_SEEN, seen)
        complete_stores()
        tl.atomic_xchg(failure + FAILURE_STATUS, status.to(tl.int64), sem="release", scope="sys")


@triton.jit
def release_to_host(word, value):
    """Writes a word that the host polls in its memory: all that this program has stored before is there with it."""
    complete_stores()
    tl.atomic_xchg(word, value, sem="release", scope="sys")


@triton.jit
def await_kernels_before():
    """Returns when the kernels before this one are done, and all that they stored is visible.

    A kernel may be launched while the one before it runs still (``LaunchConfig.launches_early``), and then begins with
    this. Where that is not so, there is nothing to wait for.
    """
    if tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_kernel_launch():
    """Lets the next kernel of the stream be launched, once all programs of this one have come here or ended.

    It takes the room of those that have ended, and waits in ``await_kernels_before``. Programs that have not begun yet
    need that room: so none says this before it has done all that others wait for.
    """
    if tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def is_last_program(ticket):
    """Whether this program is the last of its grid to come here; if so, it sees what all the others have stored.

    Each program releases and acquires at GPU scope, between two barriers. The last one zeroes the ticket, for the next
    kernel. To be called once by every program.

    Args:
        ticket: int32, 0 before the kernel.
    """
    num_programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    complete_stores()
    num_before = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    is_last = num_before == num_programs - 1
    if is_last:
        tl.atomic_xchg(ticket, 0, sem="relaxed", scope="gpu")
    return is_last


@triton.jit
def release_programs(go, value):
    """Lets the grid's programs that wait in ``await_go`` go on; what this one has stored is visible to them.

    Args:
        go: int32, 0 before the kernel, and to be zeroed by ``is_last_program``'s last one.
        value: int32, not 0.
    """
    complete_stores()
    tl.atomic_xchg(go, value, sem="release", scope="gpu")


@triton.jit
def await_go(go):
    """Waits for the program of this grid that calls ``release_programs``: what it has released.

    Without a deadline of its own: that program comes first in the grid, and has one.
    """
    value = tl.atomic_or(go, 0, sem="acquire", scope="gpu")
    while value == 0:
        value = tl.atomic_or(go, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return value


@triton.jit
def stamped(sequence, payload):
    """As ``crossdock.consent.stamped``; what exceeds 40 bits of the sequence number falls off."""
    return (sequence.to(tl.int64) << PAYLOAD_BITS) | payload


@triton.jit
def stamped_word(sequence, payload):
    """A begin word on its way, as ``crossdock.consent.stamped_word``."""
    sequence = sequence.to(tl.int64)
    stamp = ((sequence >> EPOCH_SHIFT) << WORD_CALL_BITS) | (sequence & WORD_CALL_MASK)
    return (stamp << WORD_BITS) | payload


@triton.jit
def next_call(sequence):
    """The sequence number after this one: the next call of the same epoch, as ``Consent.take``."""
    return (sequence & ~CALL_MASK) | ((sequence + 1) & CALL_MASK)
