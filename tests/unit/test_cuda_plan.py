"""Plans whose tables lie in one allocation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")

from crossdock import Compact, Expanded, Padded, Spec, Topology
from crossdock.arena import Arena
from crossdock.backends.cuda.kernels.groups import as_constants
from crossdock.backends.cuda.plan import DevicePlan, PlanShape

FIXED = ("counts", "scalars", "num_tokens_per_expert", "segment_starts", "incoming", "pair_incoming", "partial_rows")
OF_TOKENS = ("dst_rows", "topk_idx", "pair_dst_rows", "return_rows", "pair_return_rows")


def shape_of(layout, num_ranks, num_topk, *, has_pairs):
    spec = Spec(num_experts=8 * num_ranks, num_topk=num_topk, hidden=16, max_tokens=32, layout=layout)
    num_pairs = min(num_topk, num_ranks) if has_pairs else 0
    return PlanShape.of(Arena(spec, Topology(num_ranks=num_ranks)), num_pairs=num_pairs)


def made(shape, num_tokens):
    memory = torch.zeros(shape.num_words(num_tokens), dtype=torch.int32)
    return DevicePlan.of(memory=memory, shape=shape, num_tokens=num_tokens, num_rows=None)


@given(
    layout=st.sampled_from([Compact(), Expanded(), Padded()]),
    num_ranks=st.integers(1, 9),
    num_topk=st.integers(1, 8),
    has_pairs=st.booleans(),
    num_tokens=st.integers(0, 32),
)
def test_tables_share_an_allocation_and_no_word(layout, num_ranks, num_topk, has_pairs, num_tokens):
    shape = shape_of(layout, num_ranks, num_topk, has_pairs=has_pairs and layout.per_pick)
    plan = made(shape, num_tokens)
    tables = [plan.table(name) for name in (*FIXED, *OF_TOKENS)]
    for i, table in enumerate(tables):
        table.fill_(i + 1)
    for i, table in enumerate(tables):
        assert (table == i + 1).all()
        assert table.untyped_storage().data_ptr() == plan.memory.data_ptr()
    begin = plan.memory.data_ptr()
    for name, first in zip(FIXED, shape.places, strict=False):
        assert plan.table(name).numel() == 0 or plan.table(name).data_ptr() - begin == first
        assert first % 128 == 0


def test_a_table_is_cut_out_when_somebody_asks_and_stays_the_same():
    plan = made(shape_of(Expanded(), 2, 3, has_pairs=True), 4)
    assert plan.dst_rows is plan.dst_rows
    assert plan.dst_rows.shape == (4, 3)
    assert plan.partial_rows is plan.partial_rows
    assert plan.partial_rows.shape == (64, 3)
    assert plan.src_idx is None
    assert plan.num_tokens == 4


def test_a_plan_with_other_fields_has_the_same_memory():
    plan = made(shape_of(Compact(), 2, 3, has_pairs=False), 4)
    other = plan.changed(num_rows=3)
    assert (plan.num_rows, other.num_rows) == (None, 3)
    assert other.memory is plan.memory
    assert other.partial_rows is None


def test_what_no_memory_has_is_no_attribute():
    with pytest.raises(AttributeError, match="DevicePlan has no 'rows'"):
        _ = made(shape_of(Padded(), 2, 3, has_pairs=False), 4).rows


def test_constants_of_groups_are_constants_for_the_compiler():
    shape = shape_of(Padded(), 2, 3, has_pairs=False)
    constants = as_constants(shape.places)
    assert type(constants) is type(shape.places)
    assert [constant.value for constant in constants] == list(shape.places)
