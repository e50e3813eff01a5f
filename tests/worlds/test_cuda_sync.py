"""Words between processes, in Triton's interpreter: the protocol of ``kernels/sync.py`` on a machine without a GPU.

Each rank is a process that maps the segments of all. Kernels get addresses, never a tensor over shared memory: the
interpreter copies its tensor arguments back after a launch, over what a peer has written meanwhile.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import multiprocessing
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")

import torch  # noqa: E402 - behind the skip
import triton.language as tl  # noqa: E402

from crossdock import consent  # noqa: E402
from crossdock.backends.cuda.kernels import sync  # noqa: E402
from crossdock.backends.cuda.kernels.sync import (  # noqa: E402
    is_last_program,
    next_call,
    post_words,
    stamped,
    wait_words,
    words_at,
)
from tests.interpreted import patch_language_once  # noqa: E402

LIMIT_S = 60
RING = tl.constexpr(2)
PHASE = tl.constexpr(3)
SEGMENT_BYTES = 4096
WORDS, ABORTS, ROWS = 0, 1024, 2048
"""Where a segment has its regions."""
ROUNDS = 30
FIRSTS = (
    1 << 32,
    (127 << 32) + consent.CALL_MASK - 20,  # calls wrap around
    (128 << 32) + 5,  # the word is negative
    (255 << 32) + consent.CALL_MASK - 20,
    2**63 - 30,  # and what exceeds 40 bits falls off
)
NO_HURRY = 10**9


@triton.jit
def num_ended(sequence):
    """Epochs before that of a sequence number, while there are fewer than 255."""
    return (sequence >> 32) - 1


@triton.jit
def exchange(segments, rank, payload, state, max_polls, failure, result, rows, P: tl.constexpr, POSTS: tl.constexpr):
    """One call: a row to each rank, a word to each, a wait, and the rows that have come."""
    lanes = tl.arange(0, triton.next_power_of_2(P))
    sequence = tl.load(state)
    entry = (sequence & (RING - 1)) * P
    if POSTS:
        addresses = tl.load(segments + lanes, mask=lanes < P, other=0)
        row = (tl.zeros_like(addresses) + sequence) * 8 + rank
        tl.store(words_at(addresses, ROWS_AT + 8 * (entry + rank)), row, mask=lanes < P)
        post_words(segments, WORDS_AT + 8 * (entry + rank), stamped(sequence, payload), P)
    own = tl.load(segments + rank)
    words, aborts = words_at(own, WORDS_AT) + entry, words_at(own, ABORTS_AT)
    status, seen = wait_words(
        words, aborts, stamped(sequence, 0), True, num_ended(sequence), max_polls, PHASE, failure, P
    )
    if status == sync.OK:
        arrived = tl.load(words_at(own, ROWS_AT) + entry + lanes, mask=lanes < P)
        tl.store(rows + lanes, arrived, mask=lanes < P)
    tl.store(result, status)
    tl.store(result + 1 + lanes, seen, mask=lanes < P)
    tl.store(state, next_call(sequence))


WORDS_AT, ABORTS_AT, ROWS_AT = tl.constexpr(WORDS), tl.constexpr(ABORTS), tl.constexpr(ROWS)


@triton.jit
def abort(segments, rank, flag, P: tl.constexpr):
    post_words(segments, ABORTS_AT + 8 * rank, flag, P)


@triton.jit
def compare(segments, expected, result, failure, P: tl.constexpr, BITS: tl.constexpr):
    own = tl.load(segments)
    status, _ = wait_words(words_at(own, WORDS_AT), words_at(own, ABORTS_AT), expected, True, 0, 3, 0, failure, P, BITS)
    tl.store(result, status)


@triton.jit
def take_tickets(ticket, who):
    if is_last_program(ticket):
        tl.store(who, tl.load(who) * 1000 + tl.program_id(0) * 10 + tl.program_id(1))


class Rank:
    """A rank in its process: all segments mapped, kernels launched on them."""

    def __init__(self, rank: int, num_ranks: int, folder: str, barrier: Any) -> None:
        self.rank, self.num_ranks, self._barrier = rank, num_ranks, barrier
        self._maps = []
        for peer in range(num_ranks):
            with (Path(folder) / str(peer)).open("r+b") as file:
                self._maps.append(mmap.mmap(file.fileno(), SEGMENT_BYTES))
        addresses = [ctypes.addressof(ctypes.c_char.from_buffer(segment)) for segment in self._maps]
        self.segments = torch.tensor(addresses)
        self.state = torch.tensor([FIRSTS[0]])
        self.failure = torch.zeros(5, dtype=torch.int64)
        self.rng = random.Random(rank)  # noqa: S311 - delays

    def meet(self) -> None:
        self._barrier.wait(LIMIT_S)

    def start(self, sequence: int) -> None:
        """All ranks, at a sequence number, with the words of long ago in place and nothing on failure."""
        self.meet()
        self.state.fill_(sequence)
        self.failure.zero_()
        for entry in range(RING.value):
            for sender in range(self.num_ranks):
                old = consent.stamped(sequence - 4 + entry, self.payload(sequence - 4 + entry, sender))
                self.write(WORDS + 8 * (entry * self.num_ranks + sender), old)
        for sender in range(self.num_ranks):
            self.write(ABORTS + 8 * sender, 0)
        self.meet()

    def write(self, offset: int, value: int) -> None:
        self._maps[self.rank][offset : offset + 8] = value.to_bytes(8, "little", signed=True)

    def word_here(self, sequence: int, sender: int) -> int:
        offset = WORDS + 8 * (sequence % RING.value * self.num_ranks + sender)
        return int.from_bytes(self._maps[self.rank][offset : offset + 8], "little", signed=True)

    @staticmethod
    def payload(sequence: int, sender: int) -> int:
        return (sequence * 40503 + sender * 0x800001) & consent.PAYLOAD_MASK

    def exchange(self, *, max_polls: int = NO_HURRY, posts: bool = True) -> tuple[int, list[int], list[int]]:
        result = torch.full((1 + self.num_ranks,), -7)
        rows = torch.full((self.num_ranks,), -7)
        payload = self.payload(int(self.state), self.rank)
        args = (self.segments, self.rank, payload, self.state, max_polls, self.failure, result, rows)
        exchange[(1,)](*args, P=self.num_ranks, POSTS=posts)
        return int(result[0]), result[1:].tolist(), rows.tolist()

    def abort(self, flag: int) -> None:
        abort[(1,)](self.segments, self.rank, flag, P=self.num_ranks)


def many_rounds(rank: Rank) -> None:
    for first in FIRSTS:
        rank.start(first)
        sequence = first
        pace = rank.rng.choice([0, 0, 0.002])
        for _ in range(ROUNDS):
            assert int(rank.state) == sequence
            time.sleep(rank.rng.random() * pace)
            status, seen, rows = rank.exchange()
            assert status == sync.OK.value
            peers = range(rank.num_ranks)
            assert seen == [consent.stamped(sequence, rank.payload(sequence, peer)) for peer in peers]
            assert rows == [_signed(sequence * 8 + peer) for peer in peers]
            sequence = sequence & ~consent.CALL_MASK | (sequence + 1) & consent.CALL_MASK
        assert rank.failure.tolist() == [0] * 5
    rank.meet()


def expired_deadline(rank: Rank) -> None:
    for absent in range(rank.num_ranks):
        first = (128 << 32) + 7
        rank.start(first)
        if rank.rank != absent:
            status, _, rows = rank.exchange(max_polls=20)
            assert status == sync.TIMED_OUT.value
            assert rows == [-7] * rank.num_ranks
            expected, seen = consent.stamped(first, 0), rank.word_here(first, absent)
            failure = [sync.TIMED_OUT.value, absent, PHASE.value, expected, seen]
            assert rank.failure.tolist() == failure
            assert seen == consent.stamped(first - 3 + first % 2 - 1, rank.payload(first - 3 + first % 2 - 1, absent))
            assert rank.exchange(max_polls=20)[0] == sync.TIMED_OUT.value
            assert rank.failure.tolist() == failure  # the first failure stays
        rank.meet()


def abort_ends_wait(rank: Rank) -> None:
    """Long before the deadline; and at the deadline an abort is the reason that counts."""
    flag = consent.Flag(epoch=0, first_void=consent.CALL_MASK, num_more=0).packed()
    assert flag < 0
    for culprit in range(rank.num_ranks):
        rank.start(FIRSTS[0] + 8)
        if rank.rank == culprit:
            time.sleep(0.02)
            rank.abort(flag)
        else:
            assert rank.exchange()[0] == sync.ABORTED.value
            assert rank.exchange(max_polls=1, posts=False)[0] == sync.ABORTED.value
            expected = consent.stamped(FIRSTS[0] + 8, 0)
            assert rank.failure.tolist() == [sync.ABORTED.value, culprit, PHASE.value, expected, flag]
        rank.meet()


def abort_after_words(rank: Rank) -> None:
    """A rank that has given its word and then aborts has begun the call: the others go on with it."""
    sequence = FIRSTS[0] + 16
    rank.start(sequence)
    assert rank.exchange(max_polls=0)[0] in (sync.OK.value, sync.TIMED_OUT.value)
    if rank.rank == 0:
        rank.abort(consent.Flag(epoch=0, first_void=16, num_more=0).packed())
    rank.meet()
    rank.state.fill_(sequence)
    rank.failure.zero_()
    assert rank.exchange(posts=False)[0] == sync.OK.value
    assert rank.failure.tolist() == [0] * 5
    rank.meet()


def whole_words(rank: Rank) -> None:
    """Every bit above the payload is compared, and only those."""
    rank.start(FIRSTS[0])
    result, num_ranks = torch.zeros(1, dtype=torch.int64), rank.num_ranks
    mine = rank.segments[rank.rank :]
    for word, bits in itertools.product((0x4123456789ABCDEF, ~0x4123456789ABCDEF), (0, 24)):
        for bit in (None, 0, 23, 24, 31, 32, 62, 63):
            for sender in range(num_ranks):
                rank.write(WORDS + 8 * sender, word)
            rank.write(WORDS + 8 * (num_ranks - 1), word if bit is None else _signed(word ^ 1 << bit))
            compare[(1,)](mine, word, result, rank.failure, P=num_ranks, BITS=bits)
            assert int(result) == (sync.OK if bit is None or bit < bits else sync.TIMED_OUT).value
    rank.meet()


def tickets(rank: Rank) -> None:
    """The last of six programs knows, in every launch."""
    ticket, who = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    for _ in range(3):
        take_tickets[(3, 2)](ticket, who)
        assert int(ticket) == 0
    assert int(who) == 21021021
    rank.meet()


PROGRAMS: tuple[Callable[[Rank], None], ...] = (
    tickets, whole_words, many_rounds, expired_deadline, abort_ends_wait, abort_after_words,
)  # fmt: skip


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _serve(rank: int, num_ranks: int, folder: str, barrier: Any, replies: Connection) -> None:
    """What a process does: every program, until one fails; their names, or the failure."""
    done = []
    try:
        patch_language_once()
        ranks = Rank(rank, num_ranks, folder, barrier)
        for program in PROGRAMS:
            program(ranks)
            done.append(program.__name__)
        replies.send((done, ""))
    except BaseException:  # noqa: BLE001 - whatever goes wrong is for the test to see
        barrier.abort()
        replies.send((done, traceback.format_exc()))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_words_between_processes(num_ranks, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(num_ranks)
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="crossdock-test-", dir=shared) as folder:
        processes, pipes = [], []
        for rank in range(num_ranks):
            (Path(folder) / str(rank)).write_bytes(bytes(SEGMENT_BYTES))
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(rank, num_ranks, folder, barrier, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            deadline = time.monotonic() + LIMIT_S
            replies = [pipe.recv() if pipe.poll(deadline - time.monotonic()) else ([], "no reply") for pipe in pipes]
        finally:
            for process, pipe in zip(processes, pipes, strict=True):
                pipe.close()
                process.join(2)
                process.kill()
                process.join()
                process.close()
    failures = [text for _, text in replies if text and "BrokenBarrierError" not in text]
    assert not failures, failures[0]
    assert [done for done, _ in replies] == [[program.__name__ for program in PROGRAMS]] * num_ranks
