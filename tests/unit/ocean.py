"""The protocol without memory or processes: ranks in one thread, words that arrive late, failures at any moment.

``Sea`` holds what ranks have written to each other and not yet seen; one sender's writes reach one receiver in order
(release and acquire promise no more). ``Rank`` runs calls through the real CallQueue with steps like Buffer's; rows and
outputs are modelled as the sequence number of the call that wrote them, so a row of another call shows at once.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator

import pytest

from crossdock.backends.base import Outcome
from crossdock.consent import (
    CALL_MASK,
    EPOCH_SHIFT,
    NUM_EPOCHS,
    PUSHED,
    SEQUENCE_MASK,
    Consent,
    Kind,
    Missing,
    Word,
    stamped,
    stamped_word,
)
from crossdock.errors import ConfigError, CrossdockError, TransportError
from crossdock.pending import CallQueue, Pending

FIRST = 1 << EPOCH_SHIFT
FIRSTS = (
    FIRST,
    FIRST + CALL_MASK - 1,
    (127 << EPOCH_SHIFT) + CALL_MASK - 3,
    255 << EPOCH_SHIFT,
    SEQUENCE_MASK - 2,
)
"""Where call numbers, epochs and the sign of a word are about to wrap around."""
LONG_AGO = {"words": stamped_word(64 << EPOCH_SHIFT, 0), "arrived": stamped(64 << EPOCH_SHIFT, 0)}
PREEMPTED = "go on after others had the core"
PROGRAMS = (
    ("dispatch", "combine"),
    ("dispatch", "overflow", "cached dispatch", "combine", "combine"),
    ("overflow",),  # nothing but words: the calls in which ranks can be furthest apart
)


class Sea:
    """What every rank sees of every other's writes, and the writes that are still under way."""

    def __init__(self, num_ranks: int) -> None:
        self.seen: list[dict[tuple[str, int, int], int]] = [{} for _ in range(num_ranks)]
        self.reasons: list[dict[int, bytes]] = [{} for _ in range(num_ranks)]
        self.under_way = {(s, d): deque() for s in range(num_ranks) for d in range(num_ranks)}
        self.on_row: Callable[[int, int, int], None] | None = None

    def write(self, sender: int, receiver: int, box: str, index: int, value: int | bytes) -> None:
        self.under_way[sender, receiver].append((box, index, value))
        if sender == receiver:
            self.deliver(sender, receiver)

    def deliver(self, sender: int, receiver: int, num_writes: int = 1) -> None:
        for _ in range(min(num_writes, len(self.under_way[sender, receiver]))):
            box, index, value = self.under_way[sender, receiver].popleft()
            if box == "reason":
                self.reasons[receiver][sender] = value
                continue
            if box == "rows" and self.on_row:
                self.on_row(receiver, index, value)
            self.seen[receiver][box, index, sender] = value


class Port:
    """A rank's Transport over a Sea."""

    def __init__(self, sea: Sea, rank: int) -> None:
        self.sea, self.rank, self.num_ranks = sea, rank, len(sea.seen)

    def idle(self, num_polls: int) -> None:
        """Nothing arrives meanwhile."""

    def is_alive(self, peer: int) -> bool:
        return True

    def post(self, peer: int, box: str, index: int, value: int) -> None:
        self.sea.write(self.rank, peer, box, index, value)

    def load(self, box: str, index: int, sender: int) -> int:
        unused = LONG_AGO.get(box, 0)
        return self.sea.seen[self.rank].get((box, index, sender), unused)

    def forget(self, box: str) -> None:
        for entry in [entry for entry in self.sea.seen[self.rank] if entry[0] == box]:
            self.sea.seen[self.rank][entry] = 0

    def write_reason(self, peer: int, text: bytes) -> None:
        self.sea.write(self.rank, peer, "reason", 0, text)

    def read_reason(self, sender: int) -> bytes:
        return self.sea.reasons[self.rank][sender]


class Rank:
    """A rank, its calls, and what it believes about its own slots."""

    def __init__(self, ocean: Ocean, rank: int, *, num_slots: int, first: int) -> None:
        self.ocean, self.rank, self.num_slots = ocean, rank, num_slots
        self.port = Port(ocean.sea, rank)
        num_ranks = self.port.num_ranks
        ring = 1 << (2 * num_slots - 1).bit_length()
        self.consent = Consent(self.port, rank=rank, num_ranks=num_ranks, ring=ring, first=first)
        self.queue = CallQueue(self.consent, self.port, depth=num_slots, timeout_s=1)
        self.calls: deque[tuple[int, Pending]] = deque()  # started, not waited for
        self.posted: dict[int, Word] = {}
        self.completed: set[int] = set()
        self.failures: list[tuple[int, int]] = []  # (epoch that ended, its oldest call that was void)
        self.held: dict[int, int] = {}  # receive slot -> the call whose rows lie there and may be read
        self.lent: dict[int, tuple[int, int]] = {}  # output slot -> when it was lent (in calls started), and the call
        self.num_started = self.num_dispatches = self.num_combines = self.last_landed = 0
        self.has_left = False
        self.last: int | None = None  # the call not to begin
        consent_fail = self.consent.fail

        def fail(error: CrossdockError | str, *, first_void: int) -> None:
            epoch = self.consent.epoch
            self.failures.append((epoch, first_void))
            consent_fail(error, first_void=first_void)
            self.lent = {slot: lent for slot, lent in self.lent.items() if lent[1] < first_void}
            ocean.failed(rank, epoch, first_void)

        self.consent.fail = fail

    @property
    def has_room(self) -> bool:
        return len(self.calls) < self.num_slots and not self.has_left

    def is_ready(self) -> bool:
        """Whether a call may be started; False: it is told of the failure of a call that it has not waited for."""
        try:
            self.queue.check_room()
        except TransportError:
            return False
        return True

    def start(self, *, kind: Kind | None = None, signature: int = 0) -> None:
        if not self.is_ready():
            return
        sequence = self.consent.take()
        verb = self.ocean.program[sequence % 1000003 % len(self.ocean.program)]
        kind = kind or (Kind.DISPATCH if verb == "overflow" else Kind[verb.upper().replace(" ", "_")])
        signature = (sequence * 40503 & 0xFFFF) ^ signature
        if kind is Kind.COMBINE:
            slot, self.num_combines = self.num_combines % self.num_slots, self.num_combines + 1
            word = Word(kind, slot, self._outputs_for(sequence), signature)
        else:
            slot, self.num_dispatches = self.num_dispatches % self.num_slots, self.num_dispatches + 1
            word = Word(kind, slot, PUSHED, signature)
            self.held.pop(slot, None)
        self.num_started += 1
        if may_post := self.consent.may_post(sequence):
            self._post(sequence, word)
        run = self._overflow if verb == "overflow" else self._combine if kind is Kind.COMBINE else self._dispatch
        steps = run(sequence, word, may_post)
        self.calls.append((sequence, self.queue.start(kind, sequence, steps)))
        self.queue.drive()

    def step(self) -> Missing | None:
        return self.queue.drive()

    def retire(self) -> None:
        """What a user does with ``wait()`` once it would not wait."""
        while self.calls and self.calls[0][1].is_done:
            _, pending = self.calls.popleft()
            if pending.error is None:
                pending.wait()
            else:
                with pytest.raises((TransportError, ConfigError)):
                    pending.wait()

    def _post(self, sequence: int, word: Word) -> None:
        self.posted[sequence] = word
        if word.kind is not Kind.COMBINE:
            self.ocean.check_nobody_writes(self.rank, word.slot, sequence)
        self.consent.post(sequence, word)

    def _words(self, sequence: int, word: Word, is_posted: bool) -> Generator[Missing, None, list[Word]]:
        if not is_posted:
            yield from self.consent.opening(sequence)
            self._post(sequence, word)
        words = yield from self.consent.words(sequence, word)
        for peer, theirs in enumerate(self.ocean.ranks):
            assert theirs.posted.get(sequence) == words[peer], "a word of another call, or one that nobody gave"
        return words

    def _overflow(self, sequence: int, word: Word, is_posted: bool) -> Generator[Missing, None, Outcome[None]]:
        yield from self._words(sequence, word, is_posted)
        self.completed.add(sequence)
        return None, None

    def _dispatch(self, sequence: int, word: Word, is_posted: bool) -> Generator[Missing, None, Outcome[None]]:
        when = self.num_started
        words = yield from self._words(sequence, word, is_posted)
        for peer, theirs in enumerate(words):
            self.ocean.writers.add((self.rank, peer, theirs.slot, sequence))
        for peer, theirs in enumerate(words):
            yield Missing((), PREEMPTED)
            self.port.post(peer, "rows", theirs.slot, sequence)
        self.ocean.writers -= {writer for writer in self.ocean.writers if writer[0] == self.rank}
        self.consent.signal(sequence)
        yield from self.consent.arrivals(sequence, words, from_all=True)
        assert {self.port.load("rows", word.slot, peer) for peer in range(len(words))} == {sequence}
        self.held[word.slot] = sequence
        self.last_landed = when
        self.completed.add(sequence)
        return None, None

    def _combine(self, sequence: int, word: Word, is_posted: bool) -> Generator[Missing, None, Outcome[None]]:
        words = yield from self._words(sequence, word, is_posted)
        if word.output_slot == PUSHED:
            for peer, theirs in enumerate(words):
                yield Missing((), PREEMPTED)
                self.port.post(peer, "returned", theirs.slot, sequence)
            self.consent.signal(sequence)
        yield from self.consent.arrivals(sequence, words, from_all=False)
        terms = []
        for peer, theirs in enumerate(words):
            yield Missing((), PREEMPTED)
            pushed = theirs.output_slot == PUSHED
            terms.append(
                self.port.load(*(("returned", word.slot) if pushed else ("outputs", theirs.output_slot)), peer)
            )
        self.consent.check(sequence)
        assert set(terms) == {sequence}, "outputs of another call were summed"
        self.completed.add(sequence)
        return None, None

    def _outputs_for(self, sequence: int) -> int:
        """A slot to be pulled from, written for this call; a lent one is ours after a later dispatch, or when void."""
        slot = sequence % (self.num_slots + 1)
        if slot == self.num_slots or self.lent.get(slot, (-1,))[0] >= self.last_landed:
            return PUSHED
        self.lent[slot] = (self.num_started, sequence)
        for peer in range(self.port.num_ranks):
            self.port.post(peer, "outputs", slot, sequence)
        return slot


class Ocean:
    """All ranks, and what must never happen."""

    def __init__(
        self, num_ranks: int, *, num_slots: int = 2, first: int = FIRST, program: tuple[str, ...] = PROGRAMS[0]
    ) -> None:
        self.sea = Sea(num_ranks)
        self.program = program
        self.sea.on_row = self._check_row
        self.initiated: dict[int, list[int]] = {}  # by epoch: the first void calls of ranks that ended it by themselves
        self.writers: set[tuple[int, int, int, int]] = set()  # (writer, owner, slot, call)
        self.ranks: list[Rank] = []
        self.ranks = [Rank(self, rank, num_slots=num_slots, first=first) for rank in range(num_ranks)]

    def abort(self, rank: int) -> None:
        self.initiate(self.ranks[rank])
        self.ranks[rank].queue.abandon(f"rank {rank} had enough")

    def initiate(self, rank: Rank) -> None:
        oldest = next((sequence for sequence, pending in rank.calls if not pending.is_done), None)
        first_void = rank.consent.next_sequence if oldest is None else oldest
        self.initiated.setdefault(rank.consent.epoch, []).append(first_void)

    def expire(self, number: int) -> None:
        """The deadline of what the rank waits for, if it waits."""
        rank = self.ranks[number]
        while (missing := rank.step()) is not None and missing.what == PREEMPTED:
            pass
        if missing is not None:
            self.initiate(rank)
            rank.queue._timeout_s = 0
            late = next(pending for _, pending in rank.calls if not pending.is_done)
            rank.queue.drive(late)
            rank.queue.forget(late)
            rank.queue._timeout_s = 1

    def failed(self, rank: int, epoch: int, first_void: int) -> None:
        """A rank fails because one ended this epoch by itself, and not before the first call that is void there."""
        self.writers -= {writer for writer in self.writers if writer[0] == rank}
        assert epoch in self.initiated, f"rank {rank} ended epoch {epoch}, and no rank had a reason to"
        two_ahead = any((other.consent.epoch - epoch) % NUM_EPOCHS in range(2, 128) for other in self.ranks)
        if not two_ahead:  # else its reason has been overwritten, and to stop early is the safe side
            causes = self.initiated[epoch]
            assert any(first_void - cause & CALL_MASK < 2**31 for cause in causes), (
                f"{first_void:x} failed for {causes}"
            )

    def check_nobody_writes(self, owner: int, slot: int, sequence: int) -> None:
        for writer, their_owner, their_slot, theirs in self.writers:
            same = (their_owner, their_slot) == (owner, slot) and theirs >> EPOCH_SHIFT == sequence >> EPOCH_SHIFT
            assert not same, f"rank {owner} names slot {slot} while rank {writer} writes it in an earlier call"

    def _check_row(self, owner: int, slot: int, sequence: int) -> None:
        rank = self.ranks[owner]
        assert rank.held.get(slot, sequence) == sequence, "rows that may be read were written over"

    def settle(self) -> None:
        """Everybody goes on without new trouble: in a bounded number of steps all are in one epoch, in step."""
        for rank in self.ranks:
            rank.last = None
        goals = [len(rank.completed) + 3 for rank in self.ranks]
        self._run(lambda: all(len(rank.completed) >= goal for rank, goal in zip(self.ranks, goals, strict=True)))
        base = self.ranks[0].consent.next_sequence - 2**20  # call numbers wrap around
        last = max((rank.consent.next_sequence - base) & CALL_MASK for rank in self.ranks) + base & CALL_MASK
        num_failures = [len(rank.failures) for rank in self.ranks]
        for rank in self.ranks:
            rank.last = last
        self._run(lambda: all(rank.consent.next_sequence & CALL_MASK == last and not rank.calls for rank in self.ranks))
        assert len({rank.consent.next_sequence for rank in self.ranks}) == 1
        assert [len(rank.failures) for rank in self.ranks] == num_failures
        assert len({tuple(epoch for epoch, _ in rank.failures) for rank in self.ranks}) == 1

    def _run(self, is_done: Callable[[], bool]) -> None:
        for _ in range(300):
            for rank in self.ranks:
                rank.retire()
                if rank.has_room and rank.consent.next_sequence & CALL_MASK != rank.last:
                    rank.start()
                rank.step()
            for sender, receiver in self.sea.under_way:
                self.sea.deliver(sender, receiver, 3)
            if is_done():
                return
        pytest.fail(
            f"stuck: {[(hex(rank.consent.next_sequence), rank.failures[-2:], rank.step()) for rank in self.ranks]}"
        )

    def start_mismatch(self, number: int, how: str) -> None:
        """The rank begins another kind of call than the others will, or one with another signature."""
        rank = self.ranks[number]
        rank.retire()
        if rank.has_room and rank.is_ready():
            sequence = rank.consent.next_sequence
            self.initiated.setdefault(sequence >> EPOCH_SHIFT, []).append(sequence)
            rank.start(kind=Kind.COMBINE if how == "kind" else None, signature=1)

    def drift(self, rng: random.Random, *, num_events: int, trouble: float) -> None:
        """Ranks of different speed do something at random; a part of the events is trouble."""
        pace = [rng.random() for _ in self.ranks]
        for _ in range(num_events):
            rank, event = rng.choice(self.ranks), rng.random()
            if event < trouble:
                what = rng.choice([self.abort, self.expire, self.start_mismatch, self.start_mismatch])
                what(rank.rank, *([rng.choice(["kind", "signature"])] if what == self.start_mismatch else []))
            elif event < 0.35:
                rank.retire()
                if rank.has_room:
                    rank.start()
            elif event < 0.7:
                for _ in range(rng.randint(1, 8) if rng.random() < pace[rank.rank] else 0):
                    rank.step()
            else:
                self.sea.deliver(*rng.choice(list(self.sea.under_way)), rng.randint(1, 12))
