"""Opaque rows: every bit of data and scales arrives as it was sent, and outputs go home in a format of their own."""

from dataclasses import replace

import pytest
import torch

from crossdock import (
    Buffer,
    Compact,
    ConfigError,
    Expanded,
    Fp32,
    Opaque,
    Padded,
    Quantized,
    Spec,
    ThreadGroup,
    autograd,
    nn,
)
from crossdock.masks import drop_picks
from tests import oracle
from tests.cases import EXTRA_BYTES, STAGED, check_received, loads, make_case, observed, same_bits
from tests.world import open_buffer

LAYOUTS = [Compact(), Expanded(alignment=8), Padded(), STAGED]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
WIRES = {
    "bytes": Opaque(),
    "nvfp4": Opaque(values_per_element=2, block=16, scale_dtype=torch.float8_e4m3fn),
    "mxfp8": Opaque(dtype=torch.float8_e4m3fn, block=32, scale_dtype=torch.float8_e8m0fnu, column_major=True),
    "int8, blocks that do not divide": Opaque(dtype=torch.int8, block=7),
    "words of two bytes": Opaque(dtype=torch.bfloat16, values_per_element=2, block=5, scale_dtype=torch.int16),
    "words of four bytes": Opaque(dtype=torch.int32, values_per_element=13, block=26, scale_dtype=torch.uint16),
}
wires = pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)


def spec_of(layout, wire, **options):
    """Rows of 26 values: 26, 13, 8 or 52 bytes of them."""
    options = {"num_experts": 8, "num_topk": 3, "hidden": 26, "max_tokens": 5, "combine_wire": Fp32()} | options
    return Spec(layout=layout, wire=wire, extra_bytes=EXTRA_BYTES, **options)


def send_each(group, cases):
    """Of each case its rows by a fresh dispatch, on a plan into memory of their own, and in two halves."""
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        seen = []
        for case in cases:
            x, topk_idx = case.x[buffer.rank], case.topk[buffer.rank]
            beside = {"weights": case.weights[buffer.rank], "extras": case.extras[buffer.rank]}
            fresh = buffer.dispatch(x, topk_idx, **beside)
            seen.append(observed(fresh))
            seen.append(observed(buffer.dispatch(x, fresh.plan, copy=True, **beside)))
            pending = buffer.dispatch_start(x, topk_idx, rows="capacity", **beside)
            seen.append(observed(pending.wait()))
        return seen


def check_each(world, cases):
    got = world.run(send_each, cases)
    for i, case in enumerate(cases):
        for way in range(3):
            check_received(case, [mine[3 * i + way] for mine in got])


@wires
@layouts
def test_every_bit_arrives(world, layout, wire):
    check_each(world, loads(spec_of(layout, wire), world.num_ranks))


def send_strided(group, case):
    """Rows with gaps, from an odd address, and scales that lie column-major; opaque rows, and rows that are not."""
    with open_buffer(group, case.spec) as buffer:
        data, scale = case.x[buffer.rank]
        room = torch.zeros(data.shape[0], data.shape[1] + 6, dtype=data.dtype)
        apart = room[:, 3:-3]
        apart.copy_(data)
        turned = scale.t().contiguous().t()
        return observed(buffer.dispatch(Quantized(apart, turned), case.topk[buffer.rank]))


@pytest.mark.worlds("inproc-2", "interpreted-2")
@pytest.mark.parametrize("name", ["nvfp4"])
def test_rows_may_have_any_strides_and_begin_anywhere(world, name):
    case = make_case(spec_of(Expanded(), WIRES[name]), [5, 4])
    check_received(case, world.run(send_strided, case), weights=False, extras=False)


def go_and_come_home(group, case, y):
    with open_buffer(group, case.spec) as buffer:
        rank = buffer.rank
        recv = buffer.dispatch(case.x[rank], case.topk[rank])
        assert recv.output_rows().shape[-1] == case.spec.hidden
        out = buffer.combine(y[rank], recv.plan, weights=case.weights[rank])
        wide = torch.full((case.topk[rank].shape[0], case.spec.hidden), 1.0 + rank)
        came = buffer.dispatch(wide, recv.plan, unquantized=True)
        return out, came.x[..., 0].clone(), came.src_idx // case.spec.max_tokens


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("name", ["nvfp4", "words of two bytes"])
@layouts
def test_outputs_go_home_in_their_own_format(world, layout, name):
    check_home(world, make_case(spec_of(layout, WIRES[name]), [5, 3]))


@pytest.mark.worlds("interpreted-2")
def test_outputs_go_home_by_kernels_in_their_own_format(world):
    check_home(world, make_case(spec_of(Expanded(), WIRES["words of two bytes"]), [5, 3]))


def check_home(world, case):
    got = world.run(go_and_come_home, case, case.y)
    wants = oracle.combined(case.spec, case.topk, case.flat_y(), case.weights)
    for (out, came, sources), want in zip(got, wants, strict=True):
        assert same_bits(out, want)
        is_row = sources >= 0
        assert torch.equal(came[is_row], 1.0 + sources[is_row])


@pytest.mark.worlds("interpreted-2")
@pytest.mark.parametrize(
    ("layout", "name", "options"),
    [
        (Compact(), "bytes", {}),
        (Compact(), "words of two bytes", {}),
        (Compact(), "words of four bytes", {"mover": "copy"}),
        (Compact(), "mxfp8", {"mover": "copy"}),
        (Expanded(alignment=8), "nvfp4", {"expand": "receiver"}),
        (Expanded(alignment=8), "int8, blocks that do not divide", {"expand": "sender"}),
        (Padded(), "mxfp8", {"expand": "receiver"}),
        (Padded(), "words of four bytes", {"expand": "sender"}),
    ],
    ids=str,
)
def test_every_bit_arrives_by_kernels(world, layout, name, options):
    """Also of rows of odd numbers of bytes, by calls that are one kernel; staged rows are multiples of 16 bytes."""
    hidden = 32 if options.get("expand") == "receiver" else 26
    check_each(world.opening(**options), loads(spec_of(layout, WIRES[name], hidden=hidden), 2)[1:2])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float8_e5m2, torch.float4_e2m1fn_x2, torch.uint32])
def test_any_dtype_of_up_to_four_bytes_is_carried(dtype):
    spec = Spec(num_experts=2, num_topk=2, hidden=4, max_tokens=2, wire=Opaque(dtype=dtype, block=2, scale_dtype=dtype))
    bits = (torch.arange(2 * 4 * dtype.itemsize) * 37 % 256).to(torch.uint8).view(2, -1)
    data = bits.view(dtype)
    scale = bits[:, : 2 * dtype.itemsize].contiguous().view(dtype)
    with Buffer(ThreadGroup.world(1)[0], spec) as buffer:
        recv = buffer.dispatch(Quantized(data, scale), torch.tensor([[0, 1], [1, -1]]), copy=True)
        for got, sent in zip(recv.x, (data, scale), strict=True):
            assert got.dtype == dtype
            assert torch.equal(got.view(torch.uint8), sent.view(torch.uint8))


def test_nan_and_minus_zero_keep_their_bits():
    """float16 rows whose bits mean nothing to us: signalling NaNs among them."""
    sent = torch.tensor([[0x7C01, -0x8000, 0x7E05, -0x3FF]], dtype=torch.int16)
    spec = Spec(num_experts=1, num_topk=1, hidden=4, max_tokens=1, wire=Opaque(dtype=torch.float16))
    with Buffer(ThreadGroup.world(1)[0], spec) as buffer:
        recv = buffer.dispatch(sent.view(torch.float16), torch.tensor([[0]]))
        assert torch.equal(recv.x.view(torch.int16), sent)


BAD_ROWS = {
    "not quantised": (
        lambda _: torch.zeros(2, 8, dtype=torch.bfloat16),
        ("x is bfloat16", "casts nothing", "data uint8 [tokens, 4] and scale int16 [tokens, 3]", "wire=Fp8"),
    ),
    "without scales": (lambda x: x.data, ("x is uint8", "Quantized(data, scale)")),
    "dtype of data": (lambda x: Quantized(x.data.view(torch.int8), x.scale), ("x is Quantized int8", "data uint8")),
    "columns of data": (
        lambda x: Quantized(x.data[:, :3].contiguous(), x.scale),
        ("x has shape [2, 3]", "[tokens, 4 of hidden=8]"),
    ),
    "columns of scales": (lambda x: Quantized(x.data, x.scale[:, :2]), ("x.scale is int16 [2, 2]", "[2, 3]")),
    "dtype of scales": (lambda x: Quantized(x.data, x.scale.int()), ("x.scale is int32 [2, 3]", "torch.int16")),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_of_another_format_are_refused(name):
    spec = Spec(
        num_experts=2, num_topk=1, hidden=8, max_tokens=2,
        wire=Opaque(values_per_element=2, block=3, scale_dtype=torch.int16),
    )  # fmt: skip
    good = Quantized(torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int16))
    bad, texts = BAD_ROWS[name]
    with Buffer(ThreadGroup.world(1)[0], spec) as buffer:
        with pytest.raises(ConfigError) as caught:
            buffer.dispatch(bad(good), torch.tensor([[0], [1]]))
        assert all(text in str(caught.value) for text in texts), caught.value
        assert buffer.dispatch(good, torch.tensor([[0], [1]])).num_rows == 2


def test_scales_where_there_are_none_are_refused():
    spec = Spec(num_experts=2, num_topk=1, hidden=8, max_tokens=2, wire=Opaque())
    says = r"x is Quantized uint8; .*pass data uint8 \[tokens, 8\]"
    with Buffer(ThreadGroup.world(1)[0], spec) as buffer, pytest.raises(ConfigError, match=says):
        buffer.dispatch(Quantized(torch.zeros(1, 8, dtype=torch.uint8), torch.zeros(1, 1)), torch.tensor([[0]]))


def test_they_have_no_gradients():
    spec = Spec(num_experts=2, num_topk=1, hidden=8, max_tokens=2, wire=Opaque())
    says = r"wire=Opaque.* carries opaque rows.*Bf16\(\) or Fp8\(\), or use Buffer.dispatch"
    with Buffer(ThreadGroup.world(1)[0], spec) as buffer:
        with pytest.raises(ConfigError, match=says):
            autograd.dispatch(buffer, torch.zeros(1, 8, dtype=torch.uint8), torch.tensor([[0]]))
        with pytest.raises(ConfigError, match=says):
            nn.ExpertParallel(nn.Gate(8, num_experts=2, num_topk=1), nn.GroupedExperts(2, 8, 16), buffer)


def go_on_without(group, case):
    """A rank leaves, the others mask it and go on."""
    with open_buffer(group, case.spec) as buffer:
        if buffer.rank == 1:
            return None
        buffer.mask(1)
        return observed(buffer.dispatch(case.x[buffer.rank], case.topk[buffer.rank]))


@pytest.mark.worlds("inproc-3")
def test_ranks_go_on_without_one_that_is_gone(world):
    spec = spec_of(Expanded(alignment=8), WIRES["nvfp4"], num_experts=6)
    case = make_case(spec, [5, 0, 4])
    meant = replace(case, topk=[drop_picks(idx, (1,), num_local=2) for idx in case.topk])
    got = world.run(go_on_without, case)
    wants = oracle.received(spec, meant.topk, meant.x)
    for rank in (0, 2):
        assert all(same_bits(got[rank][key], wants[rank][key]) for key in wants[rank])


def set_up(group, wires):
    with Buffer(group, spec_of(Compact(), wires[group.rank])):
        pass


@pytest.mark.worlds("inproc-2")
def test_ranks_must_agree_on_it(world):
    wire = WIRES["nvfp4"]
    for error in world.outcomes(set_up, [wire, replace(wire, block=13)]):
        assert isinstance(error, ConfigError)
        assert "wire: Opaque(dtype=torch.uint8, values_per_element=2, block=16" in str(error)
        assert "block=13" in str(error)
