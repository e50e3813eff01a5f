"""A connection's memory, of which more or none is wanted later, on GPUs."""

import pytest
import torch

from crossdock import Buffer, NotSupported
from tests.world import open_connection
from tests.worlds.test_connection import SPECS, A, cases_of, check_moved, move_on_a_device, need


@pytest.mark.worlds("cuda-2", "cuda-4", "cudathreads-2")
def test_other_memory_takes_the_place_of_the_one_there_is(world):
    cases = cases_of(world)
    check_moved(cases, world.run(move_on_a_device, cases, need(world.num_ranks, *SPECS)))


def sleep(group, case, num_bytes):
    """Bytes that are free on the device: with the memory, without it, and with it again; and what a graph forbids."""
    with open_connection(group, num_bytes, max_experts=64) as connection:
        buffer, r = Buffer(connection, A), connection.rank
        free = []
        for change in (connection.check, connection.release, connection.reacquire):
            change()
            torch.cuda.synchronize()
            connection.gather(None)
            free.append(torch.cuda.mem_get_info()[0])
            connection.gather(None)
        recv = buffer.dispatch(case.x[r], case.topk[r])
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            buffer.combine(case.y[r], recv.plan)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # the stream that calls are on already
            out = buffer.combine(case.y[r], recv.plan)
        with pytest.raises(NotSupported, match="captured in a CUDA graph"):
            connection.reserve(2 * num_bytes)
        graph.replay()
        return free, out


@pytest.mark.worlds("cuda-2")
def test_memory_is_given_back_and_taken_again_but_not_from_under_a_graph(world):
    case = cases_of(world)[0]
    num_bytes = 256 << 20
    for free, _ in world.run(sleep, case, num_bytes):
        assert free[1] - free[0] > 0.9 * num_bytes
        assert free[1] - free[2] > 0.9 * num_bytes
