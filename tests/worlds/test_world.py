"""The worlds that the other tests run in."""

import os
import time

import pytest
import torch

import crossdock
from crossdock import Buffer, Spec
from tests.world import WorkerLost


def ranks(group, offset):
    return group.rank() + offset if callable(group.rank) else group.rank + offset


def fail_on_last(group):
    spec = Spec(num_experts=8, num_topk=1, hidden=4, max_tokens=2)
    with Buffer(group, spec) as buffer:
        if buffer.rank == buffer.topology.num_ranks - 1:
            raise KeyError("mine")
        buffer.dispatch(torch.ones(2, 4, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64))


def die_on_last(group):
    spec = Spec(num_experts=8, num_topk=1, hidden=4, max_tokens=2)
    buffer = Buffer(group, spec)
    if buffer.rank == buffer.topology.num_ranks - 1:
        os._exit(7)
    buffer.dispatch(torch.ones(2, 4, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64))


def uninitialised(_):
    return [torch.empty(64, dtype=dtype) for dtype in DTYPES]


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.uint8)


@pytest.mark.worlds("inproc-1", "inproc-2", "inproc-4", "inproc-8", "processes-2", "processes-4")
def test_gives_results_by_rank(world):
    assert world.run(ranks, 10) == [10 + rank for rank in range(world.num_ranks)]


@pytest.mark.worlds("inproc-2", "processes-2")
def test_raises_a_ranks_own_error_and_keeps_the_others(world):
    with pytest.raises(KeyError, match="mine"):
        world.run(fail_on_last)
    first, last = world.outcomes(fail_on_last)
    assert isinstance(first, crossdock.PeerFailed)
    assert (first.rank, first.reason) == (1, "KeyError: 'mine'")
    assert isinstance(last, KeyError)


def fail_after(group, seconds):
    rank = group.rank() if callable(group.rank) else group.rank
    time.sleep(seconds[rank])
    raise AssertionError(f"rank {rank}")


@pytest.mark.worlds("inproc-2", "processes-2")
def test_raises_what_came_first(world):
    with pytest.raises(AssertionError, match="rank 1"):
        world.run(fail_after, (0.3, 0))


@pytest.mark.worlds("processes-2")
def test_a_process_that_ends_is_an_outcome_and_is_replaced(world):
    survivor, lost = world.outcomes(die_on_last)
    assert isinstance(survivor, crossdock.PeerTimeout)  # by the lock that its process held: the deadline is later
    assert isinstance(lost, WorkerLost)
    assert "exit code 7" in str(lost)
    assert world.run(ranks, 0) == [0, 1]


@pytest.mark.worlds("inproc-1", "processes-2")
def test_memory_nobody_wrote_to_shows(world):
    for tensors in world.run(uninitialised):
        for tensor in tensors:
            if tensor.is_floating_point():
                assert tensor.float().isnan().all(), tensor.dtype
            else:
                assert (tensor == torch.iinfo(tensor.dtype).max).all(), tensor.dtype
