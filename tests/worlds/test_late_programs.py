"""Low-latency calls of a rank whose programs find no room and begin late: every bit, and nobody waits for ever."""

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")

import torch
import triton
import triton.language as tl

from crossdock import Compact, Expanded, Fp32, Padded, Spec
from tests import oracle
from tests.cases import STAGED, check_received, make_case, observed, same_bits
from tests.late_programs import Stuck, late_programs
from tests.world import open_buffer

ROOM = 2
"""Programs that the late rank has room for at a time."""


def play_late(group, case, late_rank, expand, seed):
    """Every kind of low-latency call, and how many programs have begun when others had ended."""
    r = group.rank()
    options = {} if expand is None else {"expand": expand}
    with (
        open_buffer(group, case.spec, **options) as buffer,
        late_programs(room=ROOM if r == late_rank else 64, seed=seed + r) as turns,
    ):
        assert buffer.launch.is_fused
        weights = case.weights[r]
        rows, sums = [], []
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=weights)
        rows.append(observed(recv))
        for start in (buffer.dispatch, lambda *args, **kwargs: buffer.dispatch_start(*args, **kwargs).wait()):
            recv = start(case.x[r], recv.plan, weights=weights)
            rows.append(observed(recv))
        outputs = recv.output_rows()
        outputs.copy_(case.y[r].view_as(outputs))
        for combine in (buffer.combine, lambda *args: buffer.combine_start(*args).wait()):
            sums.extend(combine(given, recv.plan) for given in (outputs, outputs.clone()))
        pending = buffer.dispatch_start(case.x[r], case.topk[r], weights=weights)
        rows.append(observed(pending.wait()))
        return rows, sums, turns.num_late


@pytest.mark.worlds("interpreted-3")
@pytest.mark.parametrize(
    ("layout", "reduce", "expand"),
    [
        (Compact(), "rank", None),
        (Padded(), "token", "sender"),
        (Padded(), "rank", "receiver"),
        (Expanded(alignment=4), "rank", "sender"),
        (Expanded(alignment=4), "token", "receiver"),
        (STAGED, "rank", None),
    ],
    ids=repr,
)
@pytest.mark.parametrize("late_rank", [0, 2])
def test_a_rank_whose_programs_begin_late_holds_nobody_up_for_ever(world, layout, reduce, expand, late_rank):
    spec = Spec(
        num_experts=6, num_topk=3, hidden=16, max_tokens=6, wire=Fp32(), combine_wire=Fp32(), layout=layout,
        reduce=reduce,
    )  # fmt: skip
    case = make_case(spec, [6, 0, 5])
    got = world.run(play_late, case, late_rank, expand, 1)
    for i in range(4):
        check_received(case, [mine[0][i] for mine in got], extras=False)
    wants = oracle.combined(case.spec, case.topk, case.flat_y())
    for mine, want in zip(got, wants, strict=True):
        assert all(same_bits(out, want) for out in mine[1])
    assert got[late_rank][2] > 0


@triton.jit
def wait_for_all(counter, num):
    """Every program waits for what all have done, with a share of its own: as nobody may who has no room for all."""
    tl.atomic_add(counter, 1)
    while tl.atomic_or(counter, 0) < num:
        pass


def wait_with_room_for(_, room):
    counter = torch.zeros(1, dtype=torch.int32)
    with late_programs(room=room, seed=0, patience_s=2):
        try:
            wait_for_all[(3,)](counter, 3)
        except (Stuck, triton.runtime.errors.InterpreterError) as error:
            return str(error)
    return int(counter)


@pytest.mark.worlds("interpreted-1")
def test_programs_that_wait_for_others_that_have_no_room_are_found(world):
    assert world.run(wait_with_room_for, 3) == [3]
    (said,) = world.run(wait_with_room_for, 2)
    assert "programs [0, " in said
    assert "of 3 wait, and 1 more have had no room" in said
