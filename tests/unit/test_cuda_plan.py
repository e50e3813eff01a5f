"""Plans whose tables lie in one allocation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")

from crossdock.backends.cuda.plan import DevicePlan, Room, Table

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
tables = st.dictionaries(st.text("abc", min_size=1), st.tuples(shapes, st.sampled_from([torch.int32, torch.int64])))


@given(tables=tables)
def test_tables_share_an_allocation_and_no_word(tables):
    num_bytes, parts = Room.divided(tables)
    room = Room(torch.zeros(num_bytes // 4, dtype=torch.int32), parts)
    for i, (table, (shape, dtype)) in enumerate(zip(room.tensors(), tables.values(), strict=True)):
        assert (table.shape, table.dtype) == (shape, dtype)
        table.fill_(i + 1)
    for i, name in enumerate(tables):
        assert (room.tensor(name) == i + 1).all()
    begin = min(room.addresses(), default=0)
    assert [address - begin for address in room.addresses()] == [part.first for part in parts.values()]
    assert [room.address(name) for name in tables] == room.addresses()
    assert all((address - begin) % 128 == 0 for address in room.addresses())


def made():
    num_bytes, parts = Room.divided({"dst_rows": ((2, 3), torch.int64), "counts": ((4,), torch.int64)})
    room = Room(torch.arange(num_bytes // 4, dtype=torch.int32), parts)
    return DevicePlan.of(room, num_tokens=2, rows=Table.of(room, num_slots=7))


def test_a_table_is_cut_out_when_somebody_asks_and_stays_the_same():
    plan = made()
    address = plan.rows.address("dst_rows")
    assert plan.rows.dst_rows is plan.rows.dst_rows
    assert plan.rows.dst_rows.shape == (2, 3)
    assert plan.rows.dst_rows.data_ptr() == plan.rows.address("dst_rows") == address
    assert plan.counts.untyped_storage().data_ptr() == plan.rows.dst_rows.untyped_storage().data_ptr()
    assert plan.num_tokens == 2
    assert plan.src_idx is None


def test_what_no_room_has_is_no_attribute():
    with pytest.raises(AttributeError, match="DevicePlan has no 'return_rows'"):
        _ = made().return_rows


def test_a_table_of_its_own_is_where_it_is():
    dst_rows = torch.zeros(2, 3, dtype=torch.int64)
    nothing = torch.zeros(0, dtype=torch.int32)
    table = Table(dst_rows=dst_rows, return_rows=nothing, incoming=nothing, num_slots=1)
    assert table.address("dst_rows") == dst_rows.data_ptr()
