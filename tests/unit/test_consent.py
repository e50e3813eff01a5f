"""Words, sequence numbers, flags: what must hold in any order of events, and the orders in which it once did not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from crossdock.consent import (
    EPOCH_SHIFT,
    PAYLOAD_MASK,
    PUSHED,
    SEQUENCE_MASK,
    WORD_BITS,
    WORD_MASK,
    Kind,
    Word,
    stamped,
    stamped_word,
)
from crossdock.errors import ConfigError, PeerFailed, PeerTimeout
from tests.unit.ocean import FIRST, FIRSTS, PREEMPTED, PROGRAMS, Ocean, Rank


class Protocol(RuleBasedStateMachine):
    """Any interleaving of calls, steps, deliveries, failures and deadlines."""

    @initialize(
        num_ranks=st.integers(2, 4),
        num_slots=st.integers(1, 3),
        first=st.sampled_from(FIRSTS),
        program=st.sampled_from(PROGRAMS),
    )
    def set_up(self, num_ranks: int, num_slots: int, first: int, program: tuple[str, ...]) -> None:
        self.ocean = Ocean(num_ranks, num_slots=num_slots, first=first, program=program)

    def rank(self, number: int) -> Rank:
        return self.ocean.ranks[number % len(self.ocean.ranks)]

    @rule(number=st.integers(0, 3), num_calls=st.integers(1, 3))
    def start(self, number: int, num_calls: int) -> None:
        for _ in range(num_calls):
            self.rank(number).retire()
            if self.rank(number).has_room:
                self.rank(number).start()

    @rule(number=st.integers(0, 3), num_steps=st.integers(1, 12))
    def step(self, number: int, num_steps: int) -> None:
        for _ in range(num_steps):
            self.rank(number).step()

    @rule(sender=st.integers(0, 3), receiver=st.integers(0, 3), num_writes=st.integers(1, 20))
    def deliver(self, sender: int, receiver: int, num_writes: int) -> None:
        self.ocean.sea.deliver(self.rank(sender).rank, self.rank(receiver).rank, num_writes)

    @rule(number=st.integers(0, 3), num_steps=st.integers(1, 12))
    def deliver_to(self, number: int, num_steps: int) -> None:
        for sender in self.ocean.ranks:
            self.ocean.sea.deliver(sender.rank, self.rank(number).rank, 100)
        self.step(number, num_steps)

    @rule(number=st.integers(0, 3))
    def abort(self, number: int) -> None:
        self.ocean.abort(self.rank(number).rank)

    @rule(number=st.integers(0, 3))
    def expire(self, number: int) -> None:
        self.ocean.expire(self.rank(number).rank)

    @rule(number=st.integers(0, 3), how=st.sampled_from(["kind", "signature"]))
    def mismatch(self, number: int, how: str) -> None:
        self.ocean.start_mismatch(self.rank(number).rank, how)

    @invariant()
    def no_rank_is_ahead_of_a_word(self) -> None:
        if hasattr(self, "ocean"):
            for rank in self.ocean.ranks:
                for sequence in rank.completed:
                    assert all(sequence in other.posted for other in self.ocean.ranks)

    def teardown(self) -> None:
        if hasattr(self, "ocean"):
            self.ocean.settle()


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=300, stateful_step_count=60)


@pytest.mark.parametrize("trouble", [0, 0.02, 0.1])
def test_ranks_that_drift_apart_never_mistake_a_word_and_come_together_again(trouble):
    for seed in range(300):
        rng = random.Random(seed)  # noqa: S311 (no secret)
        ocean = Ocean(
            rng.randint(2, 4), num_slots=rng.randint(1, 3), first=rng.choice(FIRSTS), program=rng.choice(PROGRAMS)
        )
        ocean.drift(rng, num_events=150, trouble=trouble)
        ocean.settle()


def deliver_all(ocean: Ocean, sender: int, receiver: int) -> None:
    ocean.sea.deliver(sender, receiver, 1000)


def errors(rank: Rank) -> list[BaseException | None]:
    return [pending.error for _, pending in rank.calls]


@given(
    st.integers(0, SEQUENCE_MASK),
    st.sampled_from(Kind),
    st.integers(0, 7),
    st.integers(0, 7),
    st.integers(0, 2**32 - 1),
)
def test_a_stamped_word_comes_back(sequence, kind, slot, output_slot, signature):
    word = Word(kind, slot, output_slot, signature)
    value = stamped_word(sequence, word.payload)
    assert -(2**63) <= value < 2**63
    assert value >> WORD_BITS & 0xFFFFFF == (sequence >> EPOCH_SHIFT) << 16 | sequence & 0xFFFF
    assert Word.of(value & WORD_MASK) == word


def test_a_literal_word():
    assert Word(Kind.COMBINE, slot=1, output_slot=PUSHED, signature=0xBEEF).payload == 0b11_001_111 << 32 | 0xBEEF
    assert stamped_word(SEQUENCE_MASK, WORD_MASK) == stamped(SEQUENCE_MASK, PAYLOAD_MASK) == -1


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("num_slots", [1, 2, 3, 6])
def test_nobody_fails_when_nobody_gives_up(num_slots, program, first):
    ocean = Ocean(3, num_slots=num_slots, first=first, program=program)
    for _ in range(6):
        ocean.settle()
    assert not any(rank.failures for rank in ocean.ranks)


def test_the_furthest_that_a_rank_can_be_ahead_overwrites_no_word():
    ocean = Ocean(2, num_slots=2, program=("overflow",))
    ahead, behind = ocean.ranks
    for rank in (ahead, behind):
        rank.start()
        rank.start()
    deliver_all(ocean, 1, 0)
    ahead.step()
    ahead.retire()
    ahead.start()
    ahead.start()
    with pytest.raises(ConfigError, match="num_slots=2"):
        ahead.start()
    deliver_all(ocean, 0, 1)
    assert behind.step() is None
    assert errors(behind) == [None, None]


@pytest.mark.parametrize("num_started", [1, 2])
def test_what_completed_at_the_rank_that_then_gives_up_completes_at_the_others(num_started):
    """Its new epoch's words must not take the place of those that a rank behind has still to read."""
    ocean = Ocean(2, num_slots=2, program=("overflow",))
    ahead, behind = ocean.ranks
    ahead.start()
    for _ in range(num_started):
        behind.start()
    deliver_all(ocean, 1, 0)
    ahead.step()
    ahead.retire()
    ocean.abort(0)
    ahead.start()
    deliver_all(ocean, 0, 1)
    behind.step()
    assert [pending.is_done for _, pending in behind.calls] == [True] * num_started, "stuck until the deadline"
    assert [type(error) for error in errors(behind)] == [type(None), PeerFailed][:num_started]
    ocean.settle()


def test_a_rank_that_gives_up_twice_does_not_leave_the_others_waiting():
    ocean = Ocean(3)
    ocean.ranks[1].start()
    ocean.abort(0)
    ocean.abort(0)
    ocean.ranks[0].start()
    ocean.settle()
    assert [epoch for epoch, _ in ocean.ranks[2].failures] == [1, 2]


@pytest.mark.parametrize(("how", "what"), [("kind", "while rank"), ("signature", "differs from that of rank")])
def test_every_rank_finds_a_mismatch(how, what):
    ocean = Ocean(4)
    ocean.initiated[1] = [FIRST]
    for rank in ocean.ranks:
        if rank.rank == 2:
            rank.start(kind=Kind.COMBINE if how == "kind" else None, signature=1)
        else:
            rank.start()
    for sender, receiver in ocean.sea.under_way:
        deliver_all(ocean, sender, receiver)
    for rank in ocean.ranks:
        rank.step()
        (error,) = errors(rank)
        assert isinstance(error, PeerFailed)
        assert what in error.reason
    assert len({rank.consent.next_sequence for rank in ocean.ranks}) == 1
    ocean.settle()


def test_the_culprit_and_the_reason_are_passed_on():
    ocean = Ocean(3)
    slow, impatient, third = ocean.ranks
    impatient.start()
    third.start()
    deliver_all(ocean, 2, 1)
    ocean.expire(1)
    slow.start()
    deliver_all(ocean, 1, 2)
    deliver_all(ocean, 1, 0)
    deliver_all(ocean, 0, 2)
    deliver_all(ocean, 2, 0)
    for rank in (third, slow):
        while (missing := rank.step()) is not None and missing.what == PREEMPTED:
            pass
        (error,) = errors(rank)
        assert isinstance(error, PeerTimeout)
        assert error.rank == slow.rank
        assert "rank 0 did not begin" in str(error)
    ocean.settle()


def test_a_rank_that_gave_up_is_heard_while_another_is_missing():
    ocean = Ocean(3)
    _, quitter, waiting = ocean.ranks
    quitter.start()
    waiting.start()
    deliver_all(ocean, 1, 2)
    ocean.abort(1)
    deliver_all(ocean, 1, 2)
    waiting.step()
    (error,) = errors(waiting)
    assert isinstance(error, PeerFailed), "it waits for rank 0, in a call that rank 1 has ended"
    ocean.settle()


def test_concurrent_failures_end_one_epoch():
    ocean = Ocean(4)
    for rank in ocean.ranks:
        rank.start()
    for rank in (0, 3):
        ocean.abort(rank)
    ocean.settle()
    assert [[epoch for epoch, _ in rank.failures] for rank in ocean.ranks] == [[1]] * 4


def test_a_rank_that_leaves_lets_the_call_before_complete_and_fails_the_next():
    ocean = Ocean(2, program=("overflow",))
    leaver, other = ocean.ranks
    leaver.start()
    other.start()
    deliver_all(ocean, 1, 0)
    assert leaver.step() is None
    leaver.consent.leave()
    deliver_all(ocean, 0, 1)
    assert other.step() is None
    assert errors(other) == [None]
    ocean.initiated[1] = [FIRST + 1]
    for _ in range(2):
        other.retire()
        other.start()
        (error,) = errors(other)
        assert isinstance(error, PeerFailed)
        assert error.rank == leaver.rank
        assert "closed" in error.reason
        ocean.initiated[2] = [2 << EPOCH_SHIFT]
