"""Placements: copies keep a token's picks, and a greedy packing evens the ranks' loads out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossdock.errors import ConfigError
from crossdock.nn import Placement

tables = st.integers(1, 6).flatmap(
    lambda e: st.lists(st.integers(0, e - 1), max_size=8).flatmap(lambda more: st.permutations([*range(e), *more]))
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(tables, st.integers(0, 7), st.integers(0, 9), st.integers(0, 1000))
def test_to_physical_names_copies_of_the_same_experts(table, start, num_tokens, seed):
    placement = Placement(table)
    num_topk = min(3, placement.num_logical)
    topk_idx = torch.rand(num_tokens, placement.num_logical, generator=seeded(seed)).argsort(1)[:, :num_topk]
    topk_idx[torch.rand(num_tokens, num_topk, generator=seeded(seed)) < 0.2] = -1
    physical = placement.to_physical(topk_idx.to(torch.int32), start=start)
    assert physical.dtype == torch.int32
    for t, (picks, here) in enumerate(zip(topk_idx.tolist(), physical.tolist(), strict=True)):
        assert [-1 if p == -1 else table[p] for p in here] == picks
        copies = [[i for i, logical in enumerate(table) if logical == e] for e in picks]
        assert here == [-1 if not c else c[(start + t) % len(c)] for c in copies]


@given(
    st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_balanced_placements(load, num_ranks, more):
    num_physical = (-(-len(load) // num_ranks) + more) * num_ranks
    placement = Placement.balanced(load, num_physical=num_physical, num_ranks=num_ranks)
    assert (placement.num_physical, placement.num_logical) == (num_physical, len(load))
    shares = [x / n for x, n in zip(load, placement.num_replicas.tolist(), strict=True)]
    counts = placement.num_replicas.tolist()
    waiting = [share for share, n in zip(shares, counts, strict=True) if n < num_ranks]
    for e, n in enumerate(counts):
        if n > 1:  # its last copy was given to the heaviest
            assert load[e] / (n - 1) >= max(waiting, default=0)
    again = Placement.balanced(torch.tensor(load), num_physical=num_physical, num_ranks=num_ranks)
    assert torch.equal(again.physical_to_logical, placement.physical_to_logical)


def rank_loads(placement, load, num_ranks):
    shares = torch.tensor(load, dtype=torch.float64) / placement.num_replicas
    return shares[placement.physical_to_logical].view(num_ranks, -1).sum(1)


def test_balanced_flattens_a_zipf_load():
    load = [1000 / (e + 1) for e in range(64)]
    plain = torch.tensor(load, dtype=torch.float64).view(8, -1).sum(1)
    placement = Placement.balanced(load, num_physical=96, num_ranks=8)
    packed = rank_loads(placement, load, 8)
    assert plain.max() > 4 * plain.mean()
    assert packed.max() < 1.01 * packed.mean()
    held = placement.physical_to_logical.view(8, -1)
    assert all(len(set(row)) == len(row) for row in held.tolist())


def test_logical_load_sums_copies():
    placement = Placement([0, 1, 0, 2])
    assert placement.logical_load(torch.tensor([5, 1, 7, 2])).tolist() == [12, 1, 2]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0, 2], "physical_to_logical leaves out logical expert 1 of 0..2"),
        ([0, -1], "physical_to_logical has -1; logical experts have ids from 0"),
        ([], "physical_to_logical is torch.float32 of shape [0]"),
        ([[0]], "physical_to_logical is torch.int64 of shape [1, 1]"),
        ([0.0], "physical_to_logical is torch.float32 of shape [1]"),
    ],
)
def test_placement_refuses(table, message):
    with pytest.raises(ConfigError) as error:
        Placement(table)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("load", "num_physical", "message"),
    [
        ([1.0, 1.0], 1, "num_physical=1 is less than the 2 logical experts"),
        ([1.0, 1.0], 3, "num_experts=3 is not divisible by num_ranks=2"),
        ([1.0, math.inf], 2, "load=[1.0, inf]; pass one finite number"),
        ([1.0, -1.0], 2, "load=[1.0, -1.0]; pass one finite number"),
    ],
)
def test_balanced_refuses(load, num_physical, message):
    with pytest.raises(ConfigError) as error:
        Placement.balanced(load, num_physical=num_physical, num_ranks=2)
    assert str(error.value).startswith(message)
