"""Calls on the caller's stream: they come after its work, what it does next comes after them, and no host waits."""

import pytest
import torch

from crossdock import Compact, Expanded, Padded
from tests import oracle
from tests.cases import check_received, make_case, observed, same_bits
from tests.gpu.specs import ALIGNED, once_each, spec_of
from tests.world import device, meet, open_buffer
from tests.worlds import test_dispatch
from tests.worlds import test_pending as programs

WORLDS = pytest.mark.worlds("cuda-4", "cudathreads-4")
MILLISECOND = 2_000_000
"""In cycles, about."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.uint8)


def cases_of(world, layout, reduce, count, **kwargs):
    """Ranks bring different numbers of tokens, some none."""
    spec = spec_of(layout, reduce, **kwargs)
    return [make_case(spec, [(5 * i + 3 * r) % 10 for r in range(world.num_ranks)], seed=i) for i in range(count)]


def late(tensor):
    """The same values, as they will be once the stream gets there; until then NaN."""
    result = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else -1)
    torch.cuda._sleep(2 * MILLISECOND)
    return result.copy_(tensor)


def spoil(*tensors):
    """On the current stream, without a sync."""
    for tensor in tensors:
        tensor.reshape(-1).view(torch.uint8).fill_(255)


def check_rounds(got, case, weights, *, extras=True):
    wants = oracle.combined(case.spec, case.topk, case.flat_y(), weights)
    for i in range(len(got[0])):
        check_received(case, [mine[i][0] for mine in got], extras=extras)
        assert all(same_bits(mine[i][1], want) for mine, want in zip(got, wants, strict=True))


def work_on_a_side_stream(group, case, rows):
    """Inputs that are made late, on another stream than the default one, and spoilt once calls were waited for."""
    with open_buffer(group, case.spec) as buffer:
        r, seen = buffer.rank, []
        weighted = case.spec.reduce == "token"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                x, topk, weights, y = (late(t[r]) for t in (case.x, case.topk, case.weights, case.y))
                extras = [late(extra) for extra in case.extras[r]]
                recv = buffer.dispatch(x, topk, weights=weights, extras=extras, rows=rows)
                spoil(x, topk, *extras)
                came = observed(recv)
                return_row = weights if weighted else None
                if rows == "capacity" and y.dim() == 2:
                    y = torch.cat([y, y.new_full((recv.x.shape[0] - y.shape[0], y.shape[1]), float("nan"))])
                out = buffer.combine(y, recv.plan, weights=return_row)
                spoil(y, weights)
                seen.append((came, out.clone()))
                spoil(out)
            buffer.check()
        stream.synchronize()
        return seen


def multiply_meanwhile(group, case):
    """A dispatch that is in flight while a product is made, with one rank that begins it late; then a combine."""
    with open_buffer(group, case.spec) as buffer:
        r, seen = buffer.rank, []
        factors = torch.full((1024, 1024), 0.5, device=device(), dtype=torch.bfloat16)
        factors @ factors  # what a first one loads is loaded now
        torch.cuda.synchronize()
        meet(group)
        before = buffer.stats.wait_s
        for _ in range(4):
            if r == 1:
                torch.cuda._sleep(30 * MILLISECOND)
            pending = buffer.dispatch_start(case.x[r], case.topk[r], weights=case.weights[r])
            product = factors @ factors
            recv = pending.wait()
            came = observed(recv)
            return_row = buffer.combine_start(case.y[r], recv.plan, weights=case.weights[r])
            again = factors @ factors
            out = return_row.wait()
            assert torch.equal(product, again)
            seen.append((came, out.clone()))
        buffer.check()
        waited = buffer.stats.wait_s - before
        assert r == 1 or waited.argmax() == 1, waited
        return seen


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize("layout", [Padded(), Expanded()], ids=repr)
def test_a_product_goes_on_while_calls_wait_for_a_late_rank(world, layout):
    case = cases_of(world, layout, "token", 2)[1]
    check_rounds(world.run(multiply_meanwhile, case), case, case.weights, extras=False)


@WORLDS
@pytest.mark.parametrize(
    ("layout", "reduce", "rows"),
    [(Compact(), "token", "exact"), (ALIGNED, "rank", "capacity"), (Padded(), "token", "capacity")],
    ids=repr,
)
def test_inputs_may_come_late_on_a_side_stream_and_go_at_once(world, layout, reduce, rows):
    case = cases_of(world, layout, reduce, 2)[1]
    check_rounds(world.run(work_on_a_side_stream, case, rows), case, case.weights if reduce == "token" else None)


def drop_inputs_at_once(group, case):
    """Nobody but the call holds its inputs; memory that is asked for meanwhile is filled with NaN."""
    with open_buffer(group, case.spec) as buffer:
        r, seen = buffer.rank, []
        plan = buffer.dispatch(case.x[r], case.topk[r]).plan
        for _ in range(10):
            pending = buffer.dispatch_start(
                late(case.x[r]), plan, weights=case.weights[r].clone(), extras=[e.clone() for e in case.extras[r]]
            )
            spoil(*(torch.empty_like(t[r]) for t in (case.x, case.weights)))
            came = observed(pending.wait())
            back = buffer.combine_start(late(case.y[r]), plan, weights=case.weights[r].clone())
            spoil(*(torch.empty_like(t[r]) for t in (case.y, case.weights)))
            out = back.wait()
            torch.cuda._sleep(MILLISECOND)
            seen.append((came, out.clone()))  # long after the host has dropped out, and begun the next call
            del out, back, pending
        return seen


@WORLDS
def test_a_call_keeps_its_inputs_and_results_until_streams_are_done_with_them(world):
    case = cases_of(world, Compact(), "token", 2)[1]
    check_rounds(world.run(drop_inputs_at_once, case), case, case.weights)


def look_at_events(group, case):
    """A call that no host sync belongs to goes on while the caller's stream is busy; others may wait for its event."""
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        plan = buffer.dispatch(case.x[r], case.topk[r]).plan
        buffer.combine(buffer.dispatch(case.x[r], plan).x, plan)  # kernels are compiled now
        torch.cuda.synchronize()
        meet(group)
        pending = buffer.dispatch_start(case.x[r], plan, weights=case.weights[r], extras=case.extras[r])
        torch.cuda._sleep(300 * MILLISECOND)
        event = pending.event
        event.synchronize()
        was_beside = not torch.cuda.current_stream().query()
        recv = pending.wait()
        back = buffer.combine_start(case.y[r], plan, weights=case.weights[r])
        out = back.wait()
        other = torch.cuda.Stream()
        other.wait_event(back.event)
        with torch.cuda.stream(other):
            copied = out.clone()
        other.synchronize()
        return type(event) is torch.cuda.Event, was_beside, back.event.query(), [(observed(recv), copied)]


@pytest.mark.worlds("cuda-2")
def test_an_event_tells_when_a_call_is_done_beside_the_callers_work(world):
    case = make_case(test_dispatch.spec_of(Expanded()), [7] * world.num_ranks)
    got = world.run(look_at_events, case)
    for is_event, was_beside, is_done, _ in got:
        assert is_event
        assert was_beside
        assert is_done
    check_rounds([rounds for *_, rounds in got], case, case.weights)


@WORLDS
@once_each
def test_two_micro_batches_overlap(world, layout, reduce):
    """Aligned rows in slots that nobody poisons: to do that waits for calls in flight."""
    cases, debug = cases_of(world, layout, reduce, 2), layout != ALIGNED
    wants = [oracle.combined(case.spec, case.topk, case.flat_y()) for case in cases]
    got = world.opening(debug=debug).run(programs.two_batches_at_once, cases, 5)
    for seen in zip(*got, strict=True):
        for i in range(2):
            check_received(cases[i], [mine[i] for mine in seen])
            assert all(same_bits(mine[2 + i], want) for mine, want in zip(seen, wants[i], strict=True))


def come_after_events(group, case):
    """Inputs that another stream makes late, of which calls know by events alone; started ones on a stream of ours."""
    with open_buffer(group, case.spec) as buffer:
        r, seen = buffer.rank, []
        maker, buffer.stream = torch.cuda.Stream(), torch.cuda.Stream()
        beside = {"weights": case.weights[r], "extras": case.extras[r]}
        for starts in (False, True, True):
            with torch.cuda.stream(maker):
                x, y = late(case.x[r]), late(case.y[r])
                made = maker.record_event()
            if starts:
                recv = buffer.dispatch_start(x, case.topk[r], after=made, **beside).wait()
                out = buffer.combine_start(y, recv.plan, after=made).wait()
            else:
                recv = buffer.dispatch(x, case.topk[r], after=made, **beside)
                out = buffer.combine(y, recv.plan, after=made)
            seen.append((observed(recv), out.clone()))
        buffer.check()
        torch.cuda.synchronize()
        return list(zip(*seen, strict=True))


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("layout", [Compact(), ALIGNED], ids=repr)
def test_calls_come_after_the_events_that_they_are_given(world, layout):
    case = cases_of(world, layout, "token", 2)[1]
    check_pairs(world.run(come_after_events, case), [case] * 3)


def check_pairs(got, cases):
    """Of each rank, what came and what was summed, by case."""
    for i, case in enumerate(cases):
        check_received(case, [rows[i] for rows, _ in got])
        wants = oracle.combined(case.spec, case.topk, case.flat_y())
        assert all(same_bits(outs[i], want) for (_, outs), want in zip(got, wants, strict=True))


@pytest.mark.worlds("cuda-4")
def test_waits_may_come_in_any_order(world):
    cases = cases_of(world, ALIGNED, "rank", 3, num_slots=3)
    check_pairs(world.run(programs.wait_in_reverse, cases), cases)


@WORLDS
def test_a_rank_may_start_long_before_the_others(world):
    cases = cases_of(world, Compact(), "token", 3)
    got = world.run(programs.start_early, cases, 1)
    check_pairs([list(zip(*seen, strict=True)) for seen in got], cases)


@pytest.mark.worlds("cuda-2")
def test_one_start_too_many_is_refused_and_harms_nothing(world):
    programs.test_one_start_too_many_is_refused_and_harms_nothing(world)


@pytest.mark.worlds("cuda-2")
def test_picks_may_change_once_a_dispatch_has_started(world):
    programs.test_picks_may_change_once_a_dispatch_has_started(world)


def uninitialised(_):
    return [torch.empty(64, dtype=dtype, device=device()) for dtype in DTYPES]


@pytest.mark.worlds("cuda-2", "cudathreads-4")
def test_memory_nobody_wrote_to_shows(world):
    for tensors in world.run(uninitialised):
        for tensor in tensors:
            if tensor.is_floating_point():
                assert tensor.float().isnan().all(), tensor.dtype
            else:
                assert (tensor == torch.iinfo(tensor.dtype).max).all(), tensor.dtype
