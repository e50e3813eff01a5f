"""What a buffer counts."""

import time

import pytest
import torch

from crossdock import Buffer, CapacityError, Compact, ConfigError, Counters, Expanded, Fp32, Padded, Spec, ThreadGroup
from tests.cases import STAGED, make_case
from tests.world import device, open_buffer


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
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=4), Padded(), STAGED], ids=repr)
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


def count_in_tensors(group, cases, dtype):
    """What calls add to tensors of ours, beside what the buffer has counted: fresh, started, on a plan, combines."""
    with open_buffer(group, cases[0].spec) as buffer:
        r, num_ranks = buffer.rank, buffer.topology.num_ranks
        num_local = cases[0].spec.num_experts // num_ranks
        tokens = torch.full((num_local,), 100, dtype=dtype, device=device())
        waits, of_combines = torch.zeros(2, num_ranks, dtype=torch.int64, device=device()).unbind()
        began = buffer.stats.wait_s
        both = Counters(tokens, waits)
        plan = buffer.dispatch(cases[0].x[r], cases[0].topk[r], counters=both).plan
        recv = buffer.dispatch_start(cases[1].x[r], cases[1].topk[r], counters=both).wait()
        y = torch.zeros(*recv.src_idx.shape, cases[0].spec.hidden, device=device())
        buffer.combine(y, recv.plan, counters=Counters(wait_ns=of_combines))
        outputs = recv.output_rows().zero_()
        buffer.combine_start(outputs, recv.plan, counters=Counters(wait_ns=of_combines)).wait()
        buffer.dispatch(cases[0].x[r], plan, counters=Counters(num_tokens_per_expert=tokens))
        waited = buffer.stats.wait_s - began
        return tokens, waits, of_combines, waited, buffer.stats.num_tokens_per_expert


@pytest.mark.worlds("inproc-2", "processes-2", "interpreted-2")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("layout", [Compact(), Padded()], ids=repr)
def test_calls_count_in_the_callers_tensors(world, layout, dtype):
    check_counted(world, layout, dtype)


def check_counted(world, layout, dtype):
    spec = Spec(num_experts=8, num_topk=3, hidden=16, max_tokens=7, layout=layout, wire=Fp32())
    cases = [make_case(spec, [7, 3], seed=i) for i in range(2)]
    for tokens, waits, of_combines, waited, counted in world.run(count_in_tensors, cases, dtype):
        assert tokens.dtype == dtype
        assert torch.equal(tokens - 100, counted)
        assert (waits >= 0).all()
        assert (of_combines >= 0).all()
        assert ((waits + of_combines) / 1e9 <= waited + 1e-6).all()


def dawdle_and_count(group, case, slow):
    waits = torch.zeros(group.size, dtype=torch.int64)
    with Buffer(group, case.spec) as buffer:
        if buffer.rank == slow:
            time.sleep(0.2)
        buffer.dispatch(case.x[buffer.rank], case.topk[buffer.rank], counters=Counters(wait_ns=waits))
        return waits


@pytest.mark.worlds("inproc-2")
def test_a_slow_rank_shows_in_the_callers_tensors(world):
    case = make_case(spec_of(Compact()), [7] * 2)
    waits = world.run(dawdle_and_count, case, 1)
    assert waits[0][1] > 100e6
    assert waits[0][0] == 0


def test_a_void_call_adds_no_tokens():
    spec = Spec(num_experts=2, num_topk=1, hidden=4, max_tokens=4, wire=Fp32(), layout=Compact(capacity=2))
    tokens = torch.zeros(2, dtype=torch.int32)
    with Buffer(ThreadGroup.world(1)[0], spec) as buffer:
        with pytest.raises(CapacityError):
            buffer.dispatch(torch.zeros(4, 4), torch.zeros(4, 1).long(), counters=Counters(tokens))
        buffer.dispatch(torch.zeros(2, 4), torch.ones(2, 1).long(), counters=Counters(tokens))
    assert tokens.tolist() == [0, 2]


BAD_COUNTERS = {
    "no counters": (3, "counters is a int; pass crossdock.Counters"),
    "dtype of tokens": (
        Counters(torch.zeros(2)),
        r"counters.num_tokens_per_expert is float32 \[2\]; .*int32 or int64 \[2\]",
    ),
    "size of tokens": (Counters(torch.zeros(3).int()), r"counters.num_tokens_per_expert is int32 \[3\]"),
    "gaps in tokens": (Counters(torch.zeros(4).int()[::2]), r"counters.num_tokens_per_expert .*; pass a contiguous"),
    "dtype of waits": (Counters(wait_ns=torch.zeros(1).int()), r"counters.wait_ns is int32 \[1\]; .* int64 \[1\]"),
    "device of waits": (
        Counters(wait_ns=torch.zeros(1, dtype=torch.int64, device="meta")),
        r"counters.wait_ns is on meta; .*: pass counters.wait_ns.cpu\(\)",
    ),
    "waits that are none": (Counters(wait_ns=[0]), "counters.wait_ns is a list; pass a tensor"),
}


@pytest.mark.parametrize("name", BAD_COUNTERS)
def test_what_cannot_be_counted_in_is_refused(name):
    counters, says = BAD_COUNTERS[name]
    spec = Spec(num_experts=2, num_topk=1, hidden=4, max_tokens=4, wire=Fp32())
    with Buffer(ThreadGroup.world(1)[0], spec) as buffer:
        recv = buffer.dispatch(torch.zeros(2, 4), torch.ones(2, 1).long())
        with pytest.raises(ConfigError, match=says):
            buffer.dispatch(torch.zeros(2, 4), torch.ones(2, 1).long(), counters=counters)
        with pytest.raises(ConfigError, match="a combine brings no tokens; pass wait_ns= alone"):
            buffer.combine(recv.x, recv.plan, counters=Counters(torch.zeros(2).int()))
        assert buffer.combine(recv.x, recv.plan).shape == (2, 4)
