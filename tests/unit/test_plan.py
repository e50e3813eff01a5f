"""Plans of all ranks of a world that nobody has, without communication, against the oracle and against each other."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossdock import Compact, Expanded, Padded, Spec, Topology, make_plan
from crossdock.extent import Extent
from crossdock.plan import check_capacity, local_counts
from tests import oracle

LAYOUTS = [Compact(), Expanded(), Expanded(alignment=4), Padded()]
GAP = -7


def random_picks(num_ranks, num_tokens, num_topk, num_experts, seed=0, missing=0.2):
    g = torch.Generator().manual_seed(seed)
    topk = []
    for r in range(num_ranks):
        t = num_tokens if r != 1 else num_tokens // 2
        picks = torch.rand(t, num_experts, generator=g).topk(num_topk, 1).indices
        picks[torch.rand(t, num_topk, generator=g) < missing] = -1
        topk.append(picks)
    return topk


def plans_of(spec, topk):
    topology = Topology(num_ranks=len(topk))
    counts = torch.stack([local_counts(spec, topology, idx) for idx in topk])
    assert counts.shape == (len(topk), spec.num_counts(topology))
    check_capacity(Extent.of(spec, topology.num_ranks), topology, counts)
    return [make_plan(spec, topology, rank=r, topk_idx=idx, counts=counts) for r, idx in enumerate(topk)]


def moved(hops, inputs, num_rows):
    """Sends each rank's inputs [n, ...] along its hop; gives what lies at each rank, [num_rows, ...]."""
    there = [np.full((num_rows, *inputs[0].shape[1:]), GAP) for _ in hops]
    for hop, mine in zip(hops, inputs, strict=True):
        for idx, block, row in zip(hop.send_idx.tolist(), hop.send_blocks, hop.send_dst_rows, strict=True):
            peer = hop.peers[block // hop.num_blocks_per_peer]
            assert (there[peer][row] == GAP).all(), "two rows in one place"
            there[peer][row] = mine[idx]
    return there


def check_places(spec, topk, plans):
    """Tokens and picks land where the oracle says, and nowhere else."""
    ids = [np.array([(r, t) for t in range(len(idx))]).reshape(-1, 2) for r, idx in enumerate(topk)]
    num_rows = spec.num_slot_rows(len(topk))
    there = moved([plan.hops[0] for plan in plans], ids, num_rows)
    for plan, mine, want in zip(plans, there, oracle.rows_of(spec, topk), strict=True):
        assert plan.num_rows == len(want)
        expected = [(GAP, GAP) if row is None else (row.source, row.token) for row in want]
        assert [tuple(row) for row in mine[: len(want)].tolist()] == expected
        assert (mine[len(want) :] == GAP).all()
        hop = plan.hops[0]
        assert hop.send_idx.shape[0] == int(hop.counts[hop.own].sum())
        experts = torch.cat([idx.flatten() for idx in topk])
        num_local = spec.num_experts // len(topk)
        local = range(plan.rank * num_local, (plan.rank + 1) * num_local)
        assert plan.num_tokens_per_expert.tolist() == [int((experts == e).sum()) for e in local]


def check_tiling(plans):
    """Blocks of all senders lie side by side in each receive slot."""
    hop = plans[0].hops[0]
    for rank, plan in enumerate(plans):
        mine = slice(rank * hop.num_blocks_per_peer, (rank + 1) * hop.num_blocks_per_peer)
        starts, counts = hop.dst_starts[:, mine], hop.counts[:, mine]
        blocks = sorted(
            (s, s + c) for s, c in zip(starts.flatten().tolist(), counts.flatten().tolist(), strict=True) if c
        )
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(blocks))
        assert torch.equal(counts.sum(0), plan.segment_rows)
        segments = zip(
            plan.segment_starts.tolist(), plan.segment_starts[1:].tolist(), plan.segment_rows.tolist(), strict=False
        )
        for start, end, num_rows in segments:
            inside = [block for block in blocks if start <= block[0] < start + num_rows]
            assert sum(stop - begin for begin, stop in inside) == num_rows <= end - start
            assert not inside or (inside[0][0], inside[-1][1]) == (start, start + num_rows)


def spec_of(layout, num_experts, num_topk=3, max_tokens=8, reduce="token"):
    return Spec(
        num_experts=num_experts, num_topk=num_topk, hidden=8, max_tokens=max_tokens, layout=layout, reduce=reduce
    )


@pytest.mark.parametrize(("num_ranks", "num_experts"), [(1, 6), (2, 6), (3, 6), (4, 160), (8, 160), (3, 384), (8, 384)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_rows_land_where_the_oracle_says(layout, num_ranks, num_experts):
    spec = spec_of(layout, num_experts)
    for missing in (0.0, 0.3, 2.0):
        topk = random_picks(num_ranks, 8, 3, num_experts, seed=num_experts, missing=missing)
        plans = plans_of(spec, topk)
        check_places(spec, topk, plans)
        check_tiling(plans)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@given(data=st.data(), num_ranks=st.sampled_from([1, 2, 3, 4]))
def test_any_routing_lands_where_the_oracle_says(layout, reduce, dtype, data, num_ranks):
    spec = spec_of(layout, 12, max_tokens=4, reduce=reduce)
    token = st.lists(st.integers(-6, 11), min_size=3, max_size=3, unique_by=lambda e: e)
    topk = [
        torch.tensor(data.draw(st.lists(token, max_size=4)), dtype=dtype).view(-1, 3).clamp(min=-1)
        for _ in range(num_ranks)
    ]
    plans = plans_of(spec, topk)
    check_places(spec, topk, plans)
    check_tiling(plans)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_sixty_four_virtual_ranks_need_no_machine(layout):
    spec = spec_of(layout, 384, num_topk=8, max_tokens=4)
    topk = random_picks(64, 4, 8, 384)
    topk[5], topk[6] = topk[5][:0], torch.full_like(topk[6], -1)
    plans = plans_of(spec, topk)
    check_places(spec, topk, plans)
    check_tiling(plans)


def test_a_literal_plan():
    spec = Spec(num_experts=4, num_topk=2, hidden=8, max_tokens=4, layout=Expanded(alignment=2))
    first, second = plans_of(spec, [torch.tensor([[0, 3], [3, -1], [2, 1]]), torch.tensor([[3, 0]])])
    hop = first.hops[0]
    assert hop.counts.tolist() == [[1, 1, 1, 2], [1, 0, 0, 1]]
    assert hop.send_idx.tolist() == [0, 2, 2, 0, 1]
    assert hop.send_pick.tolist() == [0, 1, 0, 1, 0]
    assert hop.send_dst_rows.tolist() == [0, 2, 0, 2, 3]
    assert second.hops[0].send_dst_rows.tolist() == [1, 4]
    assert (first.segment_starts.tolist(), first.segment_rows.tolist()) == ([0, 2, 4], [2, 1])
    assert (second.segment_starts.tolist(), second.segment_rows.tolist()) == ([0, 2, 6], [1, 3])
    assert first.pick_pos.tolist() == [[0, 3], [4, -1], [2, 1]]
    assert [part.tolist() for part in first.terms] == [[0, 2, 3, 5], [0, 3, 4, 2, 1]]


@pytest.mark.parametrize(("reduce", "want"), [("token", [1, 0, 2]), ("rank", [0, 1, 2])])
def test_terms_are_in_the_order_of_picks_or_of_ranks(reduce, want):
    spec = Spec(num_experts=4, num_topk=3, hidden=8, max_tokens=4, reduce=reduce)
    plan, _ = plans_of(spec, [torch.tensor([[2, 0, 3], [-1, 3, 2]]), torch.empty(0, 3, dtype=torch.int64)])
    assert [part.tolist() for part in plan.terms] == [[0, 2, 3], want]
