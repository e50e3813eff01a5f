"""Calls of several sizes on one buffer, on GPUs: eagerly, and in graphs that are replayed in any order."""

from dataclasses import replace

import pytest
import torch

from crossdock import CapacityError, Fp32
from tests import oracle
from tests.cases import check_received, make_case, observed, same_bits
from tests.world import open_buffer
from tests.worlds.test_max_tokens import KINDS, M, cases_of, check_in_turn, kinds, spec_of


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("rows", ["exact", "capacity"])
@kinds
def test_rows_lie_as_those_of_a_spec_with_as_many_tokens(world, kind, rows):
    check_in_turn(world, kind, rows, (M, 1, 5, 4, M, 2))


def in_graphs(group, spec, cases):
    """A graph of each case, replayed in turn and out of turn; in between a call of another size."""
    with open_buffer(group, spec) as buffer:
        r, graphs = buffer.rank, []
        for case in cases:
            most = case.spec.max_tokens
            buffer.dispatch(case.x[r], case.topk[r], rows="capacity", max_tokens=most)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                recv = buffer.dispatch(case.x[r], case.topk[r], rows="capacity", max_tokens=most)
                seen = {name: tensor.clone() for name, tensor in observed(recv).items()}
                out = buffer.combine(recv.output_rows().copy_(_rows(recv)), recv.plan)
            graphs.append((graph, seen, out))
        got = {}
        for number in (0, 2, 1, 1, 0, 2, 0, 1):
            graph, seen, out = graphs[number]
            graph.replay()
            now = {name: tensor.clone() for name, tensor in seen.items()}, out.clone()
            if number in got:
                assert same_bits(now[1], got[number][1])
                assert same_bits(now[0]["src_idx"], got[number][0]["src_idx"])
            got[number] = now
            other = cases[(number + 1) % len(cases)]
            buffer.dispatch(other.x[r], other.topk[r], max_tokens=other.spec.max_tokens)
        buffer.check()
        return [got[number] for number in range(len(cases))]


def _rows(recv):
    return recv.x if isinstance(recv.x, torch.Tensor) else recv.x.data.to(torch.float32)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4], KINDS[3]], ids=repr)
def test_graphs_of_several_sizes_replay_in_any_order(world, kind):
    spec = spec_of(kind, world.num_ranks)
    cases = cases_of(spec, world.num_ranks, (M, 2, 5))
    for i, (case, got) in enumerate(zip(cases, zip(*world.run(in_graphs, spec, cases), strict=True), strict=True)):
        check_received(case, [rows for rows, _ in got], weights=False, extras=False)
        if kind[1] == Fp32():
            wants = oracle.combined(case.spec, case.topk, oracle_rows(case))
            assert all(same_bits(out, want) for (_, out), want in zip(got, wants, strict=True)), i


def oracle_rows(case):
    return [got["data"] for got in oracle.received(case.spec, case.topk, case.x)]


def too_many_in_a_graph(group, spec, case):
    with open_buffer(group, spec) as buffer:
        r = buffer.rank
        buffer.dispatch(case.x[r][:1], case.topk[r][:1], rows="capacity", max_tokens=3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recv = buffer.dispatch(case.x[r], case.topk[r], rows="capacity", max_tokens=3)
            out = buffer.combine(recv.output_rows(), recv.plan)
        said = []
        for _ in range(2):
            graph.replay()
            with pytest.raises(CapacityError) as error:
                buffer.check()
            said.append(error.value.num_tokens)
        assert not out.any()
        return said, buffer.dispatch(case.x[r][:1], case.topk[r][:1]).num_rows


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[6]], ids=repr)
def test_a_graph_of_too_many_tokens_says_so_at_each_check(world, kind):
    spec = spec_of(kind, world.num_ranks)
    case = make_case(replace(spec, max_tokens=M), [5, M])
    for said, _ in world.run(too_many_in_a_graph, spec, case):
        assert said == [M, M]
