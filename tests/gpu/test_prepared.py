"""Prepared calls on GPUs: between others, on several streams, in graphs, with overflows that kernels find."""

import pytest
import torch

from crossdock import Compact
from tests.cases import make_case, same_bits
from tests.world import open_buffer
from tests.worlds.test_prepared import check_alternating, check_overflow, layouts, spec_of


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("reduce", ["token", "rank"])
@layouts
def test_ranks_differ_in_which_calls_are_prepared(world, layout, reduce):
    check_alternating(world, layout, reduce)


@pytest.mark.worlds("cuda-2")
def test_an_overflow_is_raised_by_a_prepared_call(world):
    check_overflow(world)


def on_streams(group, case):
    """The same round trips eagerly, on other streams in turn, and in a graph between eager ones."""
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        x, topk = case.x[r], case.topk[r]

        def trip():
            recv = buffer.dispatch(x, topk, rows="capacity")
            return buffer.combine(recv.output_rows().copy_(recv.x), recv.plan)

        want = trip().clone()
        streams = [torch.cuda.Stream() for _ in range(2)]
        seen = []
        for i in range(6):
            with torch.cuda.stream(streams[i % 2]):
                streams[i % 2].wait_stream(torch.cuda.default_stream())
                seen.append(trip().clone())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = trip()
        for _ in range(3):
            graph.replay()
            seen.append(captured.clone())
            seen.append(trip().clone())
        torch.cuda.synchronize()
        buffer.check()
        return [same_bits(got, want) for got in seen]


@pytest.mark.worlds("cuda-2")
def test_prepared_calls_change_streams_and_follow_replays(world):
    case = make_case(spec_of(Compact(), reduce="rank"), [6, 5])
    assert world.run(on_streams, case) == [[True] * 12] * 2
