"""Calls of fewer tokens than the Spec has room for, and of more: ``dispatch(max_tokens=)``."""

from dataclasses import replace

import pytest
import torch

from crossdock import CapacityError, Compact, ConfigError, Expanded, Fp8, Fp32, Padded, PeerFailed, Quantized, Spec
from tests import oracle
from tests.cases import EXTRA_BYTES, check_received, make_case, observed, same_bits
from tests.world import open_buffer

M = 9
COLUMNS = Fp8(block=4, scale="ue8m0", packed=True, column_major=True)
KINDS = [
    (Compact(), Fp32(), "token"),
    (Compact(), COLUMNS, "rank"),
    (Expanded(alignment=4), Fp8(block=8), "token"),
    (Expanded(), Fp32(), "rank"),
    (Padded(), COLUMNS, "token"),
    (Padded(), Fp8(block=8), "rank"),
    (Padded(capacity=13), Fp32(), "token"),
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=repr)
ALL = "inproc-2", "processes-2", "inproc-4", "interpreted-2"


def spec_of(kind, num_ranks, **options):
    layout, wire, reduce = kind
    options = {"num_experts": 4 * num_ranks, "num_topk": 3, "hidden": 24, "max_tokens": M} | options
    return Spec(
        layout=layout, wire=wire, reduce=reduce, combine_wire=Fp32(), extra_bytes=EXTRA_BYTES, num_slots=3, **options
    )


def cases_of(spec, num_ranks, sizes):
    """Of calls of such M, each rank with its M or a little less."""
    return [
        make_case(replace(spec, max_tokens=m), [max(0, m - (r + i) % 3) for r in range(num_ranks)], seed=i)
        for i, m in enumerate(sizes)
    ]


def in_turn(group, spec, cases, rows):
    """Each case's rows, fresh and along the plan, and sums of outputs that are pushed, and that lie where rows came."""
    with open_buffer(group, spec, debug=True) as buffer:
        r, seen = buffer.rank, []
        for case in cases:
            given = {"weights": case.weights[r], "extras": case.extras[r]}
            most = case.spec.max_tokens
            recv = buffer.dispatch(case.x[r], case.topk[r], rows=rows, max_tokens=most, **given)
            assert recv.plan.extent.max_tokens == most
            fresh = observed(recv)
            again = observed(buffer.dispatch(case.x[r], recv.plan, rows=rows, max_tokens=most, copy=True, **given))
            out_rows = recv.output_rows()
            assert out_rows.shape[:-1] == (recv.x.data if isinstance(recv.x, Quantized) else recv.x).shape[:-1]
            assert out_rows.is_contiguous()
            of_rows = case.y[r].reshape(-1, spec.hidden)
            out_rows.view(-1, spec.hidden)[: of_rows.shape[0]] = of_rows
            pushed = buffer.combine(out_rows.clone(), recv.plan)
            seen.append((fresh, again, pushed, buffer.combine(out_rows, recv.plan)))
        buffer.check()
        return seen


def check_in_turn(world, kind, rows, sizes):
    spec = spec_of(kind, world.num_ranks)
    cases = cases_of(spec, world.num_ranks, sizes)
    got = world.run(in_turn, spec, cases, rows)
    for i, case in enumerate(cases):
        for way in range(2):
            check_received(case, [mine[i][way] for mine in got])
        wants = oracle.combined(case.spec, case.topk, case.flat_y())
        for mine, want in zip(got, wants, strict=True):
            assert same_bits(mine[i][2], want)
            assert same_bits(mine[i][3], want)


@pytest.mark.worlds(*ALL)
@pytest.mark.parametrize("rows", ["exact", "capacity"])
@kinds
def test_rows_lie_as_those_of_a_spec_with_as_many_tokens(world, kind, rows):
    check_in_turn(world, kind, rows, (2, M, 5) if world.kind == "interpreted" else (M, 1, 5, 4, M, 2))


@pytest.mark.worlds("interpreted-2")
def test_receivers_expand_them_too(world):
    check_in_turn(world.opening(expand="receiver"), KINDS[4], "capacity", (5, M))


@pytest.mark.worlds("interpreted-2")
def test_copy_engines_move_them_too(world):
    check_in_turn(world.opening(mover="copy"), KINDS[1], "exact", (5, M))


def over_nodes(group, spec, cases):
    with open_buffer(group, spec, debug=True) as buffer:
        r, seen = buffer.rank, []
        for case in cases:
            most, given = case.spec.max_tokens, {"weights": case.weights[r], "extras": case.extras[r]}
            recv = buffer.dispatch(case.x[r], case.topk[r], max_tokens=most, **given)
            fresh = observed(recv)
            again = observed(buffer.dispatch(case.x[r], recv.plan, copy=True, **given))
            seen.append((fresh, again, buffer.combine(case.y[r], recv.plan)))
        return seen


@pytest.mark.worlds("grid-2x2")
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4]], ids=repr)
def test_over_nodes_too(world, kind):
    spec = spec_of((*kind[:2], "node"), world.num_ranks)
    cases = cases_of(spec, world.num_ranks, (M, 2, 5))
    got = world.run(over_nodes, spec, cases)
    for i, case in enumerate(cases):
        for way in range(2):
            check_received(case, [mine[i][way] for mine in got])
        wants = oracle.combined(case.spec, case.topk, case.flat_y(), node_size=world.node_size)
        assert all(same_bits(mine[i][2], want) for mine, want in zip(got, wants, strict=True))


def bring_too_many(group, spec, case, most, rows):
    """What is raised, where; and what an allowed call behind it brings."""
    with open_buffer(group, spec) as buffer:
        r = buffer.rank
        for _ in range(2):  # so that the next one is a prepared call
            buffer.dispatch(case.x[r][:1], case.topk[r][:1], max_tokens=most, rows=rows)
        said = []
        try:
            recv = buffer.dispatch(case.x[r], case.topk[r], max_tokens=most, rows=rows)
            assert not recv.num_tokens_per_expert.any()
            assert not buffer.combine(case.y[r][:0] if rows == "exact" else recv.output_rows(), recv.plan).any()
            buffer.check()
        except CapacityError as error:
            said.append((str(error), error.num_tokens, error.num_rows))
        some = buffer.dispatch(case.x[r][:1], case.topk[r][:1], max_tokens=most, rows=rows)
        return said, int(some.num_tokens_per_expert.sum())


@pytest.mark.worlds("inproc-2", "processes-4", "interpreted-2")
@pytest.mark.parametrize("rows", ["exact", "capacity"])
@pytest.mark.parametrize("most", [3, None], ids=["of the call", "of the Spec"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4]], ids=repr)
def test_all_ranks_are_told_of_one_that_brings_too_many(world, kind, most, rows):
    spec = spec_of(kind, world.num_ranks)
    brought = [M + 4 if r == 1 else M + 2 if r == 0 else 1 for r in range(world.num_ranks)]
    case = make_case(replace(spec, max_tokens=M + 4), brought)
    for said, _ in (got := world.run(bring_too_many, spec, case, most, rows)):
        ((sentence, num_tokens, num_rows),) = said
        assert f"rank 1 brought {M + 4} tokens, more than max_tokens={most or M}" in sentence
        assert (num_tokens, num_rows) == (M + 4, None)
    num_picks = sum(int((topk[:1] >= 0).sum()) for topk in case.topk)
    assert sum(rows_here for _, rows_here in got) == num_picks


def bring_too_many_to_nodes(group, spec, case):
    with open_buffer(group, spec) as buffer:
        r = buffer.rank
        with pytest.raises(CapacityError if r == 1 else PeerFailed, match=f"rank 1 brought {M + 4} tokens"):
            buffer.dispatch(case.x[r], case.topk[r])
        return buffer.dispatch(case.x[r][:1], case.topk[r][:1]).num_rows


@pytest.mark.worlds("grid-2x2")
def test_between_nodes_a_rank_that_brings_too_many_begins_no_call(world):
    spec = spec_of((Compact(), Fp32(), "node"), world.num_ranks)
    case = make_case(replace(spec, max_tokens=M + 4), [M + 4 if r == 1 else M for r in range(world.num_ranks)])
    assert sum(world.run(bring_too_many_to_nodes, spec, case)) > 0


def be_refused(group, case):
    with open_buffer(group, case.spec) as buffer:
        r, said = buffer.rank, []
        recv = buffer.dispatch(case.x[r][:2], case.topk[r][:2], max_tokens=3)
        for given in (
            {"max_tokens": 0},
            {"max_tokens": M + 1},
            {"max_tokens": True},
            {"max_tokens": 2.0},
            {"max_tokens": 2, "routing": recv.plan},
        ):
            routing = given.pop("routing", case.topk[r][:2])
            with pytest.raises(ConfigError) as error:
                buffer.dispatch(case.x[r][:2], routing, **given)
            said.append(str(error.value).partition(";")[0])
        with pytest.raises(PeerFailed, match="dispatch differs"):
            buffer.dispatch(case.x[r][:2], case.topk[r][:2], max_tokens=3 + r)
        with pytest.raises(ConfigError, match="y has shape"):
            buffer.combine(torch.zeros(1, 5, case.spec.hidden), recv.plan)
        return said


@pytest.mark.worlds("inproc-2", "processes-2")
def test_what_no_call_can_have_is_refused(world):
    case = make_case(spec_of(KINDS[0], world.num_ranks), [M, M])
    for said in world.run(be_refused, case):
        assert said == [
            "max_tokens=0 of a call",
            f"max_tokens={M + 1} of a call",
            "max_tokens=True of a call",
            "max_tokens=2.0 of a call",
            "max_tokens=2, and the plan is of a dispatch with 3",
        ]


def many_sizes(group, case):
    """More of them than a buffer remembers."""
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        for most in range(1, 400):
            assert buffer.dispatch(case.x[r][:1], case.topk[r][:1], max_tokens=most).plan.extent.max_tokens == most
        return len(buffer._extents), buffer.dispatch(case.x[r], case.topk[r]).num_rows


@pytest.mark.worlds("inproc-2")
def test_sizes_are_kept_within_bounds(world):
    case = make_case(spec_of(KINDS[0], world.num_ranks, max_tokens=400), [9, 9])
    for kept, _ in world.run(many_sizes, case):
        assert kept <= 256


def in_flight(group, spec, cases):
    """Calls of two sizes that are started before either is waited for."""
    with open_buffer(group, spec) as buffer:
        r, outs = buffer.rank, []
        for _ in range(3):
            started = [
                buffer.dispatch_start(case.x[r], case.topk[r], max_tokens=case.spec.max_tokens) for case in cases
            ]
            combines = [
                buffer.combine_start(case.y[r], each.wait().plan) for case, each in zip(cases, started, strict=True)
            ]
            outs = [each.wait() for each in combines]
        return outs


@pytest.mark.worlds("inproc-2", "processes-2", "interpreted-2")
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4]], ids=repr)
def test_calls_of_two_sizes_are_in_flight_together(world, kind):
    spec = spec_of(kind, world.num_ranks)
    cases = cases_of(spec, world.num_ranks, (3, M))
    got = world.run(in_flight, spec, cases)
    for i, case in enumerate(cases):
        wants = oracle.combined(case.spec, case.topk, case.flat_y())
        assert all(same_bits(outs[i], want) for outs, want in zip(got, wants, strict=True))
