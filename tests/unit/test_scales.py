"""Where scales of a slot lie: each in a place of its own, found by the formula and by the views alike."""

import pytest
import torch

from crossdock import Arena, Compact, Expanded, Fp8, Padded, Quantized, Spec, Topology
from crossdock.scales import ScaleLayout, as_integers
from tests.cases import same_bits

F32, E8M0, PACKED = Fp8(block=4), Fp8(block=4, scale="ue8m0"), Fp8(block=4, scale="ue8m0", packed=True)
LAYOUTS = [
    ScaleLayout(num_segments=n, segment_rows=rows, num_scales=g, dtype=dtype, column_major=column_major)
    for n in (None, 1, 3)
    for rows in (1, 3, 4, 16, 17, 33)
    for g in (1, 5)
    for dtype in (torch.float32, torch.int32, torch.float8_e8m0fnu)
    for column_major in (False, True)
]


def numbered(layout):
    """A slot in memory behind something else, in which each scale is the number of its place."""
    num_places = torch.Size(layout.shape).numel()
    memory = torch.arange(num_places + 64).to(torch.uint8 if layout.dtype.itemsize == 1 else torch.int32)
    return memory[64:].view(layout.dtype).view(layout.shape)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_formula_and_views_say_the_same(layout):
    slot, size = numbered(layout), layout.dtype.itemsize
    num_rows = (layout.num_segments or 1) * layout.segment_rows
    of_rows = as_integers(layout.of_rows(slot, num_rows)).reshape(num_rows, layout.num_scales)
    seen = set()
    for row in range(num_rows):
        block = as_integers(layout.of_block(slot, slice(row, row + 1)))[0]
        for group in range(layout.num_scales):
            at = layout.offset(row) + group * layout.group_bytes
            assert at % size == 0
            assert of_rows[row, group] == block[group] == (64 + at // size) % (256 if size == 1 else 2**31)
            seen.add(at)
    assert len(seen) == num_rows * layout.num_scales
    assert max(seen) < slot.nbytes


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.column_major], ids=repr)
def test_groups_are_multiples_of_16_bytes_apart_and_rows_side_by_side(layout):
    num_rows = (layout.num_segments or 1) * layout.segment_rows
    scale = layout.of_rows(numbered(layout), num_rows)
    assert scale.stride(-2) == 1
    assert scale.stride(-1) * scale.element_size() % 16 == 0
    assert layout.segment_rows <= scale.stride(-1) < layout.segment_rows + 16
    if scale.dim() == 3:
        assert scale.stride(0) == scale.stride(2) * layout.num_scales
    assert torch.Size(layout.shape).numel() * scale.element_size() % 16 == 0  # the next slot begins as this one


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("num_rows", [0, 1, 3, None])
def test_copies_have_the_same_values_and_no_more_padding_than_they_need(layout, num_rows):
    num_rows = num_rows if layout.num_segments is None else None
    if num_rows is None or num_rows > layout.segment_rows:
        num_rows = (layout.num_segments or 1) * layout.segment_rows
    scale = layout.of_rows(numbered(layout), num_rows)
    own = layout.room(scale)
    as_integers(own).copy_(as_integers(scale))
    assert same_bits(own, scale)
    assert not own.numel() or own.untyped_storage().data_ptr() != scale.untyped_storage().data_ptr()
    if layout.column_major:
        in_16_bytes = 16 // scale.element_size()
        step = -(-max(1, scale.shape[-2]) // in_16_bytes) * in_16_bytes
        assert own.stride() == (*[step * layout.num_scales] * (scale.dim() - 2), 1, step)
    else:
        assert own.is_contiguous()


def test_literal_layouts():
    """Two experts of 3 rows, 4 groups: f32 scales of a group take 16 bytes; exponent bytes of a group too."""
    spec = {"num_experts": 4, "num_topk": 2, "hidden": 16, "max_tokens": 3, "num_slots": 1}
    f32, e8m0, packed = (Fp8(block=4, scale=s, packed=p, column_major=True) for s, p in
                         (("f32", False), ("ue8m0", False), ("ue8m0", True)))  # fmt: skip
    layouts = [
        Arena(Spec(wire=wire, layout=layout, **spec), Topology(num_ranks=2)).scales
        for wire, layout in ((f32, Padded(capacity=3)), (e8m0, Padded(capacity=3)), (packed, Padded(capacity=3)),
                             (f32, Compact()), (f32, Expanded(alignment=4)))
    ]  # fmt: skip
    assert [layout.shape for layout in layouts] == [(2, 4, 4), (2, 4, 16), (2, 1, 4), (4, 8), (4, 20)]
    assert [layout.offset(2) for layout in layouts] == [8, 2, 8, 8, 8]
    assert [layout.offset(4) for layout in layouts[:3]] == [64 + 4, 64 + 1, 16 + 4]


@pytest.mark.parametrize("wire", [F32, E8M0, PACKED], ids=repr)
@pytest.mark.parametrize(("num_rows", "hidden"), [(6, 40), (1, 4), (1, 40), (6, 4)])
def test_scales_of_any_strides_are_dequantised_alike(wire, num_rows, hidden):
    data, scale = wire.quantize(torch.randn(num_rows, hidden))
    layout = ScaleLayout(
        num_segments=None, segment_rows=6, num_scales=scale.shape[1], dtype=scale.dtype, column_major=True
    )
    turned = layout.room(scale).copy_(scale)
    assert turned.stride(1) > 1
    assert same_bits(wire.dequantize(Quantized(data, turned)), wire.dequantize(Quantized(data, scale)))
