"""Formulas of cost against every choice of experts that a token can make, counted one by one.

Letters: E experts, K top-k, L local experts, P ranks.
"""

from itertools import combinations
from math import comb, isclose

import pytest

from crossdock import Bf16, Compact, Expanded, Fp8, Fp32, Padded, Spec, cost
from crossdock.spec import Topology

SHAPES = [(4, 2, 2), (4, 1, 4), (6, 3, 3), (8, 2, 4), (8, 4, 2), (8, 8, 4), (9, 2, 3), (12, 5, 4), (6, 2, 1)]  # E, K, P
shapes = pytest.mark.parametrize(("num_experts", "num_topk", "num_ranks"), SHAPES)


def spec_of(num_experts, num_topk, layout=None, wire=None):
    return Spec(
        num_experts=num_experts, num_topk=num_topk, hidden=64, max_tokens=4, wire=wire or Bf16(),
        layout=layout or Expanded(),
    )  # fmt: skip


def walked(num_experts, num_topk, num_ranks):
    """Means over all picks of a token of rank 0: ranks, ranks but its own, picks that are not of its own."""
    num_local, num_choices = num_experts // num_ranks, comb(num_experts, num_topk)
    totals = [0, 0, 0]
    for picks in combinations(range(num_experts), num_topk):
        owners = [expert // num_local for expert in picks]
        totals[0] += len(set(owners))
        totals[1] += len(set(owners) - {0})
        totals[2] += sum(owner != 0 for owner in owners)
    return [total / num_choices for total in totals]


@shapes
def test_ranks_per_token_is_the_mean_over_all_choices(num_experts, num_topk, num_ranks):
    want = walked(num_experts, num_topk, num_ranks)[0]
    assert isclose(cost.ranks_per_token(spec_of(num_experts, num_topk), num_ranks), want)


@shapes
@pytest.mark.parametrize("wire", [Fp32(), Fp8(block=16)], ids=repr)
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=8), Padded()], ids=repr)
def test_link_bytes_are_those_of_the_rows_that_leave_a_rank(layout, wire, num_experts, num_topk, num_ranks):
    spec = spec_of(num_experts, num_topk, layout, wire)
    row_bytes = {Fp32(): 4 * 64, Fp8(block=16): 64 + 4 * 4}[wire]
    _, once, each = walked(num_experts, num_topk, num_ranks)
    topology = Topology(num_ranks=num_ranks)
    assert isclose(cost.link_bytes(spec, topology, expand="receiver"), once * row_bytes)
    want = each if layout.per_pick else once  # of Compact, a rank gets a token's row once in any case
    assert isclose(cost.link_bytes(spec, topology, expand="sender"), want * row_bytes)


@shapes
@pytest.mark.parametrize("layout", [Compact(), Expanded(), Padded()], ids=repr)
def test_a_receiver_reads_each_row_once_more_and_writes_a_copy_for_each_pick(layout, num_experts, num_topk, num_ranks):
    spec = spec_of(num_experts, num_topk, layout)
    topology = Topology(num_ranks=num_ranks, link_bandwidth=5e9, memory_bandwidth=7e9)
    ranks, once, each = walked(num_experts, num_topk, num_ranks)
    copies = (ranks + num_topk) * 128 / (7e9 * cost.TWO_HOPS.memory_share) if layout.per_pick else 0
    link = 5e9 * cost.TWO_HOPS.link_share
    for expand, want in (
        ("receiver", once * 128 / link + copies),
        ("sender", (each if layout.per_pick else once) * 128 / link),
    ):
        call = cost.predict("dispatch", spec, topology, expand=expand)
        assert isclose(call.seconds - call.fixed_s, want * spec.max_tokens, rel_tol=1e-6)


@pytest.mark.parametrize(("num_experts", "num_topk", "num_ranks"), [(8, 4, 2), (8, 8, 4), (12, 5, 4)])
def test_the_receiver_makes_copies_where_its_memory_is_fast_enough(num_experts, num_topk, num_ranks):
    """Up to the bandwidth at which what the link saves is what the copies cost."""
    ranks, once, each = walked(num_experts, num_topk, num_ranks)
    shares = cost.TWO_HOPS.link_share / cost.TWO_HOPS.memory_share
    as_fast = (ranks + num_topk) / (each - once) * shares  # memory, in units of the link
    spec = spec_of(num_experts, num_topk)
    for factor, want in ((0.999, "sender"), (1.001, "receiver"), (1000, "receiver"), (0.001, "sender")):
        topology = Topology(num_ranks=num_ranks, link_bandwidth=3e9, memory_bandwidth=as_fast * factor * 3e9)
        assert cost.cheaper_expand(spec, topology) == want, factor


@pytest.mark.parametrize(
    ("num_topk", "num_ranks", "layout"), [(1, 4, Expanded()), (4, 1, Padded()), (4, 4, Compact())], ids=repr
)
def test_the_sender_makes_copies_where_there_is_nothing_to_save(num_topk, num_ranks, layout):
    """One pick, one rank, one row for each rank: however fast memory is."""
    topology = Topology(num_ranks=num_ranks, memory_bandwidth=1e30)
    assert cost.cheaper_expand(spec_of(8, num_topk, layout), topology) == "sender"


def test_more_ranks_leave_less_to_save():
    spec = Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=1, layout=Expanded())
    saved = []
    for num_ranks in (2, 4, 8, 16, 32, 64, 128, 256):
        topology = Topology(num_ranks=num_ranks)
        each, once = (cost.link_bytes(spec, topology, expand=who) for who in ("sender", "receiver"))
        saved.append(1 - once / each)
    assert saved == sorted(saved, reverse=True)
    assert saved[-1] == pytest.approx(0)  # an expert for each rank: nobody gets a row twice


@pytest.mark.parametrize("bandwidth", [1.0, 50e9, 59e9, 60e9, 400e9, 450e9, 900e9])
def test_multiprocessors_fill_a_link_and_one_less_does_not(bandwidth):
    num_sms = cost.sms_to_fill(bandwidth)
    assert (num_sms - 1) * cost.SM_BANDWIDTH < bandwidth <= num_sms * cost.SM_BANDWIDTH
