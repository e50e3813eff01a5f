"""Low-latency calls of the CUDA backend against the oracle without a GPU, in Triton's interpreter.

Tiny shapes, as in ``test_cuda_interpreted.py``: all calls without extras are fused.
"""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")

from crossdock import Compact, Expanded, Fp8, Fp32, Padded, Spec
from crossdock.backends.cuda import fused
from crossdock.backends.cuda.kernels.calls import BEGUN, PROGRESS, SENT
from tests import oracle
from tests.cases import STAGED, check_received, loads, make_case, observed, same_bits
from tests.world import open_buffer
from tests.worlds import test_combine as combine
from tests.worlds import test_dispatch as dispatch
from tests.worlds.test_cuda_interpreted import spec_of, two_ranks


def play_few(group, cases):
    """Calls without extras: fresh, on the plan, pulled and pushed; and who copies rows."""
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r, seen = buffer.rank, []
        for case in cases:
            x, weights = case.x[r], case.weights[r]
            recv = buffer.dispatch(x, case.topk[r], weights=weights)
            rows = [observed(recv)]
            recv = buffer.dispatch(x, recv.plan, weights=weights)
            rows.append(observed(recv))
            outputs = recv.output_rows()
            outputs.copy_(case.y[r].view_as(outputs))
            given = weights if case.spec.reduce == "token" else combine.row_weights(recv)
            sums = [buffer.combine(y, recv.plan, weights=given) for y in (outputs, outputs.clone())]
            sums += [buffer.combine(y, recv.plan) for y in (outputs, outputs.clone())]
            seen.append((rows, sums))
        return seen, buffer.launch.is_fused, buffer.launch.expand


FEW = [
    (Compact(), "rank", None, Fp8(block=8)),
    (Padded(), "rank", "sender", Fp32()),
    (Padded(), "rank", "receiver", Fp8(block=4, scale="ue8m0", packed=True)),
    (Padded(), "token", "receiver", Fp32()),
    (Padded(), "token", "sender", Fp32()),
    (Expanded(alignment=4), "rank", "sender", Fp8(block=8)),
    (Expanded(alignment=4), "rank", "receiver", Fp8(block=8)),
    (Expanded(alignment=4), "token", "receiver", Fp8(block=4, scale="ue8m0", packed=True, column_major=True)),
    (Expanded(), "token", "sender", Fp8(block=8)),
    (STAGED, "rank", None, Fp8(block=8)),
    (STAGED, "token", None, Fp8(block=4, scale="ue8m0", packed=True, column_major=True)),
]
few = pytest.mark.parametrize(("layout", "reduce", "expand", "wire"), FEW, ids=repr)


@pytest.mark.worlds("interpreted-2", "interpreted-3")
@few
def test_low_latency_calls_of_every_layout_bring_and_sum_every_row(world, layout, reduce, expand, wire):
    world = world if expand is None else world.opening(expand=expand)
    spec = spec_of(layout, world.num_ranks, wire=wire, reduce=reduce)
    cases = loads(spec, world.num_ranks)[1:6] if world.num_ranks == 2 else [make_case(spec, [4, 0, 3])]
    got = world.run(play_few, cases)
    for i, case in enumerate(cases):
        for way in range(2):
            check_received(case, [mine[0][i][0][way] for mine in got], extras=False)
        weights = case.weights if reduce == "token" else combine.weights_of_rows(case)
        wants = [oracle.combined(case.spec, case.topk, case.flat_y(), given) for given in (weights, None)]
        for rank, (seen, is_fused, who) in enumerate(got):
            assert is_fused
            assert who == (expand or ("receiver" if spec.is_staged else "sender"))
            assert all(same_bits(out, wants[0][rank]) for out in seen[i][1][:2])
            assert all(same_bits(out, wants[1][rank]) for out in seen[i][1][2:])


def with_one_expert(group, spec):
    """Where rows are from, and sums: every rank has a token for both experts."""
    with open_buffer(group, spec) as buffer:
        assert buffer.launch.is_fused
        recv = buffer.dispatch(torch.full((1, spec.hidden), 1.0), torch.tensor([[0, 1]]))
        out = buffer.combine(recv.x.clone(), recv.plan)
        return recv.src_idx.flatten().tolist(), recv.num_tokens_per_expert.tolist(), out.tolist()


@two_ranks
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("layout", [Compact(), Expanded(), Expanded(alignment=2), Padded(capacity=2)], ids=repr)
def test_a_rank_may_have_one_expert(world, layout, reduce):
    """Whose picks are counted as an expert's: a rank's rows are not, where every pick has one."""
    spec = Spec(num_experts=2, num_topk=2, hidden=4, max_tokens=1, wire=Fp32(), layout=layout, reduce=reduce)
    assert world.run(with_one_expert, spec) == [([0, 1], [2], [[2.0] * 4])] * 2


@two_ranks
@pytest.mark.parametrize("patience", [0, 2**30])
@few
def test_what_is_started_is_sent_at_once_or_by_wait(world, layout, reduce, expand, wire, patience):
    """Two calls in flight; without patience nothing is sent before ``wait()``."""
    world = world if expand is None else world.opening(expand=expand)
    case = make_case(spec_of(layout, wire=wire, reduce=reduce), [4, 3])
    others = make_case(spec_of(layout, wire=wire, reduce=reduce), [1, 4], seed=1)
    got = world.run(start_two, [case, others], patience)
    for i, each in enumerate([case, others]):
        for way in (0, 2):  # from picks, and on the plan
            check_received(each, [mine[0][way + i] for mine in got], extras=False)
        wants = oracle.combined(each.spec, each.topk, each.flat_y())
        assert all(same_bits(mine[1][i], want) for mine, want in zip(got, wants, strict=True))
    if patience == 0:
        assert all(progress == (BEGUN.value, SENT.value) for mine in got for progress in mine[2])


def start_two(group, cases, patience):
    """Rows and sums of two batches whose calls overlap, and how far each dispatch was before and after its wait."""
    with open_buffer(group, cases[0].spec) as buffer, mock.patch.object(fused, "_PATIENCE", patience):
        r, on = buffer.rank, buffer._backend._on
        give, rooms = on.next_call, []

        def give_noted():
            rooms.append(give())
            return rooms[-1]

        rows, progress, routings = [], [], [case.topk[r] for case in cases]
        for _ in ("from picks", "on the plan"):
            on.next_call = give_noted
            del rooms[:]
            started = [
                buffer.dispatch_start(case.x[r], routing, weights=case.weights[r], rows="capacity")
                for case, routing in zip(cases, routings, strict=True)
            ]
            on.next_call = give
            before = [int(room.memory[group.size() + PROGRESS.value]) for room in rooms]
            received = [pending.wait() for pending in started]
            progress += zip(before, [int(room.memory[group.size() + PROGRESS.value]) for room in rooms], strict=True)
            rows += [observed(recv) for recv in received]
            routings = [recv.plan for recv in received]
        sums = []
        for case, recv in zip(cases, received, strict=True):
            outputs = recv.output_rows()
            y = case.y[r]
            outputs.view(-1, outputs.shape[-1])[: y.reshape(-1, y.shape[-1]).shape[0]].copy_(y.reshape(-1, y.shape[-1]))
            sums.append(buffer.combine_start(outputs, recv.plan))
        return rows, [pending.wait() for pending in sums], progress


def start_or_call(group, cases):
    """A batch dispatched around combines of another, from picks and on its plan; rank 0 waits for it behind those."""
    with open_buffer(group, cases[0].spec) as buffer, mock.patch.object(fused, "_PATIENCE", 0):
        r = buffer.rank
        batches = [buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], rows="capacity") for case in cases]
        rows, sums = [observed(recv) for recv in batches], []
        for case, recv in zip(cases, batches, strict=True):
            outputs = recv.output_rows()
            outputs.copy_(case.y[r].view_as(outputs))
            for routing, y in ((case.topk[r], outputs), (recv.plan, outputs.clone())):
                pending = buffer.dispatch_start(case.x[r], routing, weights=case.weights[r], rows="capacity")
                if r:
                    pending.wait()
                sums.append(buffer.combine(y, recv.plan))
                rows.append(observed(pending.wait()))
        return rows, sums


@two_ranks
@pytest.mark.parametrize("reduce", ["token", "rank"])
def test_a_rank_may_start_what_another_does_at_once(world, reduce):
    """What is started has been sent before anything is waited for, or both would wait for each other."""
    case = make_case(spec_of(Padded(), reduce=reduce), [4, 3])
    got = world.run(start_or_call, [case])
    for i in range(3):
        check_received(case, [mine[0][i] for mine in got], extras=False)
    wants = oracle.combined(case.spec, case.topk, case.flat_y())
    assert all(same_bits(out, want) for mine, want in zip(got, wants, strict=True) for out in mine[1])


@two_ranks
@pytest.mark.parametrize(
    "wire",
    [Fp32(), Fp8(block=4, scale="ue8m0"), Fp8(block=4, scale="ue8m0", packed=True, column_major=True)],
    ids=repr,
)
def test_a_fused_dispatch_leaves_no_gap_as_it_was(world, wire):
    """Without extras a dispatch of few tokens is one kernel, and alignment leaves gaps that are to be zero."""
    case = make_case(spec_of(Expanded(alignment=8), wire=wire), [3, 4])
    check_received(case, world.run(dispatch.dispatch_plainly, case), weights=False, extras=False)
