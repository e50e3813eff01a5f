"""What a buffer counts."""

import time

import pytest
import torch

from crossdock import Buffer, Compact, Expanded, Padded, Spec
from tests.cases import make_case


def spec_of(layout):
    return Spec(num_experts=8, num_topk=3, hidden=16, max_tokens=7, layout=layout)


def count(group, cases):
    with Buffer(group, cases[0].spec) as buffer:
        for case in cases:
            recv = buffer.dispatch(case.x[buffer.rank], case.topk[buffer.rank])
        buffer.dispatch(cases[-1].x[buffer.rank], recv.plan)
        own, everybodys = buffer.stats, buffer.gather_stats()
        buffer.dispatch(cases[0].x[buffer.rank], cases[0].topk[buffer.rank])
        return own, everybodys


@pytest.mark.worlds("inproc-1", "inproc-4", "processes-2")
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=4), Padded()], ids=repr)
def test_tokens_per_expert_add_up_over_dispatches(world, layout):
    cases = [make_case(spec_of(layout), [7] * world.num_ranks, seed=i) for i in range(3)]
    experts = torch.cat([idx.flatten() for case in (*cases, cases[-1]) for idx in case.topk])
    want = torch.bincount(experts[experts >= 0], minlength=8)
    for rank, (own, everybodys) in enumerate(world.run(count, cases)):
        assert torch.equal(everybodys.num_tokens_per_expert, want)
        assert torch.equal(own.num_tokens_per_expert, want.view(world.num_ranks, -1)[rank])
        assert torch.equal(everybodys.wait_s[rank], own.wait_s)


def dawdle(group, case, slow):
    with Buffer(group, case.spec) as buffer:
        for _ in range(3):
            if buffer.rank == slow:
                time.sleep(0.2)
            buffer.dispatch(case.x[buffer.rank], case.topk[buffer.rank])
        return buffer.gather_stats().wait_s


@pytest.mark.worlds("inproc-4", "processes-4")
@pytest.mark.parametrize("slow", [0, 2])
def test_a_slow_rank_shows_in_its_peers_waits(world, slow):
    case = make_case(spec_of(Compact()), [7] * world.num_ranks)
    for wait_s in world.run(dawdle, case, slow):
        others = [r for r in range(world.num_ranks) if r != slow]
        assert wait_s[others].argmax(1).tolist() == [slow] * len(others)
