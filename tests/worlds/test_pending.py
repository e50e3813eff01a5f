"""Calls in two halves: several in flight, waited for in any order."""

import time

import pytest

from crossdock import Compact, ConfigError, Expanded, Padded, PeerFailed, Spec
from tests import oracle
from tests.cases import EXTRA_BYTES, STAGED, check_received, make_case, observed, same_bits
from tests.world import meet, open_buffer

LAYOUTS = [Compact(), Expanded(alignment=4), Padded(), STAGED]


def cases_of(world, layout, count, reduce="token", num_slots=2):
    spec = Spec(
        num_experts=8, num_topk=3, hidden=16, max_tokens=7, layout=layout, reduce=reduce, extra_bytes=EXTRA_BYTES,
        num_slots=num_slots,
    )  # fmt: skip
    return [make_case(spec, [(5 * i + 3 * r) % 8 for r in range(world.num_ranks)], seed=i) for i in range(count)]


def two_batches_at_once(group, cases, repeats):
    """Two micro-batches, each one's experts while the other travels, again and again."""
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r = buffer.rank
        seen = []
        for _ in range(repeats):
            (d0, d1) = [
                buffer.dispatch_start(c.x[r], c.topk[r], weights=c.weights[r], extras=c.extras[r]) for c in cases
            ]
            recv0 = d0.wait()
            rows0 = observed(recv0)
            c0 = buffer.combine_start(recv0.output_rows().copy_(cases[0].y[r]), recv0.plan)
            recv1 = d1.wait()
            rows1 = observed(recv1)
            c1 = buffer.combine_start(cases[1].y[r], recv1.plan)
            seen.append((rows0, rows1, c0.wait(), c1.wait()))
        return seen


@pytest.mark.worlds("inproc-1", "inproc-4", "processes-2")
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_two_micro_batches_overlap(world, layout, reduce):
    cases = cases_of(world, layout, 2, reduce)
    wants = [oracle.combined(case.spec, case.topk, case.flat_y()) for case in cases]
    got = world.run(two_batches_at_once, cases, 5)
    for seen in zip(*got, strict=True):
        for i in range(2):
            check_received(cases[i], [mine[i] for mine in seen])
            assert all(same_bits(mine[2 + i], want) for mine, want in zip(seen, wants[i], strict=True))


def wait_in_reverse(group, cases):
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r = buffer.rank
        started = [buffer.dispatch_start(c.x[r], c.topk[r], weights=c.weights[r], extras=c.extras[r]) for c in cases]
        received = [pending.wait() for pending in reversed(started)][::-1]
        assert all(pending.is_done for pending in started)
        assert started[0].wait() is received[0]
        rows = [observed(recv) for recv in received]
        started = [buffer.combine_start(c.y[r], recv.plan) for c, recv in zip(cases, received, strict=True)]
        return rows, [pending.wait() for pending in reversed(started)][::-1]


@pytest.mark.worlds("inproc-4", "processes-2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_waits_may_come_in_any_order(world, layout):
    cases = cases_of(world, layout, 3, num_slots=3)
    got = world.run(wait_in_reverse, cases)
    for i, case in enumerate(cases):
        check_received(case, [rows[i] for rows, _ in got])
        wants = oracle.combined(case.spec, case.topk, case.flat_y())
        assert all(same_bits(outs[i], want) for (_, outs), want in zip(got, wants, strict=True))


def start_one_too_many(group, cases):
    """On rank 0 only: the others notice nothing."""
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r = buffer.rank
        started = [
            buffer.dispatch_start(c.x[r], c.topk[r], weights=c.weights[r], extras=c.extras[r]) for c in cases[:2]
        ]
        if r == 0:
            with pytest.raises(ConfigError, match=r"2 calls were started and not waited for.*num_slots=2"):
                buffer.dispatch_start(cases[2].x[r], cases[2].topk[r])
        rows = [observed(pending.wait()) for pending in started]
        recv = buffer.dispatch(cases[2].x[r], cases[2].topk[r], weights=cases[2].weights[r], extras=cases[2].extras[r])
        started = [buffer.combine_start(cases[2].y[r], recv.plan) for _ in range(2)]
        if r == 0:
            with pytest.raises(ConfigError, match="call wait\\(\\) on the oldest first"):
                buffer.combine_start(cases[2].y[r], recv.plan)
        return [*rows, observed(recv)], [pending.wait() for pending in started]


@pytest.mark.worlds("inproc-2", "processes-2")
def test_one_start_too_many_is_refused_and_harms_nothing(world):
    cases = cases_of(world, Expanded(), 3)
    got = world.run(start_one_too_many, cases)
    for i, case in enumerate(cases):
        check_received(case, [rows[i] for rows, _ in got])
    wants = oracle.combined(cases[2].spec, cases[2].topk, cases[2].flat_y())
    for (_, outs), want in zip(got, wants, strict=True):
        assert all(same_bits(out, want) for out in outs)


def start_early(group, cases, early):
    """One rank starts its calls long before the others, then does something else for as long."""
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r = buffer.rank
        seen = []
        for case in cases:
            if r != early:
                time.sleep(0.05)
            pending = buffer.dispatch_start(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
            if r == early:
                time.sleep(0.1)
            recv = pending.wait()
            back = buffer.combine_start(case.y[r], recv.plan)
            seen.append((observed(recv), back.wait()))
        return seen


@pytest.mark.worlds("inproc-4", "processes-2")
@pytest.mark.parametrize("early", [0, 1])
def test_a_rank_may_start_long_before_the_others(world, early):
    cases = cases_of(world, Compact(), 3)
    got = world.run(start_early, cases, early)
    for i, case in enumerate(cases):
        check_received(case, [seen[i][0] for seen in got])
        wants = oracle.combined(case.spec, case.topk, case.flat_y())
        assert all(same_bits(seen[i][1], want) for seen, want in zip(got, wants, strict=True))


def change_picks_after_the_start(group, case):
    """The picks of a started call are the buffer's own; x is not read before it may be written to peers."""
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        picks = case.topk[r].clone()
        pending = buffer.dispatch_start(case.x[r], picks, weights=case.weights[r], extras=case.extras[r])
        picks.fill_(-1)
        return observed(pending.wait())


@pytest.mark.worlds("inproc-2")
def test_picks_may_change_once_a_dispatch_has_started(world):
    case = cases_of(world, Expanded(), 2)[1]
    check_received(case, world.run(change_picks_after_the_start, case))


def near_the_end(group, cases, first):
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        buffer._consent.start_from(first)
        r, seen = buffer.rank, []
        for _ in range(2):
            for c in cases:
                recv = buffer.dispatch(c.x[r], c.topk[r], weights=c.weights[r], extras=c.extras[r])
                seen.append((observed(recv), buffer.combine(c.y[r], recv.plan)))
        return seen, buffer._consent.next_sequence


def check_near_the_end(world, cases, first):
    got = world.run(near_the_end, cases, first)
    assert {sequence for _, sequence in got} == {first >> 32 << 32 | (first + 4 * len(cases)) % 2**32}
    for i, case in enumerate(cases * 2):
        check_received(case, [seen[i][0] for seen, _ in got])
        wants = oracle.combined(case.spec, case.topk, case.flat_y())
        assert all(same_bits(seen[i][1], want) for (seen, _), want in zip(got, wants, strict=True))


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("first", [2**40 - 2, 2**39 - 3, 2**33 - 2, 3 * 2**32 - 5], ids=hex)
def test_sequence_numbers_come_round(world, first):
    check_near_the_end(world, cases_of(world, Expanded(), 3), first)


def abort_near_the_end(group, case, first):
    """A call given up in the last epoch: all go on in epoch 0."""
    with open_buffer(group, case.spec, debug=True) as buffer:
        r = buffer.rank
        buffer._consent.start_from(first)
        text = None
        try:
            if r == 0:
                buffer.abort("on purpose")
            else:
                buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
        except RuntimeError as error:
            text = str(error)
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
        return text, observed(recv), buffer._consent.next_sequence


@pytest.mark.worlds("inproc-2", "processes-2")
def test_epochs_come_round(world):
    case = cases_of(world, Expanded(), 2)[1]
    got = world.run(abort_near_the_end, case, 2**40 - 2)
    assert [text for text, _, _ in got] == [None] + ["rank 0 failed this call: on purpose"] * (world.num_ranks - 1)
    (sequence,) = {sequence for _, _, sequence in got}
    assert sequence % 2**32 == 1
    check_received(case, [rows for _, rows, _ in got])


def give_up_after_a_call(group, case, num_calls):
    """Rank 0 ends a combine, gives up, and begins anew, before the others have looked at its word for that combine."""
    with open_buffer(group, case.spec, timeout_s=10) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
        y = recv.output_rows().copy_(case.y[r])
        for _ in range(num_calls):
            buffer.combine(y, recv.plan)
        pending = buffer.combine_start(y, recv.plan) if r else None
        meet(group)
        if r == 0:
            out = buffer.combine(y, recv.plan)
            buffer.abort("on purpose")
            pending = buffer.dispatch_start(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
            meet(group)
            return out, observed(pending.wait())
        meet(group)
        out = pending.wait()
        with pytest.raises(PeerFailed, match="on purpose"):
            buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
        again = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
        return out, observed(again)


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("num_calls", range(4))
def test_a_call_that_a_peer_has_ended_stands_when_it_gives_up_the_next(world, num_calls):
    case = cases_of(world, Expanded(), 3)[2]
    got = world.run(give_up_after_a_call, case, num_calls)
    wants = oracle.combined(case.spec, case.topk, case.flat_y())
    assert all(same_bits(out, want) for (out, _), want in zip(got, wants, strict=True))
    check_received(case, [rows for _, rows in got])
