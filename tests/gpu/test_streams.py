"""Calls on the caller's stream: they come after its work, what it does next comes after them, and no host waits."""

import pytest
import torch

from crossdock import Compact, Expanded, Padded
from tests import oracle
from tests.cases import check_received, make_case, observed, same_bits
from tests.world import device, meet, open_buffer
from tests.worlds import test_pending as programs
from tests.worlds.test_pending import cases_of

LAYOUTS = [Compact(), Expanded(alignment=4), Padded()]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
reduces = pytest.mark.parametrize("reduce", ["token", "rank"])
WORLDS = pytest.mark.worlds("cuda-4", "cudathreads-2")
MILLISECOND = 2_000_000
"""In cycles, about."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.uint8)


def late(tensor):
    """The same values, as they will be once the stream gets there; until then NaN."""
    result = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else -1)
    torch.cuda._sleep(2 * MILLISECOND)
    return result.copy_(tensor)


def spoil(*tensors):
    """On the current stream, without a sync."""
    for tensor in tensors:
        tensor.reshape(-1).view(torch.uint8).fill_(255)


def check_rounds(got, case, weights):
    wants = oracle.combined(case.spec, case.topk, case.flat_y(), weights)
    for i in range(len(got[0])):
        check_received(case, [mine[i][0] for mine in got])
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
                home = weights if weighted else None
                if rows == "capacity" and y.dim() == 2:
                    y = torch.cat([y, y.new_full((recv.x.shape[0] - y.shape[0], y.shape[1]), float("nan"))])
                out = buffer.combine(y, recv.plan, weights=home)
                spoil(y, weights)
                seen.append((came, out.clone()))
                spoil(out)
            buffer.check()
        stream.synchronize()
        return seen


@WORLDS
@reduces
@pytest.mark.parametrize("rows", ["exact", "capacity"])
@layouts
def test_inputs_may_come_late_on_a_side_stream_and_go_at_once(world, layout, rows, reduce):
    case = cases_of(world, layout, 2, reduce)[1]
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
@layouts
def test_a_call_keeps_its_inputs_and_results_until_streams_are_done_with_them(world, layout):
    case = cases_of(world, layout, 2)[1]
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
@layouts
def test_an_event_tells_when_a_call_is_done_beside_the_callers_work(world, layout):
    case = make_case(cases_of(world, layout, 1)[0].spec, [7] * world.num_ranks)
    got = world.run(look_at_events, case)
    for is_event, was_beside, is_done, _ in got:
        assert is_event
        assert was_beside
        assert is_done
    check_rounds([rounds for *_, rounds in got], case, case.weights)


@WORLDS
@reduces
@layouts
def test_two_micro_batches_overlap(world, layout, reduce):
    programs.test_two_micro_batches_overlap(world, layout, reduce)


@WORLDS
@layouts
def test_two_micro_batches_overlap_where_slots_are_not_poisoned(world, layout):
    programs.test_two_micro_batches_overlap(world.opening(debug=False), layout, "token")


@pytest.mark.worlds("cuda-4")
@layouts
def test_waits_may_come_in_any_order(world, layout):
    programs.test_waits_may_come_in_any_order(world, layout)


@pytest.mark.worlds("cuda-2", "cudathreads-4")
@pytest.mark.parametrize("early", [0, 1])
def test_a_rank_may_start_long_before_the_others(world, early):
    programs.test_a_rank_may_start_long_before_the_others(world, early)


@pytest.mark.worlds("cuda-2")
def test_one_start_too_many_is_refused_and_harms_nothing(world):
    programs.test_one_start_too_many_is_refused_and_harms_nothing(world)


@pytest.mark.worlds("cuda-2")
def test_picks_may_change_once_a_dispatch_has_started(world):
    programs.test_picks_may_change_once_a_dispatch_has_started(world)


def uninitialised(_):
    return [torch.empty(64, dtype=dtype, device=device()) for dtype in DTYPES]


@pytest.mark.worlds("cuda-1", "cudathreads-2")
def test_memory_nobody_wrote_to_shows(world):
    for tensors in world.run(uninitialised):
        for tensor in tensors:
            if tensor.is_floating_point():
                assert tensor.float().isnan().all(), tensor.dtype
            else:
                assert (tensor == torch.iinfo(tensor.dtype).max).all(), tensor.dtype
