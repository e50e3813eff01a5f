"""The cast to FP8, against literals worked out by hand and a definition in float64 and integers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossdock import Bf16, ConfigError, Fp8, Opaque, Quantized, Spec

F32 = Fp8(block=4)
POW2 = Fp8(block=4, pow2=True)
UE8M0 = Fp8(block=4, scale="ue8m0")
PACKED = Fp8(block=4, scale="ue8m0", packed=True)
WIRES = [F32, POW2, UE8M0, PACKED]

# The values of the e4m3 codes 0x00 to 0x7E: sign, 4 bits of exponent with bias 7, 3 bits of mantissa.
MAGNITUDES = np.array(
    [math.ldexp(m, -9) if e == 0 else math.ldexp(8 + m, e - 10) for e in range(16) for m in range(8)][:127]
)


def e4m3(value: float) -> int:
    """The code of the nearest value, of the even code where two are as near."""
    distance = np.abs(MAGNITUDES - abs(value))
    nearest = np.flatnonzero(distance == distance.min())
    code = int(nearest[0] if nearest.size == 1 else nearest[nearest % 2 == 0][0])
    return code | (0x80 if math.copysign(1, value) < 0 else 0)


def defined(block: list[float], *, pow2: bool) -> tuple[list[int | None], float]:
    """Codes (None: NaN) and scale of one block of float32 values; float64 division rounds to float32 just once."""
    amax = max((abs(v) for v in block if math.isfinite(v)), default=0.0)
    s = max(float(np.float32(amax / 448)), 2.0**-126)
    if pow2:
        mantissa, exponent = math.frexp(s)
        s = math.ldexp(1, exponent - (mantissa == 0.5))
    return [e4m3(float(np.float32(v / s))) if math.isfinite(v) else None for v in block], s


def test_scale_is_amax_over_448():
    data, scale = F32.quantize(torch.tensor([[3.5, -1.75, 0.875, 0.109375, 0.0, -0.0, 1.0, -3.0]]))
    assert data.float().tolist() == [[448.0, -224.0, 112.0, 14.0, 0.0, 0.0, 144.0, -448.0]]
    assert data.view(torch.uint8)[0, 4:6].tolist() == [0x00, 0x80]
    assert scale.tolist() == [[2.0**-7, torch.tensor(3.0).div(448).item()]]


@pytest.mark.parametrize(("wire", "want"), [(POW2, 2.0**-7), (UE8M0, 120)], ids=["pow2", "ue8m0"])
def test_scale_is_rounded_up_to_a_power_of_two(wire, want):
    # 3 / 448 lies between 2**-8 and 2**-7; with 2**-7 the largest value is 384, of a possible 448.
    data, scale = wire.quantize(torch.tensor([[3.0, 1.5, 0.0, -3.0]]))
    assert data.float().tolist() == [[384.0, 192.0, 0.0, -384.0]]
    assert (scale if wire is POW2 else scale.view(torch.uint8)).item() == want


def test_scale_that_is_a_power_of_two_stays():
    assert UE8M0.quantize(torch.tensor([[448.0, 0.0, 0.0, 0.0]])).scale.view(torch.uint8).item() == 127


def test_packed_scales_begin_in_the_lowest_byte_and_end_in_zero_bytes():
    x = torch.zeros(1, 20)
    x[0, ::4] = torch.tensor([448.0, 3.5, 0.0, 448.0 * 2**10, 448.0 * 2**-100])
    data, scale = PACKED.quantize(x)
    assert scale.dtype == torch.int32
    assert scale.tolist() == [[(127 | 120 << 8 | 1 << 16 | 137 << 24) - 2**32, 27]]
    assert torch.equal(PACKED.dequantize(Quantized(data, scale), torch.float32), x)


def test_zeros_and_subnormals_have_the_smallest_normal_scale():
    x = torch.tensor([[0.0, 0.0, -0.0, 0.0, 2.0**-126, 2.0**-149, -(2.0**-127), 2.0**-135]])
    data, scale = F32.quantize(x)
    assert scale.tolist() == [[2.0**-126] * 2]
    assert data.float().tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0, 0.0, -0.5, 2.0**-9]]
    assert UE8M0.quantize(x).scale.view(torch.uint8).tolist() == [[1, 1]]


def test_values_that_are_not_finite_become_nan_and_leave_the_others_alone():
    nan, inf = float("nan"), float("inf")
    data, scale = F32.quantize(
        torch.tensor([[1.0, nan, 448.0, -2.0, inf, 3.5, -inf, 0.875], [nan, inf, nan, -inf] * 2])
    )
    assert str(data.float()[0].tolist()) == str([1.0, nan, 448.0, -2.0, nan, 448.0, nan, 112.0])
    assert data[1].isnan().all()
    assert scale.tolist() == [[1.0, 2.0**-7], [2.0**-126] * 2]


FLOAT32_BITS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.integers(0x42000000, 0x42800000),  # of one magnitude, so that they share a scale and ties are near
    st.sampled_from([0, 1 << 31, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x43E00000]),
)


@pytest.mark.parametrize("wire", WIRES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(bits=st.lists(FLOAT32_BITS, min_size=40, max_size=40))
def test_any_bits_give_what_the_formula_says(wire, dtype, bits):
    raw = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.int32))
    x = raw.view(torch.float32) if dtype == torch.float32 else (raw >> 16).to(torch.int16).view(dtype)
    x = x.view(2, 20)
    data, scale = wire.quantize(x)
    scales = wire._float_scale(scale, 5)
    for row in range(2):
        for block in range(5):
            values = x[row, 4 * block : 4 * block + 4].double().tolist()
            codes, s = defined(values, pow2=wire is not F32)
            got = data[row, 4 * block : 4 * block + 4]
            assert [None if v.isnan() else int(v.view(torch.uint8)) for v in got] == codes, values
            assert scales[row, block].item() == s, values


@pytest.mark.parametrize("wire", WIRES, ids=repr)
@given(seed=st.integers(0, 2**20), exponent=st.integers(-120, 110))
def test_dequantized_values_are_products_rounded_once(wire, seed, exponent):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, 12, generator=g) * 2.0**exponent
    rows = wire.quantize(x.view(6, 12))
    rows = Quantized(rows.data.view(3, 2, 12), rows.scale.view(3, 2, -1))
    scale = wire._float_scale(rows.scale, 3).double().repeat_interleave(4, dim=-1)
    product = (rows.data.float().double() * scale).float()
    assert torch.equal(wire.dequantize(rows, torch.float32), product)
    assert torch.equal(wire.dequantize(rows), product.bfloat16())
    # Half a step of e4m3, relative to the block's largest value where a value is small.
    step = x.view(3, 2, 3, 4).abs().amax(-1, keepdim=True) * (2.0**-8 if wire is F32 else 2.0**-7)
    assert (
        (wire.dequantize(rows, torch.float32) - x).abs().view(3, 2, 3, 4) <= x.abs().view(3, 2, 3, 4) / 16 + step
    ).all()


def test_every_e4m3_value_survives_the_cast():
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    x = torch.cat([codes.view(torch.float8_e4m3fn).float(), torch.tensor([448.0, -448.0])]).view(1, -1)
    data, scale = Fp8(block=256).quantize(x)
    assert scale.item() == 1.0
    assert torch.equal(data.view(torch.uint8)[0, :-2], codes)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Fp8(block=0), "block=0 values per scale; pass a positive divisor of hidden"),
        (lambda: Fp8(block=128.0), "block=128.0 values per scale; pass a positive divisor of hidden"),
        (lambda: Fp8(pow2="no"), "pow2='no'; pass True or False"),
        (lambda: Fp8(scale="e8m0"), "scale='e8m0' is not a scale format; pass 'f32' or 'ue8m0'"),
        (lambda: Opaque(dtype=torch.float64), "dtype=torch.float64; pass a torch.dtype of 1 to 4 bytes"),
        (lambda: Opaque(dtype=torch.qint8), "dtype=torch.qint8; pass a torch.dtype of 1 to 4 bytes"),
        (lambda: Opaque(scale_dtype="f32"), "scale_dtype='f32'; pass a torch.dtype"),
        (lambda: Opaque(values_per_element=0), "values_per_element=0; pass a positive integer"),
        (lambda: Opaque(block=0), "block=0; pass a positive integer"),
        (lambda: Opaque(column_major=True), "column_major=True says how scales lie, and block=None has none"),
        (
            lambda: Spec(num_experts=8, num_topk=2, hidden=15, max_tokens=4, wire=Opaque(values_per_element=2)),
            "hidden=15 is not divisible by values_per_element=2; pass a divisor of hidden, or pad",
        ),
        (
            lambda: Spec(num_experts=8, num_topk=2, hidden=16, max_tokens=4, combine_wire=Opaque()),
            "combine_wire=Opaque.* cannot be summed; pass an unquantized one: Bf16",
        ),
        (lambda: Fp8(packed=True), "packed=True packs exponent bytes, but scale='f32'; pass scale='ue8m0'"),
        (
            lambda: Spec(num_experts=8, num_topk=2, hidden=100, max_tokens=4, wire=Fp8()),
            "hidden=100 is not divisible by the scale block 128; pass Fp8.block=....",
        ),
    ],
)
def test_a_format_that_cannot_be_is_refused(build, says):
    with pytest.raises(ConfigError, match=says):
        build()


@pytest.mark.parametrize(("wire", "want"), [(Bf16(), 0), (Fp8(block=8), 5), (UE8M0, 10), (PACKED, 3)], ids=repr)
def test_num_scales_counts_columns(wire, want):
    assert wire.num_scales(40) == want
