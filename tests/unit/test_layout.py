"""Capacities and segment starts, against hand-made numbers and the worst that routing can do."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossdock import CapacityError, Compact, ConfigError, Expanded, Padded, Spec, Topology
from crossdock.extent import Extent
from crossdock.plan import check_capacity, local_counts


@pytest.mark.parametrize(
    ("layout", "want"),
    [
        (Compact(), 8 * 100),
        (Expanded(), 8 * 100 * 4),
        (
            Expanded(alignment=128),
            29 * 128,
        ),  # 3200 rows and up to 127 of padding for each of 4 experts: 3708, rounded up
        (Padded(), 8 * 100),
    ],
    ids=repr,
)
def test_worst_case_is_what_the_formula_says(layout, want):
    got = layout.worst_case(num_ranks=8, max_tokens=100, num_topk=6, num_local_experts=4)
    assert got == want
    # Fewer picks than local experts: a token cannot bring more rows than it has picks.
    assert Expanded().worst_case(num_ranks=8, max_tokens=100, num_topk=2, num_local_experts=4) == 1600


def spec_of(layout, num_topk, num_local, num_ranks):
    return Spec(num_experts=num_local * num_ranks, num_topk=num_topk, hidden=8, max_tokens=5, layout=layout)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(("num_topk", "num_local"), [(1, 1), (2, 4), (4, 2), (3, 3)])
@pytest.mark.parametrize("layout", [Compact, Expanded, Padded])
def test_the_worst_routing_fits_exactly(layout, num_topk, num_local, num_ranks):
    num_topk = min(num_topk, num_local * num_ranks)
    spec, topology = spec_of(layout(), num_topk, num_local, num_ranks), Topology(num_ranks=num_ranks)
    everything_to_the_first = torch.arange(num_topk).repeat(spec.max_tokens, 1)
    counts = local_counts(spec, topology, everything_to_the_first).repeat(num_ranks, 1)
    check_capacity(Extent.of(spec, topology.num_ranks), topology, counts)
    worst = spec.capacity(num_ranks)
    if worst > 1:
        smaller = spec_of(layout(capacity=worst - 1), num_topk, num_local, num_ranks)
        with pytest.raises(
            CapacityError, match=f"{worst} rows were routed to rank 0.* whose capacity is {worst - 1}; "
        ):
            check_capacity(Extent.of(smaller, topology.num_ranks), topology, counts)


@given(
    alignment=st.sampled_from([1, 2, 3, 8]),
    num_ranks=st.integers(1, 3),
    num_local=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
def test_no_routing_overflows_an_aligned_worst_case(alignment, num_ranks, num_local, seed):
    num_topk = min(3, num_local * num_ranks)
    spec, topology = (
        spec_of(Expanded(alignment=alignment), num_topk, num_local, num_ranks),
        Topology(num_ranks=num_ranks),
    )
    g = torch.Generator().manual_seed(seed)
    skew = torch.rand(spec.num_experts, generator=g) * 3  # some experts are everybody's
    topk = [(torch.rand(5, spec.num_experts, generator=g) + skew).topk(num_topk).indices for _ in range(num_ranks)]
    check_capacity(
        Extent.of(spec, topology.num_ranks), topology, torch.stack([local_counts(spec, topology, idx) for idx in topk])
    )
    assert spec.capacity(num_ranks) % alignment == 0


@pytest.mark.parametrize(
    ("layout", "want"),
    [
        (Compact(), [0, 3, 3, 8, 9]),
        (Expanded(), [0, 3, 3, 8, 9]),
        (Expanded(alignment=4), [0, 4, 4, 12, 16]),
        (Padded(), [0, 7, 14, 21, 28]),
    ],
    ids=repr,
)
def test_segments_start_where_the_layout_says(layout, want):
    rows = np.array([[3, 0, 5, 1], [0, 0, 0, 0]])
    starts = layout.segment_starts(rows, 7)
    assert starts[0].tolist() == want
    assert starts[1].tolist() == (want if isinstance(layout, Padded) else [0] * 5)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Compact(capacity=0), "capacity=0 rows; pass a positive integer, or None for the worst case"),
        (lambda: Expanded(capacity=-3), "capacity=-3 rows"),
        (lambda: Padded(capacity=1.25 * 64), "capacity=80.0 rows; pass a positive integer"),
        (lambda: Expanded(alignment=0), "alignment=0 rows; pass a positive integer, 1 for none"),
        (lambda: Expanded(staged="yes"), "staged='yes'; pass True or False"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(build, says):
    with pytest.raises(ConfigError, match=says):
        build()
