"""Rows there and back on CUDA, bit for bit: of every size, however they are moved, among however many ranks."""

import pytest

from crossdock import Bf16, Compact, Expanded, Fp8, Fp32, Padded
from tests import oracle
from tests.cases import check_received, loads, make_case, observed, same_bits
from tests.gpu.specs import ALIGNED, STAGED, once_each, once_each_dense, spec_of
from tests.world import open_buffer
from tests.worlds import test_combine as combine
from tests.worlds import test_dispatch as dispatch
from tests.worlds.test_combine import row_weights, weights_of_rows

SIZES = [
    (16, Fp8(block=16), Compact(), "token"),
    (40, Fp8(block=8, scale="ue8m0", packed=True), ALIGNED, "rank"),
    (1040, Bf16(), Compact(), "rank"),
    (2880, Fp32(), ALIGNED, "rank"),
    (2880, Fp8(block=64, scale="ue8m0"), Compact(), "rank"),
    (7168, Fp8(block=128), ALIGNED, "token"),
]
WAYS = [
    ({"num_sms": 1}, Compact(), Bf16(), "rank"),
    ({"num_sms": 2}, ALIGNED, Fp8(block=8), "token"),
    ({"expand": "sender"}, Padded(), Bf16(), "token"),
    ({"expand": "receiver"}, Padded(), Bf16(), "token"),
    ({"expand": "receiver"}, ALIGNED, Fp8(block=8), "rank"),
    ({"expand": "receiver", "num_sms": 1}, Expanded(), Fp8(block=4, scale="ue8m0", packed=True), "token"),
    ({"expand": "receiver"}, ALIGNED, Fp8(block=4, scale="ue8m0", packed=True, column_major=True), "rank"),
    ({}, STAGED, Bf16(), "token"),
    ({}, STAGED, Fp8(block=8), "rank"),
    ({"num_sms": 1}, STAGED, Fp8(block=4, scale="ue8m0", packed=True, column_major=True), "token"),
    ({"mover": "copy"}, Compact(), Bf16(), "token"),
    ({"mover": "copy"}, Compact(), Fp8(block=8, column_major=True), "token"),
    ({"mover": "copy"}, Compact(), Fp8(block=8), "rank"),
]


def check_both(world, spec):
    cases = loads(spec, world.num_ranks)
    dispatch.check_each(world, cases)
    combine.check_each(world, cases[:2])


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize(("hidden", "wire", "layout", "reduce"), SIZES, ids=repr)
def test_rows_of_every_size(world, hidden, wire, layout, reduce):
    check_both(world, spec_of(layout, reduce, wire, hidden=hidden))


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize(("launch", "layout", "wire", "reduce"), WAYS, ids=repr)
def test_how_rows_are_moved_is_not_seen_in_them(world, launch, layout, wire, reduce):
    check_both(world.opening(**launch), spec_of(layout, reduce, wire))


@pytest.mark.worlds("cudathreads-4")
@once_each
def test_ranks_that_are_threads(world, layout, reduce):
    check_both(world, spec_of(layout, reduce))


@pytest.mark.worlds("cuda-3", "cuda-8")
@once_each
def test_many_and_odd_ranks(world, layout, reduce):
    check_both(world, spec_of(layout, reduce, num_experts={3: 6, 8: 384}[world.num_ranks]))


@pytest.mark.worlds("cuda-1", "cuda-3", "cuda-4")
def test_many_experts_of_each_rank(world):
    """Numbers of them that are no powers of two, and more than a program has threads."""
    num_experts, num_topk = {1: (160, 4), 3: (384, 8), 4: (160, 4)}[world.num_ranks]
    check_both(world, spec_of(ALIGNED, "rank", num_experts=num_experts, num_topk=num_topk))


def move_many(group, cases):
    """More rows than a program, or a block of counts, deals with; pushed and pulled. SMs differ by rank and call."""
    with open_buffer(group, cases[0].spec) as buffer:
        r, seen = buffer.rank, []
        for i, case in enumerate(cases):
            recv = buffer.dispatch(
                case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r],
                num_sms=(None, 1, 2, 3)[(r + i) % 4],
            )  # fmt: skip
            came = observed(recv)
            weights = case.weights[r] if case.spec.reduce == "token" else row_weights(recv)
            ways = (case.y[r], recv.output_rows().copy_(case.y[r]))
            outs = [
                buffer.combine(y, recv.plan, weights=weights, num_sms=(3, None, 1)[(r + i + j) % 3])
                for j, y in enumerate(ways)
            ]
            seen.append((came, outs))
        return seen


@pytest.mark.worlds("cuda-4", "cuda-8")
@once_each_dense
def test_many_tokens_whatever_sms_each_rank_gives_to_each_call(world, layout, reduce):
    num_experts = {4: 16, 8: 384}[world.num_ranks]
    spec = spec_of(layout, reduce, num_experts=num_experts, max_tokens=1100)  # of several kernels
    cases = [make_case(spec, [300 - 7 * r for r in range(world.num_ranks)], seed=seed) for seed in range(2)]
    cases.append(make_case(spec, [300] * world.num_ranks, picks="one"))
    got = world.run(move_many, cases)
    for i, case in enumerate(cases):
        check_received(case, [mine[i][0] for mine in got])
        weights = case.weights if reduce == "token" else weights_of_rows(case)
        wants = oracle.combined(spec, case.topk, case.flat_y(), weights)
        assert all(same_bits(out, want) for mine, want in zip(got, wants, strict=True) for out in mine[i][1])
