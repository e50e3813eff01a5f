"""Rows in memory of their own, and gradients of weighted rows: kernels in the interpreter, and CPUs, against torch.

Sums in float32, because the interpreter cuts float32 off where it makes bfloat16 of it.
"""

import itertools

import pytest
import torch

from crossdock import Bf16, Compact, Expanded, Fp8, Fp32, Padded, Quantized, Spec
from tests.cases import same_bits
from tests.world import device, open_buffer

SCALES = [
    {"scale": "f32"}, {"scale": "f32", "pow2": True}, {"scale": "ue8m0"}, {"scale": "ue8m0", "packed": True},
]  # fmt: skip
WIRES = [
    Fp8(block=block, column_major=column_major, **scale)
    for scale, (block, column_major) in itertools.product(SCALES, [(8, False), (8, True), (12, True), (48, False)])
]
LAYOUTS = [Compact(capacity=5), Expanded(capacity=5), Padded(capacity=5)]
WORLDS = pytest.mark.worlds("interpreted-1", "inproc-1")
H = 48


def spec_of(layout, wire):
    return Spec(num_experts=3, num_topk=2, hidden=H, max_tokens=5, layout=layout, wire=wire, combine_wire=Fp32())


def narrow_rows(buffer, num_rows, *, seed=0):
    """Rows of any bytes, also NaN and subnormal values, with scales of any size, as a receive slot has them."""
    spec, layout = buffer.spec, buffer.arena.scales
    g = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (num_rows, H), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn)
    slot = torch.empty(layout.shape, dtype=layout.dtype)
    if spec.wire.scale == "f32":
        values = torch.randn(slot.shape, generator=g) * 2.0 ** torch.randint(-140, 120, slot.shape, generator=g)
        slot.copy_(values.abs())
    else:
        bytes_of = slot.view(torch.uint8)
        bytes_of.copy_(torch.randint(0, 240, bytes_of.shape, generator=g, dtype=torch.uint8))
    scale = layout.of_rows(slot.to(device()), num_rows)
    return Quantized(data.to(device()).view(*scale.shape[:-1], H), scale)


def is_same(got, want):
    """The same bits, where NaN is NaN."""
    return (
        got.dtype == want.dtype
        and torch.equal(got.isnan(), want.isnan())
        and same_bits(
            got.nan_to_num(0.0, float("inf"), float("-inf")), want.nan_to_num(0.0, float("inf"), float("-inf"))
        )
    )


def dequantize(group, spec):
    outcomes = []
    with open_buffer(group, spec) as buffer:
        slot_rows = spec.num_slot_rows(buffer.topology.num_ranks)
        for num_rows in (slot_rows,) if isinstance(spec.layout, Padded) else (0, 3, slot_rows):
            rows = narrow_rows(buffer, num_rows, seed=num_rows)
            want = spec.wire.dequantize(rows, spec.combine_dtype)
            lead = rows.data.shape[:-1]
            outcomes.append(is_same(buffer._backend.own_rows(rows, None), want))
            for every in (1, 2, 10**6):
                src_idx = torch.arange(num_rows, dtype=torch.int32, device=device()).view(lead)
                src_idx = torch.where(src_idx % every == 0, src_idx, -1)
                got = buffer._backend.own_rows(rows, src_idx)
                outcomes.append(is_same(got, want.masked_fill((src_idx < 0).unsqueeze(-1), 0)))
    return outcomes


@WORLDS
@pytest.mark.parametrize("wire", WIRES, ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["compact", "expanded", "padded"])
def test_dequantised_rows_have_the_bits_of_the_formula(world, wire, layout):
    (outcomes,) = world.run(dequantize, spec_of(layout, wire))
    assert len(outcomes) >= 4
    assert all(outcomes)


def copy(group, spec):
    outcomes = []
    with open_buffer(group, spec) as buffer:
        for lead in ((0,), (7,), (2, 5)):
            rows = torch.randn(*lead, H).to(spec.wire.dtype)
            src_idx = torch.randint(-1, 1, lead, dtype=torch.int32)
            is_none = (src_idx < 0).unsqueeze(-1)
            rows = rows.masked_fill(is_none, float("nan"))
            got = [buffer._backend.own_rows(rows, src_idx), buffer._backend.own_rows(rows, None)]
            outcomes.append(same_bits(got[0], rows.masked_fill(is_none, 0)) and same_bits(got[1], rows))
            outcomes.append(all(not own.numel() or own.data_ptr() != rows.data_ptr() for own in got))
    return outcomes


@WORLDS
@pytest.mark.parametrize("wire", [Fp32(), Bf16()], ids=repr)
def test_unquantised_rows_are_copied_and_are_zero_where_none_came(world, wire):
    (outcomes,) = world.run(copy, spec_of(Expanded(), wire))
    assert all(outcomes)


def weigh(group, spec):
    outcomes = []
    with open_buffer(group, spec) as buffer:
        for lead in ((0,), (70,), (2, 5)):
            grads, y = torch.randn(*lead, H), torch.randn(*lead, H)
            weights, src_idx = torch.rand(lead), torch.randint(-1, 1, lead, dtype=torch.int32)
            is_none = src_idx < 0
            grads.masked_fill_(is_none.unsqueeze(-1), 0)
            y.masked_fill_(is_none.unsqueeze(-1), float("nan"))
            weights.masked_fill_(is_none, float("inf"))
            grad_y, grad_weights = buffer._backend.weigh_gradients(grads, y, weights, src_idx)
            outcomes.append(same_bits(grad_y, grads * weights.masked_fill(is_none, 0.0).unsqueeze(-1)))
            want = (grads.double() * y.double()).sum(dim=-1).masked_fill(is_none, 0.0).float()
            outcomes.append(torch.allclose(grad_weights, want, rtol=1e-5, atol=1e-5))
            again = buffer._backend.weigh_gradients(grads, y, weights, src_idx)
            outcomes.append(same_bits(again[1], grad_weights))
    return outcomes


@WORLDS
def test_gradients_of_weighted_rows_are_those_of_the_sums_and_zero_where_none_is(world):
    (outcomes,) = world.run(weigh, spec_of(Expanded(), Fp32()))
    assert all(outcomes)
