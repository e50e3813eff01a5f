"""Ranks whose programs leave out, repeat, interrupt or give up calls, in any order of events: they find back.

A program here is steps that all ranks begin together, a dispatch and a combine each, and catches every error. Deadlines
expire where nothing else can happen any more.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from crossdock.backends.base import Outcome
from crossdock.consent import CALL_MASK, Kind, Missing, Steps
from crossdock.errors import CrossdockError, PeerFailed, PeerTimeout
from crossdock.pending import Pending
from tests.unit.ocean import FIRSTS, PREEMPTED, Ocean, Rank

STEP = (Kind.DISPATCH, Kind.COMBINE)
TROUBLES = ("leave out", "leave", "repeat", "abort", "abort in flight", "interrupt", "restart")
ANSWERS = ("nothing", "abort", "reset")
"""What a program does when a call has failed."""


@dataclass
class Part:
    """A rank's part in a step."""

    rank: Rank
    calls: list[Kind]
    trouble: str | None
    answer: str
    under_way: Pending | None = None
    error: CrossdockError | None = None
    is_done: bool = False
    ends_by: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.trouble == "leave out":
            self.calls = []
        elif self.trouble == "leave":
            self.calls = self.calls[:1]
        elif self.trouble == "repeat":
            self.calls = self.calls * 2
        elif self.trouble in ("abort", "abort in flight", "interrupt"):
            self.ends_by = self.trouble

    def go_on(self) -> None:
        """As far as it gets without a peer."""
        while not self.is_done:
            if self.under_way is not None:
                if self.rank.step() is not None or not self.under_way.is_done:
                    return
                self.error = self.under_way.error
                self.under_way = None
                self.rank.retire()
            if self.error is not None:
                self._give_answer()
            elif not self.calls:
                self._end()
            else:
                self._begin(self.calls.pop(0))

    def _begin(self, kind: Kind) -> None:
        assert self.rank.is_ready(), "every failure of this program has been raised"
        self.rank.start(kind=kind)
        _, self.under_way = self.rank.calls[-1]
        if self.ends_by in ("abort in flight", "interrupt"):
            if self.ends_by == "interrupt":
                self.rank.queue.left_by(KeyboardInterrupt())
            else:
                self.rank.queue.abandon("had enough")
            self.under_way = None
            self.rank.retire()
            self.is_done = True

    def _give_answer(self) -> None:
        if self.answer == "abort":
            self.rank.queue.abandon(str(self.error))
        elif self.answer == "reset":
            self.rank.queue.reset()
        self.is_done = True

    def _end(self) -> None:
        if self.ends_by == "abort":
            self.rank.queue.abandon("had enough")
        self.is_done = True


class World:
    """A world of programs, one step after the other."""

    def __init__(self, rng: random.Random, num_ranks: int) -> None:
        self.rng = rng
        self.ocean = Ocean(num_ranks, num_slots=rng.randint(1, 3), first=rng.choice(FIRSTS))
        self.ocean.failed = lambda *_: None  # this program knows better why ranks fail
        self.answer = rng.choice(ANSWERS)

    def play(self, troubles: dict[int, str]) -> list[CrossdockError | None]:
        """A step that begins together, which is to see what was written before; with which error it ended, by rank."""
        for link in self.ocean.sea.under_way:
            self.ocean.sea.deliver(*link, 1000)
        parts = [Part(rank, list(STEP), troubles.get(rank.rank), self.answer) for rank in self.ocean.ranks]
        before = [set(rank.completed) for rank in self.ocean.ranks]
        for part in parts:
            if part.trouble == "restart":
                part.calls, part.under_way = [], restart(part.rank)
        self._run(parts)
        for part in parts:
            if part.trouble == "restart" and part.error is None:
                begin(part.rank)
        new = [rank.completed - old for rank, old in zip(self.ocean.ranks, before, strict=True)]
        for rank, calls in enumerate(new):
            assert not any(calls & old for old in before[:rank] + before[rank + 1 :]), "a call of an earlier step"
        return [part.error for part in parts]

    def _run(self, parts: list[Part]) -> None:
        sea, idle = self.ocean.sea, 0
        for _ in range(20_000):
            if all(part.is_done for part in parts):
                return
            links = [link for link, writes in sea.under_way.items() if writes]
            if links and self.rng.random() < 0.5:
                sea.deliver(*self.rng.choice(links), self.rng.randint(1, 12))
                idle = 0
                continue
            self.rng.choice(parts).go_on()
            idle = 0 if links else idle + 1
            if idle > 30 * len(parts):
                self._expire(self.rng.choice([part for part in parts if not part.is_done]))
                idle = 0
        pytest.fail(f"stuck: {[(part.trouble, part.is_done, part.rank.step()) for part in parts]}")

    def _expire(self, part: Part) -> None:
        missing = part.rank.step()
        while missing is not None and missing.what == PREEMPTED:
            missing = part.rank.step()
        if missing is not None:
            part.rank.queue._timeout_s = 0
            part.rank.queue.drive(part.under_way)
            part.rank.queue.forget(part.under_way)
            part.rank.queue._timeout_s = 1


def restart(rank: Rank) -> Pending:
    """What ``Connection.restart`` does, up to where it waits."""
    rank.queue.give_up("it restarts")
    rank.calls.clear()
    rank.meeting = rank.queue.start("restart", rank.consent.next_sequence, meet(rank))
    return rank.meeting


def meet(rank: Rank) -> Steps[Outcome[int]]:
    num_ended = yield from rank.consent.meet()
    return num_ended, None


def begin(rank: Rank) -> None:
    rank.consent.begin(rank.meeting.wait())


def draw(rng: random.Random, num_ranks: int) -> dict[int, str]:
    """Trouble of one rank, or of several, of one kind or of different ones."""
    ranks = rng.sample(range(num_ranks), rng.randint(1, num_ranks))
    return {rank: rng.choice(TROUBLES) for rank in ranks}


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_three_steps_after_the_last_trouble_all_steps_work(num_ranks):
    """One in which it shows, one in which it shows at those that had left calls out, and one more, at the latest."""
    for seed in range(250):
        rng = random.Random(1000 * num_ranks + seed)  # noqa: S311 (no secret)
        steps = World(rng, num_ranks)
        for _ in range(rng.randint(1, 6)):
            steps.play(draw(rng, num_ranks) if rng.random() < 0.7 else {})
        late = [steps.play({}) for _ in range(3)]
        for _ in range(2):
            errors = steps.play({})
            assert errors == [None] * num_ranks, (seed, late, errors)
        assert len({rank.consent.next_sequence for rank in steps.ocean.ranks}) == 1


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_the_next_step_works_once_each_rank_has_raised(num_ranks, trouble):
    for seed in range(40):
        rng = random.Random(seed)  # noqa: S311 (no secret)
        steps = World(rng, num_ranks)
        steps.play({})
        raised: set[int] = {0} if trouble in ("abort", "abort in flight", "interrupt", "restart") else set()
        log, num_after = [steps.play({0: trouble})], 0
        for _ in range(6):
            raised |= {rank for rank, error in enumerate(log[-1]) if error is not None}
            if len(raised) == num_ranks:
                num_after += 1
            log.append(steps.play({}))
        assert num_after >= 3, (seed, log)
        assert log[-num_after:] == [[None] * num_ranks] * num_after, (seed, log)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_restart_by_all_ends_all_trouble_at_once(num_ranks):
    for seed in range(100):
        rng = random.Random(seed)  # noqa: S311 (no secret)
        steps = World(rng, num_ranks)
        for _ in range(rng.randint(0, 5)):
            steps.play(draw(rng, num_ranks))
        for _ in range(rng.randint(1, 3)):
            assert steps.play(dict.fromkeys(range(num_ranks), "restart")) == [None] * num_ranks
        for _ in range(2):
            assert steps.play({}) == [None] * num_ranks
        assert len({rank.consent.next_sequence for rank in steps.ocean.ranks}) == 1


def test_a_rank_that_does_not_restart_is_a_timeout_of_all_that_do_and_they_may_try_again():
    for seed in range(50):
        rng = random.Random(seed)  # noqa: S311 (no secret)
        steps = World(rng, 3)
        for _ in range(rng.randint(0, 3)):
            steps.play(draw(rng, 3))
        for _ in range(rng.randint(1, 3)):
            absent, *others = steps.play({1: "restart", 2: "restart", 0: "leave out"})
            assert absent is None
            for error in others:
                assert isinstance(error, PeerTimeout)
                assert error.rank == 0
        assert steps.play(dict.fromkeys(range(3), "restart")) == [None] * 3
        assert steps.play({}) == [None] * 3


def test_a_rank_in_a_call_is_told_of_a_restart_and_may_join():
    for seed in range(50):
        rng = random.Random(seed)  # noqa: S311 (no secret)
        steps = World(rng, 2)
        steps.play({})
        first, second = steps.ocean.ranks
        first.start(kind=Kind.DISPATCH)
        _, pending = first.calls[-1]
        under_way = restart(second)
        for _ in range(200):
            steps.ocean.sea.deliver(*rng.choice(list(steps.ocean.sea.under_way)), 3)
            first.step()
            second.step()
        assert isinstance(pending.error, PeerFailed)
        assert "restarts" in pending.error.reason
        assert not under_way.is_done
        first.retire()
        parts = [Part(rank, [], None, "nothing", call) for rank, call in ((first, restart(first)), (second, under_way))]
        steps._run(parts)
        assert [part.error for part in parts] == [None, None]
        for rank in (first, second):
            begin(rank)
        assert steps.play({}) == [None, None]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_restarts_one_behind_the_other_meet_one_by_one(num_ranks):
    """A rank that has met begins the next at once, and others see that before they see the end of the first."""
    for seed in range(100):
        rng = random.Random(seed)  # noqa: S311 (no secret)
        world = World(rng, num_ranks)
        left = [4] * num_ranks
        under_way = [restart(rank) for rank in world.ocean.ranks]
        for _ in range(5000):
            links = [link for link, writes in world.ocean.sea.under_way.items() if writes]
            if links and rng.random() < 0.5:
                world.ocean.sea.deliver(*rng.choice(links), rng.randint(1, 3))
                continue
            rank = rng.choice(world.ocean.ranks)
            if left[rank.rank] and rank.step() is None and under_way[rank.rank].is_done:
                begin(rank)
                left[rank.rank] -= 1
                if left[rank.rank]:
                    under_way[rank.rank] = restart(rank)
            if not any(left):
                break
        assert left == [0] * num_ranks
        assert world.play({}) == [None] * num_ranks


def test_numbers_that_are_far_apart_meet():
    steps = World(random.Random(0), 2)  # noqa: S311
    first, _ = steps.ocean.ranks
    for _ in range(700):
        first.queue.abandon("had enough")
    assert steps.play({0: "restart", 1: "restart"}) == [None, None]
    assert steps.play({}) == [None, None]
    assert first.consent.num_ended > 700
    assert first.consent.next_sequence & CALL_MASK == len(STEP)


def test_missing_names_who_has_not_come():
    steps = World(random.Random(0), 3)  # noqa: S311
    under_way = restart(steps.ocean.ranks[1])
    assert steps.ocean.ranks[1].step() == Missing([0, 2], "come to")
    assert not under_way.is_done
