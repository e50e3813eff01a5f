"""Dispatch on CUDA against the oracle, bit for bit: every layout, format and size of rows, however they are moved."""

import pytest
import torch

from crossdock import Bf16, Compact, Expanded, Fp8, Fp32, Padded
from tests.cases import check_received, loads, make_case, observed
from tests.world import device, open_buffer
from tests.worlds import test_dispatch as programs
from tests.worlds.test_dispatch import LAYOUTS, WIRES, check_each, spec_of

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
FEW_WIRES = [Bf16(), Fp8(block=8)]
SIZES = [
    (16, Fp8(block=16)),
    (40, Bf16()),
    (40, Fp8(block=8, scale="ue8m0", packed=True)),
    (1040, Bf16()),
    (1040, Fp8(block=16, pow2=True)),
    (2880, Fp32()),
    (2880, Fp8(block=64, scale="ue8m0")),
    (7168, Fp8(block=128)),
]
LAUNCHES = [
    {"num_sms": 1},
    {"num_sms": 2},
    {"debug": False},
    {"expand": "sender"},
    {"expand": "receiver"},
    {"expand": "receiver", "num_sms": 1},
]


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("wire", WIRES, ids=repr)
@layouts
def test_brings_every_row_to_its_place(world, layout, wire):
    check_each(world, loads(spec_of(layout, wire), world.num_ranks))


@pytest.mark.worlds("cuda-1", "cuda-4", "cudathreads-4")
@pytest.mark.parametrize("wire", FEW_WIRES, ids=repr)
@layouts
def test_brings_every_row_to_its_place_in_other_worlds(world, layout, wire):
    check_each(world, loads(spec_of(layout, wire), world.num_ranks))


@pytest.mark.worlds("cuda-3", "cuda-4", "cuda-8")
@layouts
def test_brings_every_row_to_its_place_among_many_and_odd_ranks(world, layout):
    num_experts = {3: 6, 4: 160, 8: 384}[world.num_ranks]
    check_each(world, loads(spec_of(layout, num_experts=num_experts), world.num_ranks))


@pytest.mark.worlds("cuda-3")
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=16), Padded()], ids=repr)
def test_brings_every_row_to_its_place_among_384_experts(world, layout):
    check_each(world, loads(spec_of(layout, num_experts=384, num_topk=8), 3))


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize(("hidden", "wire"), SIZES, ids=repr)
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=8)], ids=repr)
def test_brings_rows_of_every_size_to_their_places(world, layout, hidden, wire):
    check_each(world, loads(spec_of(layout, wire, hidden=hidden), world.num_ranks))


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize("launch", LAUNCHES, ids=repr)
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=8), Padded()], ids=repr)
def test_how_rows_are_moved_is_not_seen_in_them(world, layout, launch):
    if "expand" in launch and not layout.per_pick:
        pytest.skip("a rank gets a row once here: there is nothing to expand")
    check_each(world.opening(**launch), loads(spec_of(layout, Fp8(block=8)), world.num_ranks))


@pytest.mark.worlds("cuda-2", "cuda-4")
@pytest.mark.parametrize("wire", FEW_WIRES, ids=repr)
def test_copy_engines_bring_every_row_to_its_place(world, wire):
    check_each(world.opening(engine="copy"), loads(spec_of(Compact(), wire), world.num_ranks))


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("rows", ["exact", "capacity"])
@layouts
def test_both_row_modes_bring_the_same(world, layout, rows):
    check_each(world, loads(spec_of(layout, Fp8(block=8)), world.num_ranks), rows)


def dispatch_many(group, cases):
    """Many tokens: more rows than one program, or one block of counts, deals with. SMs differ by rank and call."""
    with open_buffer(group, cases[0].spec) as buffer:
        r = buffer.rank
        given = [
            {"weights": case.weights[r], "extras": case.extras[r], "num_sms": (None, 1, 2, 3)[(r + i) % 4]}
            for i, case in enumerate(cases)
        ]
        return [
            observed(buffer.dispatch(case.x[r], case.topk[r], **more)) for case, more in zip(cases, given, strict=True)
        ]


@pytest.mark.worlds("cuda-2", "cuda-8")
@layouts
def test_brings_many_tokens_whatever_sms_each_rank_gives_to_each_call(world, layout):
    spec = spec_of(layout, num_experts=64, max_tokens=300, hidden=32)
    cases = [make_case(spec, [300 - 7 * r for r in range(world.num_ranks)], seed=seed) for seed in range(2)]
    cases.append(make_case(spec, [300] * world.num_ranks, picks="one"))
    got = world.run(dispatch_many, cases)
    for i, case in enumerate(cases):
        check_received(case, [mine[i] for mine in got])


@pytest.mark.worlds("cuda-2")
@layouts
def test_needs_no_weights_and_no_extras(world, layout):
    programs.test_needs_no_weights_and_no_extras(world, layout)


@pytest.mark.worlds("cuda-4")
@layouts
def test_gives_the_same_bits_on_every_run(world, layout):
    programs.test_gives_the_same_bits_on_every_run(world, layout)


@pytest.mark.worlds("cuda-2", "cudathreads-4")
@layouts
def test_a_plan_sends_other_rows_the_same_way(world, layout):
    programs.test_a_plan_sends_other_rows_the_same_way(world, layout)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("expand", ["sender", "receiver"])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=repr)
def test_a_plan_sends_other_rows_the_same_way_however_they_are_expanded(world, layout, expand):
    programs.test_a_plan_sends_other_rows_the_same_way(world.opening(expand=expand), layout)


def send_along_a_remade_plan(group, cases):
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r = buffer.rank
        plan = buffer.dispatch(cases[0].x[r], cases[0].topk[r]).plan
        remade = buffer.remake_plan(plan.topk_idx, plan.counts, plan.partial_rows)
        return [
            observed(buffer.dispatch(case.x[r], remade, weights=case.weights[r], extras=case.extras[r]))
            for case in cases
        ]


@pytest.mark.worlds("cuda-2")
@layouts
def test_a_plan_remade_from_its_tensors_sends_rows_the_same_way(world, layout):
    cases = [make_case(spec_of(layout), [9, 4], seed=seed) for seed in range(3)]
    got = world.run(send_along_a_remade_plan, cases)
    for i, case in enumerate(cases):
        object.__setattr__(case, "topk", cases[0].topk)
        check_received(case, [mine[i] for mine in got])


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("combine_wire", [Bf16(), Fp32()], ids=repr)
@layouts
def test_wide_rows_travel_in_the_combine_format(world, layout, combine_wire):
    programs.test_wide_rows_travel_in_the_combine_format(world, layout, combine_wire)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("wire", WIRES[3:], ids=repr)
@pytest.mark.parametrize("layout", [Compact(), Padded()], ids=repr)
def test_rows_a_caller_has_quantised_travel_as_they_are(world, layout, wire):
    programs.test_rows_a_caller_has_quantised_travel_as_they_are(world, layout, wire)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("wire", [Bf16(), Fp32(), *WIRES[3:]], ids=repr)
def test_nan_and_infinity_travel(world, wire):
    programs.test_nan_and_infinity_travel(world, Expanded(), wire)


TIGHT = pytest.mark.parametrize("layout", [Compact(capacity=7), Expanded(capacity=12), Padded(capacity=3)], ids=repr)


@pytest.mark.worlds("cuda-2", "cuda-4")
@TIGHT
def test_an_overflow_raises_the_same_on_every_rank_before_a_row_moves(world, layout):
    programs.test_an_overflow_raises_the_same_on_every_rank_before_a_row_moves(world, layout)


@pytest.mark.worlds("cuda-2", "cuda-4")
@TIGHT
def test_an_overflow_without_a_host_sync_gives_nothing_and_is_told_later(world, layout):
    programs.test_an_overflow_without_a_host_sync_gives_nothing_and_is_told_later(world, layout)


@pytest.mark.worlds("cuda-2")
def test_ranks_that_disagree_about_width_are_told(world):
    programs.test_ranks_that_disagree_about_width_are_told(world)


def look_where_things_are(group, case):
    """Tensors of a result that are not on the program's device, by name; and how buffer and launch print."""
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
        out, home = buffer.combine(recv.x, recv.plan, extras=[torch.ones(recv.x.shape[:-1], device=device())])
        tensors = vars(recv) | {f"plan.{name}": value for name, value in vars(recv.plan).items()}
        tensors |= {"x": recv.x, "output_rows": recv.output_rows(), "extras": recv.extras[0]}
        tensors |= {"out": out, "home": home[0], "stats": buffer.stats.num_tokens_per_expert}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        elsewhere = {name: value.device for name, value in tensors.items() if value.device != device()}
        picks = int(buffer.stats.num_tokens_per_expert.sum())
        return len(tensors), elsewhere, buffer.device == device(), str(buffer.launch), picks


@pytest.mark.worlds("cuda-2", "cudathreads-2")
@pytest.mark.parametrize("layout", [Compact(), Expanded(), Padded()], ids=repr)
def test_everything_it_gives_is_on_the_device(world, layout):
    case = make_case(spec_of(layout), [9, 9])
    got = world.opening(num_sms=2).run(look_where_things_are, case)
    for num_tensors, elsewhere, is_here, launch, _ in got:
        assert num_tensors > 10
        assert not elsewhere
        assert is_here
        assert "num_sms=2" in launch
        assert "\n" not in launch
    assert sum(picks for *_, picks in got) == sum(int((topk >= 0).sum()) for topk in case.topk)
