"""Dispatch on CUDA against the oracle, bit for bit: every layout and format, plans, unquantized rows, overflows."""

from dataclasses import replace

import pytest
import torch

from crossdock import Bf16, Compact, Expanded, Fp8, Fp16, Fp32, Padded, PlanTensors
from tests.cases import check_received, loads, make_case, observed, same_bits
from tests.gpu.specs import ALIGNED, spec_of
from tests.world import device, open_buffer
from tests.worlds import test_dispatch as programs
from tests.worlds.test_dispatch import check_each

FORMATS = [
    (Compact(), Bf16()),
    (Expanded(), Bf16()),
    (Padded(), Bf16()),
    (Expanded(), Fp16()),
    (ALIGNED, Fp32()),
    (Expanded(), Fp8(block=8)),
    (Padded(), Fp8(block=8)),
    (Compact(), Fp8(block=8, pow2=True)),
    (Padded(), Fp8(block=4, scale="ue8m0")),
    (ALIGNED, Fp8(block=4, scale="ue8m0", packed=True)),
]
"""Each wire in one layout, or more."""
formats = pytest.mark.parametrize(("layout", "wire"), FORMATS, ids=repr)
narrow_formats = pytest.mark.parametrize(("layout", "wire"), [FORMATS[6], FORMATS[8], FORMATS[9]], ids=repr)
tight_layouts = pytest.mark.parametrize(
    "layout", [Compact(capacity=7), Expanded(capacity=12), Padded(capacity=3)], ids=repr
)


@pytest.mark.worlds("cuda-2")
@formats
def test_brings_every_row_to_its_place_in_both_row_modes(world, layout, wire):
    cases = loads(programs.spec_of(layout, wire), world.num_ranks)
    check_each(world, cases)
    check_each(world, cases, "capacity")


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("layout", [Compact(), Expanded()], ids=repr)
def test_needs_no_weights_and_no_extras(world, layout):
    case = make_case(programs.spec_of(layout), [9, 4])
    check_received(case, world.run(programs.dispatch_plainly, case), weights=False, extras=False)


@pytest.mark.worlds("cuda-2")
@narrow_formats
def test_rows_a_caller_has_quantised_travel_as_they_are(world, layout, wire):
    programs.test_rows_a_caller_has_quantised_travel_as_they_are(world, layout, wire)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize(
    ("layout", "wire"), [(Padded(), programs.COLUMNS[0]), (ALIGNED, programs.COLUMNS[2])], ids=repr
)
def test_scales_arrive_column_major(world, layout, wire):
    programs.check_columns(world, loads(programs.spec_of(layout, wire), world.num_ranks))


@pytest.mark.worlds("cuda-2")
@narrow_formats
def test_nan_and_infinity_travel(world, layout, wire):
    programs.test_nan_and_infinity_travel(world, layout, wire)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize(
    ("layout", "combine_wire"), [(Compact(), Fp32()), (ALIGNED, Bf16()), (Padded(), Bf16())], ids=repr
)
def test_unquantized_rows_travel_in_the_combine_format(world, layout, combine_wire):
    programs.test_unquantized_rows_travel_in_the_combine_format(world, layout, combine_wire)


@pytest.mark.worlds("cuda-2")
def test_ranks_that_disagree_about_width_are_told(world):
    programs.test_ranks_that_disagree_about_width_are_told(world)


@pytest.mark.worlds("cuda-2")
@tight_layouts
def test_an_overflow_raises_the_same_on_every_rank_before_a_row_moves(world, layout):
    programs.test_an_overflow_raises_the_same_on_every_rank_before_a_row_moves(world, layout)


@pytest.mark.worlds("cuda-2")
@tight_layouts
def test_an_overflow_without_a_host_sync_gives_nothing_and_is_told_later(world, layout):
    programs.test_an_overflow_without_a_host_sync_gives_nothing_and_is_told_later(world, layout)


def send_along_plans(group, cases):
    """Rows along the first case's plan, and along the same made again from its tensors."""
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(cases[0].x[r], cases[0].topk[r])
        plan, nothing = recv.plan, torch.empty(0, dtype=torch.int32, device=device())
        tensors = (plan.topk_idx, plan.counts, plan.partial_rows, recv.src_idx, recv.topk_idx)
        remade = buffer.remake_plan(PlanTensors(*(nothing if tensor is None else tensor for tensor in tensors)))
        return [
            [observed(buffer.dispatch(c.x[r], along, weights=c.weights[r], extras=c.extras[r])) for c in cases]
            for along in (plan, remade)
        ]


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize(
    ("layout", "wire", "launch"),
    [
        (Compact(), Bf16(), {}),
        (ALIGNED, Fp8(block=8), {"expand": "receiver"}),
        (Padded(), Bf16(), {"expand": "sender"}),
    ],
    ids=repr,
)
def test_a_plan_and_one_remade_from_it_send_other_rows_the_same_way(world, layout, wire, launch):
    reduce = "rank" if layout == ALIGNED else "token"
    cases = [make_case(spec_of(layout, reduce, wire), [9, 4, 0, 7], seed=seed) for seed in range(3)]
    got = world.opening(**launch).run(send_along_plans, cases)
    for i, case in enumerate(cases):
        object.__setattr__(case, "topk", cases[0].topk)
        for along in range(2):
            check_received(case, [mine[along][i] for mine in got])


def look_where_things_are(group, case):
    """Tensors of a result that are not on the program's device, by name; and how buffer and launch print."""
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
        out, home = buffer.combine(recv.x, recv.plan, extras=[torch.ones(recv.x.shape[:-1], device=device())])
        tensors = vars(recv) | {f"plan.{name}": value for name, value in vars(recv.plan).items()}
        tensors |= {"src_idx": recv.src_idx, "topk_idx": recv.topk_idx, "weights": recv.weights}
        tensors |= {"x": recv.x, "output_rows": recv.output_rows(), "extras": recv.extras[0]}
        tensors |= {"out": out, "home": home[0], "stats": buffer.stats.num_tokens_per_expert}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        elsewhere = {name: value.device for name, value in tensors.items() if value.device != device()}
        picks = int(buffer.stats.num_tokens_per_expert.sum())
        return len(tensors), elsewhere, buffer.device == device(), str(buffer.launch), picks


@pytest.mark.worlds("cuda-4", "cudathreads-4")
def test_everything_it_gives_is_on_the_device(world):
    case = make_case(spec_of(Compact(), "rank"), [9] * world.num_ranks)
    got = world.opening(num_sms=2).run(look_where_things_are, case)
    for num_tensors, elsewhere, is_here, launch, _ in got:
        assert num_tensors > 10
        assert not elsewhere
        assert is_here
        assert "num_sms=2" in launch
        assert "\n" not in launch
    assert sum(picks for *_, picks in got) == sum(int((topk >= 0).sum()) for topk in case.topk)


def quantize_here(_, x, wire):
    return wire.quantize(x)


@pytest.mark.worlds("cuda-1")
@pytest.mark.parametrize("wire", [Fp8(block=8), Fp8(block=128, scale="ue8m0"), Fp8(block=64, pow2=True)], ids=repr)
def test_rows_are_quantised_to_the_same_bits_as_on_a_cpu(world, wire):
    x = torch.randn(512, 1024).bfloat16() * 2.0 ** torch.randint(-40, 40, (512, 1))
    x[3, 5], x[4, 6], x[7] = float("nan"), -float("inf"), 0.0
    (got,) = world.run(quantize_here, x, wire)
    want = wire.quantize(x)
    assert same_bits(got.data, want.data)
    assert same_bits(got.scale, want.scale)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("wire", [Fp8(block=8), Fp8(block=4, scale="ue8m0")], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_casts_on_the_way_are_those_of_a_cpu_whatever_the_size_of_values(world, dtype, wire):
    case = make_case(programs.spec_of(Compact(), wire), [9, 9])
    smallest, end = (-24, 16) if dtype == torch.float16 else (-133, 127)
    rows = []
    for seed, x in enumerate(case.x):
        exponents = torch.randint(smallest, end, (len(x), x.shape[1] // 8, 1), generator=torch.manual_seed(seed))
        values = (torch.rand(len(x), x.shape[1] // 8, 8) - 0.5) * 2.0**exponents
        values[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
        rows.append(values.view_as(x).to(dtype))
    case = replace(case, x=rows)
    check_received(case, world.run(programs.dispatch_plainly, case), weights=False, extras=False)
