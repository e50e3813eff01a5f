"""Combine on CUDA against the oracle, bit for bit: where sums are made, how rows go home, weights, bias, extras."""

import pytest

from crossdock import Bf16, Compact, Expanded, Fp8, Fp16, Fp32, Padded
from tests import oracle
from tests.cases import loads, make_case, same_bits
from tests.world import open_buffer
from tests.worlds import test_combine as programs
from tests.worlds.test_combine import LAYOUTS, WIRES, check_each, row_weights, spec_of, weights_of_rows

reduces = pytest.mark.parametrize("reduce", ["token", "rank"])
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
LAUNCHES = [{"num_sms": 1}, {"num_sms": 2}, {"debug": False}, {"expand": "sender"}, {"expand": "receiver"}]


@pytest.mark.worlds("cuda-2")
@reduces
@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: type(wire).__name__)
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=8), Padded()], ids=repr)
def test_sums_every_row_in_its_order(world, layout, wire, reduce):
    check_each(world, loads(spec_of(layout, wire, reduce), world.num_ranks))


@pytest.mark.worlds("cuda-1", "cudathreads-4")
@reduces
@layouts
def test_sums_every_row_in_its_order_in_other_worlds(world, layout, reduce):
    check_each(world, loads(spec_of(layout, Bf16(), reduce), world.num_ranks)[:3])


@pytest.mark.worlds("cuda-3", "cuda-4", "cuda-8")
@reduces
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=8), Padded()], ids=repr)
def test_sums_every_row_in_its_order_among_many_and_odd_ranks(world, layout, reduce):
    num_experts = {3: 6, 4: 160, 8: 384}[world.num_ranks]
    check_each(world, loads(spec_of(layout, Bf16(), reduce, num_experts=num_experts), world.num_ranks)[:2])


@pytest.mark.worlds("cuda-3")
@reduces
@pytest.mark.parametrize("layout", [Compact(), Expanded()], ids=repr)
def test_sums_every_row_in_its_order_among_384_experts(world, layout, reduce):
    check_each(world, loads(spec_of(layout, Bf16(), reduce, num_experts=384, num_topk=8), 3)[:1])


@pytest.mark.worlds("cuda-2")
@reduces
@pytest.mark.parametrize("hidden", [16, 40, 1040, 2880])
@pytest.mark.parametrize("layout", [Compact(), Expanded()], ids=repr)
def test_sums_rows_of_every_size(world, layout, hidden, reduce):
    wire = Fp32() if hidden == 2880 else Bf16()
    check_each(world, loads(spec_of(layout, wire, reduce, hidden=hidden), world.num_ranks)[:2])


@pytest.mark.worlds("cuda-4")
@reduces
@pytest.mark.parametrize("launch", LAUNCHES, ids=repr)
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=8)], ids=repr)
def test_how_rows_are_moved_is_not_seen_in_the_sums(world, layout, launch, reduce):
    if "expand" in launch and not layout.per_pick:
        pytest.skip("a rank gets a row once here: there is nothing to expand")
    check_each(world.opening(**launch), loads(spec_of(layout, Bf16(), reduce), world.num_ranks)[:2])


@pytest.mark.worlds("cuda-2", "cuda-4")
@reduces
def test_copy_engines_bring_rows_home(world, reduce):
    check_each(world.opening(engine="copy"), loads(spec_of(Compact(), Bf16(), reduce), world.num_ranks)[:3])


@pytest.mark.worlds("cuda-2")
@reduces
@pytest.mark.parametrize("combine_wire", [Fp16(), Fp32()], ids=repr)
@pytest.mark.parametrize("layout", [Compact(), Padded()], ids=repr)
def test_rows_go_home_in_a_format_of_their_own(world, layout, reduce, combine_wire):
    spec = spec_of(layout, Fp8(block=8), reduce, combine_wire=combine_wire)
    check_each(world, loads(spec, world.num_ranks)[:2])


@pytest.mark.worlds("cuda-2")
@layouts
def test_extras_of_several_values_come_home_to_a_rank_that_sent_nothing(world, layout):
    programs.test_extras_of_several_values_come_home_to_a_rank_that_sent_nothing(world, layout)


@pytest.mark.worlds("cuda-4", "cudathreads-2")
@reduces
@layouts
def test_some_ranks_push_while_others_are_pulled_from(world, layout, reduce):
    programs.test_some_ranks_push_while_others_are_pulled_from(world, layout, reduce)


@pytest.mark.worlds("cuda-2")
@reduces
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=repr)
def test_rows_behind_the_last_count_for_nothing(world, layout, reduce):
    programs.test_rows_behind_the_last_count_for_nothing(world, layout, reduce)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize(("reduce", "want"), [("token", 0.5), ("rank", 1.5)])
def test_the_order_of_a_sum_is_that_of_picks_or_of_ranks(world, reduce, want):
    programs.test_the_order_of_a_sum_is_that_of_picks_or_of_ranks(world, reduce, want)


@pytest.mark.worlds("cuda-2")
@reduces
@layouts
def test_nan_infinity_and_signed_zeros_stay_where_they_are(world, layout, reduce):
    programs.test_nan_infinity_and_signed_zeros_stay_where_they_are(world, layout, reduce)


def combine_many(group, case):
    """Twice each, pushed and pulled; SMs differ by rank and call."""
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r])
        weights = case.weights[r] if case.spec.reduce == "token" else row_weights(recv)
        ways = [case.y[r], recv.output_rows().copy_(case.y[r])]
        return [
            buffer.combine(y, recv.plan, weights=weights, num_sms=(None, 1, 2, 3)[(r + i) % 4])
            for i, y in enumerate(ways * 2)
        ]


@pytest.mark.worlds("cuda-2", "cuda-8")
@reduces
@pytest.mark.parametrize("layout", [Compact(), Expanded()], ids=repr)
def test_sums_many_tokens_whatever_sms_each_rank_gives_to_each_call(world, layout, reduce):
    spec = spec_of(layout, Bf16(), reduce, num_experts=64, max_tokens=200, hidden=32)
    case = make_case(spec, [200 - 7 * r for r in range(world.num_ranks)])
    weights = case.weights if reduce == "token" else weights_of_rows(case)
    wants = oracle.combined(spec, case.topk, case.flat_y(), weights)
    for outs, want in zip(world.run(combine_many, case), wants, strict=True):
        assert all(same_bits(out, want) for out in outs)
