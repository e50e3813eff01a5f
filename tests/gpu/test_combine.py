"""Combine on CUDA against the oracle, bit for bit: where sums are made, how rows go return_row, weights, bias,
extras."""

import pytest

from crossdock import Bf16, Compact, Expanded, Fp8, Fp16, Fp32, Padded
from tests import oracle
from tests.cases import loads, make_case, same_bits
from tests.gpu.specs import ALIGNED, layouts, once_each, once_each_dense, reduces, spec_of
from tests.worlds import test_combine as programs
from tests.worlds.test_combine import check_each, weights_of_rows

FORMATS = [
    (ALIGNED, "token", Fp32(), None),
    (Padded(), "token", Fp8(block=8), None),
    (Expanded(), "rank", Fp8(block=8), None),
    (Compact(), "token", Fp8(block=8), Fp32()),
    (Compact(), "rank", Fp8(block=8), Fp16()),
    (Padded(), "rank", Fp8(block=8), Fp16()),
]
"""Layout, who sums, and the wires there and back."""


@pytest.mark.worlds("cuda-4")
@reduces
@layouts
def test_sums_every_row_in_its_order(world, layout, reduce):
    check_each(world, loads(spec_of(layout, reduce), world.num_ranks))


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize(("layout", "reduce", "wire", "combine_wire"), FORMATS, ids=repr)
def test_rows_go_home_in_every_format(world, layout, reduce, wire, combine_wire):
    spec = programs.spec_of(layout, wire, reduce, combine_wire=combine_wire)
    check_each(world, loads(spec, world.num_ranks)[:2])


@pytest.mark.worlds("cuda-4")
@once_each
def test_some_ranks_push_while_others_are_pulled_from(world, layout, reduce):
    case = make_case(spec_of(layout, reduce), [9] * world.num_ranks)
    got = world.run(programs.combine_in_mixed_ways, case)
    wants = oracle.combined(case.spec, case.topk, case.flat_y(), case.weights if reduce == "token" else None)
    assert all(map(same_bits, got, wants))


@pytest.mark.worlds("cuda-4")
@once_each_dense
def test_rows_behind_the_last_count_for_nothing(world, layout, reduce):
    case = make_case(spec_of(layout, reduce), [9] * world.num_ranks)
    weights = case.weights if reduce == "token" else weights_of_rows(case)
    wants = oracle.combined(case.spec, case.topk, case.flat_y(), weights)
    for outs, want in zip(world.run(programs.combine_at_capacity, case), wants, strict=True):
        assert all(same_bits(out, want) for out in outs)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize(("reduce", "want"), [("token", 0.5), ("rank", 1.5)])
def test_the_order_of_a_sum_is_that_of_picks_or_of_ranks(world, reduce, want):
    programs.test_the_order_of_a_sum_is_that_of_picks_or_of_ranks(world, reduce, want)


@pytest.mark.worlds("cuda-4")
@once_each_dense
def test_nan_infinity_and_signed_zeros_stay_where_they_are(world, layout, reduce):
    case = make_case(spec_of(layout, reduce, Bf16()), [9] * world.num_ranks, seed=3)
    for y in case.flat_y():
        y[::5, 3], y[1::4, 5], y[:, 7] = float("nan"), float("inf"), -0.0
    wants = oracle.combined(case.spec, case.topk, case.flat_y())
    for out, want in zip(world.run(programs.combine_not_finite, case), wants, strict=True):
        assert all(map(same_bits, *([t.isnan(), t.nan_to_num(nan=7.0, posinf=float("inf"))] for t in (out, want))))
        assert not out[:, 7].signbit().any()  # a sum begins with 0, and 0 + -0.0 is 0.0
