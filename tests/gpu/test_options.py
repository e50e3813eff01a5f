"""Opaque rows, tensors that the caller brings, and rows that the caller names, on GPUs: programs of the CPU tests."""

import pytest
import torch

from crossdock import Compact, Counters, Expanded, Fp32, Padded
from tests import oracle
from tests.cases import loads, make_case, same_bits
from tests.gpu.specs import spec_of
from tests.world import device, open_buffer
from tests.worlds import test_combine, test_opaque, test_received, test_stats

two_ranks = pytest.mark.worlds("cuda-2")


@two_ranks
@pytest.mark.parametrize("name", test_opaque.WIRES)
@pytest.mark.parametrize("layout", test_opaque.LAYOUTS, ids=repr)
def test_every_bit_of_opaque_rows_arrives(world, layout, name):
    spec = test_opaque.spec_of(layout, test_opaque.WIRES[name], hidden=26)
    test_opaque.check_each(world, loads(spec, world.num_ranks)[:4])


@two_ranks
@pytest.mark.parametrize("layout", [Compact(), Padded()], ids=repr)
def test_started_sums_are_written_where_the_caller_wants_them(world, layout):
    test_combine.check_into(world, layout)


@two_ranks
@pytest.mark.parametrize("layout", [Expanded(alignment=4), Padded()], ids=repr)
def test_sums_are_of_the_rows_that_the_caller_names(world, layout):
    test_combine.check_other_rows(world, layout)


@two_ranks
@pytest.mark.parametrize("layout", [Compact(), Padded()], ids=repr)
def test_calls_count_in_the_callers_tensors(world, layout):
    test_stats.check_counted(world, layout, torch.int32)


@two_ranks
@pytest.mark.parametrize("layout", test_received.LAYOUTS, ids=repr)
def test_a_copy_has_the_rows_that_came_and_touches_no_others(world, layout):
    test_received.check_copies(world, layout)


def count_in_replays(group, case, num_replays):
    """Captured once with tensors of ours to count in, and to sum into."""
    with open_buffer(group, case.spec) as buffer:
        r, spec = buffer.rank, case.spec
        x, topk_idx = case.x[r].clone(), case.topk[r].clone()
        tokens = torch.zeros(spec.num_experts // buffer.topology.num_ranks, dtype=torch.int32, device=device())
        waits = torch.zeros(buffer.topology.num_ranks, dtype=torch.int64, device=device())
        out = torch.zeros(x.shape[0], spec.hidden, dtype=spec.combine_dtype, device=device())

        def step():
            recv = buffer.dispatch(x, topk_idx, rows="capacity", counters=Counters(tokens, waits))
            y = recv.output_rows().copy_(recv.x)
            buffer.combine(y, recv.plan, out=out, counters=Counters(wait_ns=waits))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        tokens.zero_()
        out.zero_()
        for _ in range(num_replays):
            graph.replay()
        buffer.check()
        return tokens.clone(), waits.clone(), out.clone()


@two_ranks
@pytest.mark.parametrize("layout", [Compact(), Padded()], ids=repr)
def test_replays_count_and_sum_in_the_callers_tensors(world, layout):
    case = make_case(spec_of(layout, wire=Fp32()), [9, 6])
    rows = oracle.received(case.spec, case.topk, case.x)
    wants = oracle.combined(case.spec, case.topk, [got["data"] for got in rows])
    for (tokens, waits, out), got, want in zip(world.run(count_in_replays, case, 5), rows, wants, strict=True):
        assert torch.equal(tokens, 5 * got["counts"])
        assert (waits >= 0).all()
        assert same_bits(out, want)
