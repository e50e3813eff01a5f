"""Ranks that have begun different numbers of calls find back by themselves, or by restart(); on CUDA's backend too."""

import time
from dataclasses import replace

import pytest
import torch

from crossdock import Buffer, ConfigError, CrossdockError, Expanded, Fp32, PeerFailed, PeerTimeout, Spec, run_local
from tests.world import meet, open_buffer

NUM_STEPS = 6
TOPK = torch.tensor([[0, 3], [1, 2]])


def spec_of(num_ranks):
    return Spec(
        num_experts=6 * num_ranks, num_topk=2, hidden=4, max_tokens=4, wire=Fp32(), layout=Expanded(), num_slots=2
    )


def step(buffer, number=1.0):
    recv = buffer.dispatch(torch.full((2, 4), float(number)), TOPK)
    out = buffer.combine(recv.x.clone(), recv.plan)[:, 0].tolist()
    buffer.check()
    return "right" if out == [2.0 * number] * 2 else str(out)


def read_a_file():
    raise OSError("a file could not be read")


def miss_a_step(group, spec, trouble, answer):
    """Rank 0's program leaves step 1 out, or a part of it, or does it twice, and all catch what comes of it."""
    log = []
    with Buffer(group, spec, timeout_s=0.5) as buffer:
        for number in range(NUM_STEPS):
            is_in_trouble = number == 1 and buffer.rank == 0
            try:
                if is_in_trouble and trouble == "leave out":
                    read_a_file()
                said = step(buffer, number)
                if is_in_trouble and trouble == "leave":
                    buffer.dispatch(torch.ones(2, 4), TOPK)
                elif is_in_trouble and trouble == "repeat":
                    step(buffer, number)
                log.append(said)
            except (OSError, CrossdockError) as error:
                log.append(type(error).__name__)
                if answer == "reset":
                    buffer.reset()
                elif answer == "abort by all" or (answer == "abort by one" and isinstance(error, OSError)):
                    buffer.abort(str(error))
            meet(group)  # the next step begins together
    return log


@pytest.mark.worlds("inproc-2", "inproc-3", "processes-2")
@pytest.mark.parametrize("trouble", ["leave out", "leave", "repeat"])
@pytest.mark.parametrize("answer", ["nothing", "reset", "abort by all", "abort by one"])
def test_ranks_that_are_a_step_apart_find_back_two_steps_later(world, trouble, answer):
    for log in world.run(miss_a_step, spec_of(world.num_ranks), trouble, answer):
        assert log[0] == "right"
        assert log[-2:] == ["right", "right"], log
        if answer == "abort by one" and trouble == "leave out":
            assert log[2:] == ["right"] * 4, log


def restart_after(group, spec, num_times):
    """Rank 0 restarts, in a call or without one; the others are in a call, are told, and come too."""
    log = []
    with open_buffer(group, spec) as buffer:
        log.append(step(buffer))
        old = buffer.dispatch(torch.ones(2, 4), TOPK, copy=True)
        for number in range(num_times):
            if buffer.rank == 0:
                if number % 2:
                    buffer.dispatch_start(torch.ones(2, 4), TOPK)
                buffer.restart()
            else:
                with pytest.raises(PeerFailed, match=r"call restart\(\) on all ranks"):
                    step(buffer)
                buffer.restart()
            log.append(step(buffer, number + 2))
        for _ in range(2):
            buffer.restart()  # again, and for nothing
        out = buffer.combine(torch.ones(old.x.shape, device=old.x.device), old.plan)
        log.append("right" if out[:, 0].tolist() == [2.0, 2.0] else str(out))
    return log


@pytest.mark.worlds("inproc-1", "inproc-2", "inproc-4", "processes-2", "interpreted-2", "interpreted-3")
def test_all_restart_and_the_next_call_works_and_plans_stay_valid(world):
    num_times = 0 if world.num_ranks == 1 else 2 if world.kind == "interpreted" else 4
    for log in world.run(restart_after, spec_of(world.num_ranks), num_times):
        assert log == ["right"] * (2 + num_times)


def restart_and_leave(group, spec, num_times):
    for _ in range(num_times):
        with open_buffer(group, spec) as buffer:
            buffer.restart()
        meet(group)


@pytest.mark.worlds("inproc-2", "inproc-4", "processes-2", "grid-2x2")
def test_ranks_that_have_restarted_may_leave(world):
    """While others have yet to see that all have met: one that has left by then has said so before."""
    spec = replace(spec_of(world.num_ranks), reduce="node")
    world.run(restart_and_leave, spec, 40 if world.kind == "inproc" else 10)


def restart_without_one(group, spec):
    with Buffer(group, spec, timeout_s=0.5) as buffer:
        step(buffer)
        texts = []
        for _ in range(2):
            if buffer.rank != 1:
                with pytest.raises(PeerTimeout) as caught:
                    buffer.restart()
                texts.append((caught.value.rank, str(caught.value)))
            meet(group)
        buffer._queue._timeout_s = 20
        buffer.restart()
        return texts, step(buffer, 3)


@pytest.mark.worlds("inproc-3", "processes-4")
def test_a_rank_that_does_not_come_to_a_restart_is_a_timeout_of_all_others(world):
    for rank, (texts, said) in enumerate(world.run(restart_without_one, spec_of(world.num_ranks))):
        assert said == "right"
        assert len(texts) == (0 if rank == 1 else 2)
        for culprit, text in texts:
            assert culprit == 1
            assert "rank 1 did not come to this restart within timeout_s=0.5" in text


def restart_when_one_is_gone(group, spec):
    buffer = Buffer(group, spec, timeout_s=20)
    step(buffer)
    if buffer.rank == 1:
        buffer.close()
        return []
    began, log = time.monotonic(), []
    with pytest.raises(PeerFailed, match="it has closed its buffer"):
        buffer.restart()
    took = time.monotonic() - began
    buffer.mask(1)
    log.append(step_of_the_left(buffer))
    buffer.restart()  # among those that are left
    log.append(step_of_the_left(buffer))
    buffer.close()
    return [took, *log]


def step_of_the_left(buffer):
    recv = buffer.dispatch(torch.ones(2, 4), TOPK)
    return buffer.combine(recv.x.clone(), recv.plan)[:, 0].tolist()


@pytest.mark.worlds("inproc-3")
def test_a_restart_names_a_rank_that_has_left_and_works_among_those_that_are_left(world):
    outcomes = world.run(restart_when_one_is_gone, spec_of(3))
    assert outcomes[1] == []
    for took, *outs in (outcomes[0], outcomes[2]):
        assert took < 10
        assert outs == [[2.0, 2.0], [2.0, 2.0]]  # experts 0 to 3 are rank 0's


def test_restart_of_a_closed_buffer_says_so():
    def program(group):
        buffer = Buffer(group, spec_of(1))
        buffer.close()
        with pytest.raises(ConfigError, match="closed"):
            buffer.restart()

    run_local(program, 1)
