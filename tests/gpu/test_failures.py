"""What becomes of the others on CUDA when a rank does something wrong, gives up, is late, never comes, or dies.

A call without a host sync tells of it in the next call or in ``buffer.check()``; ``caught`` looks there too.
"""

import contextlib
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from crossdock import Compact, ConfigError, Expanded, Fp32, Padded, PeerFailed, PeerTimeout, Spec
from crossdock.masks import drop_picks
from tests.cases import make_case
from tests.gpu.test_graphs import Step, same_results
from tests.world import WorkerLost, device, meet, open_buffer
from tests.worlds import test_failures as on_cpu

T, K, H = 4, 2, 16
SPEC = Spec(num_experts=8, num_topk=K, hidden=H, max_tokens=6, wire=Fp32(), layout=Expanded(), extra_bytes=4)
WORLDS = pytest.mark.worlds("cuda-4", "cudathreads-4")
TIMEOUT_S = 40
AT_ONCE_S = 15


def topk():
    return on_cpu.TOPK.to(device())


def x_of(buffer, number=0):
    return on_cpu.x_of(buffer.rank, number).to(device())


def changed(at, value):
    picks = on_cpu.TOPK.clone()
    picks[at] = value
    return picks.to(device())


def check_round(buffer, number=0):
    """A dispatch and a combine that give what they mean, and a buffer that has nothing to tell."""
    x = x_of(buffer, number)
    recv = buffer.dispatch(x, topk())
    out = buffer.combine(recv.x * 2, recv.plan)
    buffer.check()
    assert torch.equal(out, x * 2 * (topk() >= 0).sum(1, keepdim=True))
    return recv


def caught(buffer, call):
    """The error of a call, or of the look after it, and the seconds that it took."""
    began = time.monotonic()
    try:
        call()
        buffer.check()
    except Exception as error:  # noqa: BLE001 - the test says which it must be
        return error, time.monotonic() - began
    return None, time.monotonic() - began


def whole_round(buffer, **kwargs):
    recv = buffer.dispatch(x_of(buffer), topk(), **kwargs)
    buffer.combine(2 * recv.x, recv.plan)


# name: (what the guilty rank does, given buffer, x and what came before; what its error says). What the host sees as it
# does on CPUs is in tests/worlds/test_bad_input.py.
BAD_DISPATCHES = {
    "expert out of range": (
        lambda b, x, _: b.dispatch(x, changed((1, 0), 8)),
        ("topk_idx[1, 0] = 8", "experts are 0 to 7"),
    ),
    "expert out of range, later": (
        lambda b, x, _: b.dispatch(x, changed((1, 0), 8), rows="capacity"),
        ("topk_idx[1, 0] = 8", "experts are 0 to 7"),
    ),
    "expert below -1": (lambda b, x, _: b.dispatch(x, changed((3, 1), -2)), ("topk_idx[3, 1] = -2",)),
    "expert twice": (lambda b, x, _: b.dispatch(x, changed((2, 0), 2)), ("topk_idx[2]", "expert 2 more than once")),
    "expert twice, int32, later": (
        lambda b, x, _: b.dispatch(x, changed((2, 0), 2).int(), rows="capacity"),
        ("topk_idx[2]", "expert 2 more than once"),
    ),
    "device of x": (lambda b, x, _: b.dispatch(x.cpu(), topk()), ("is on cpu", "cuda")),
    "device of topk_idx": (lambda b, x, _: b.dispatch(x, topk().cpu()), ("is on cpu", "cuda")),
    "device of weights": (lambda b, x, _: b.dispatch(x, topk(), weights=torch.ones(T, K)), ("is on cpu", "cuda")),
    "tokens of a plan": (lambda b, x, recv: b.dispatch(x[:2], recv.plan), ("x has 2 tokens", "plan was made for 4")),
}
BAD_COMBINES = {
    "device of y": (lambda b, _, recv: b.combine(recv.x.cpu(), recv.plan), ("is on cpu", "cuda")),
}


def one_is_guilty(group, verb, name):
    """Good, bad, good, bad, reset, good: what was raised each time."""
    seen = []
    with open_buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        is_guilty = buffer.rank == buffer.topology.num_ranks - 1
        for number in range(2):
            kept = check_round(buffer, 2 * number)
            rows = kept.x.clone()
            if is_guilty:
                bad = (BAD_DISPATCHES if verb == "dispatch" else BAD_COMBINES)[name][0]
                seen.append(caught(buffer, lambda bad=bad, kept=kept: bad(buffer, x_of(buffer), kept)))
            elif verb == "dispatch":
                more = {"rows": "capacity"} if name.endswith("later") else {}
                routing = kept.plan if name == "tokens of a plan" else topk()
                seen.append(
                    caught(buffer, lambda more=more, routing=routing: buffer.dispatch(x_of(buffer), routing, **more))
                )
            else:
                seen.append(caught(buffer, lambda kept=kept: buffer.combine(2 * kept.x, kept.plan)))
            assert torch.equal(kept.x, rows)
        buffer.reset()
        check_round(buffer, 5)
    return seen


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize(
    ("verb", "name"), [("dispatch", name) for name in BAD_DISPATCHES] + [("combine", name) for name in BAD_COMBINES]
)
def test_whatever_one_rank_does_wrong_is_told_to_all_and_all_go_on(world, verb, name):
    *others, guilty = world.run(one_is_guilty, verb, name)
    texts = (BAD_DISPATCHES if verb == "dispatch" else BAD_COMBINES)[name][1]
    for error, seconds in guilty:
        assert type(error) is ConfigError
        assert all(text in str(error) for text in texts), str(error)
        assert seconds < AT_ONCE_S
    for error, seconds in (seen for other in others for seen in other):
        assert type(error) is PeerFailed
        assert error.rank == len(others)
        assert texts[0].split("[")[0] in error.reason
        assert seconds < AT_ONCE_S


def abort(group, when):
    with open_buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        kept = check_round(buffer)
        rows, seen = kept.x.clone(), None
        if buffer.rank:
            seen = caught(buffer, lambda: whole_round(buffer))
        else:
            if when == "between":
                buffer.dispatch(x_of(buffer), topk())
            else:
                buffer.dispatch_start(x_of(buffer), topk())
            buffer.abort("too hot")
        assert torch.equal(kept.x, rows)
        for number in range(3):
            check_round(buffer, number)
        return seen


@WORLDS
@pytest.mark.parametrize("when", ["between", "in flight"])
def test_abort_is_heard_at_once_and_the_next_calls_work(world, when):
    _, *others = world.run(abort, when)
    for error, seconds in others:
        assert type(error) is PeerFailed
        assert error.rank == 0
        assert error.reason == "too hot"
        assert seconds < AT_ONCE_S


def raise_between(group):
    seen = None
    with contextlib.suppress(KeyError), open_buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        check_round(buffer)
        recv = buffer.dispatch(x_of(buffer), topk())
        if buffer.rank == buffer.topology.num_ranks - 1:
            raise KeyError("experts fell over")
        seen = caught(buffer, lambda: buffer.combine(recv.x, recv.plan))
    with open_buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        check_round(buffer)
    return seen


@WORLDS
def test_an_exception_between_dispatch_and_combine_is_told_to_the_others(world):
    *others, _ = world.run(raise_between)
    for error, seconds in others:
        assert type(error) is PeerFailed
        assert error.rank == len(others)
        assert "KeyError: 'experts fell over'" in error.reason
        assert seconds < AT_ONCE_S


def disagree(group, how):
    """Rank 0 makes another call than the others."""
    with open_buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        recv = check_round(buffer)
        x, y, plan = x_of(buffer), 2 * recv.x, recv.plan
        rows = "exact" if buffer.rank else "capacity"
        call = {
            "rows": lambda: buffer.dispatch(x, topk(), rows=rows),
            "weights": lambda: buffer.dispatch(
                x, plan, weights=None if buffer.rank else torch.ones(T, K, device=device())
            ),
            "verb": lambda: buffer.combine(y, plan) if buffer.rank else buffer.dispatch(x, plan),
            "plan": lambda: buffer.dispatch(x, topk() if buffer.rank else plan),
        }[how]
        seen = caught(buffer, call)
        for number in range(3):
            check_round(buffer, number)
        return seen


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("rows", "must be the same on all ranks"),
        ("weights", "must be the same on all ranks"),
        ("verb", "all ranks issue the same calls"),
        ("plan", "all ranks issue the same calls"),
    ],
)
def test_ranks_that_disagree_about_a_call_are_told_and_go_on(world, how, text):
    for error, seconds in world.run(disagree, how):
        assert type(error) is PeerFailed
        assert text in error.reason
        assert seconds < AT_ONCE_S


def be_late(group):
    with open_buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        for number in range(4):
            if buffer.rank == number % buffer.topology.num_ranks:
                time.sleep(0.3)
            check_round(buffer, number)
            torch.cuda._sleep(20_000_000 * (buffer.rank + number) % 50_000_000)
            check_round(buffer, number + 10)
    return True


@WORLDS
def test_a_rank_that_is_only_slow_is_no_error(world):
    assert all(world.run(be_late))


def never_come(group, kind, timeout_s):
    """Rank 1 stays away until the others have given up; then all go on."""
    with open_buffer(group, SPEC, timeout_s=timeout_s) as buffer:
        kept = check_round(buffer)
        rows, routing = kept.x.clone(), kept.plan if kind == "cached" else topk()
        meet(group)
        if buffer.rank != 1:
            seen = caught(buffer, lambda: buffer.dispatch(x_of(buffer), routing))
            meet(group)
        else:
            meet(group)
            seen = caught(buffer, lambda: buffer.dispatch(x_of(buffer), routing))
        assert torch.equal(kept.x, rows)
        for number in range(3):
            check_round(buffer, number)
        return seen


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize("kind", ["fresh", "cached"])
def test_a_rank_that_does_not_come_is_timed_out_and_all_go_on_together(world, kind):
    outcomes = world.run(never_come, kind, 3)
    for rank, (error, seconds) in enumerate(outcomes):
        if rank == 1:
            assert type(error) in (PeerFailed, PeerTimeout)
            assert "rank 1 did not begin this" in str(error)
        else:
            assert type(error) is PeerTimeout
            assert error.rank == 1
            assert "rank 1 did not begin this" in str(error)
            assert "within timeout_s=3" in str(error)
            assert 2 < seconds < 3 + AT_ONCE_S


def read_after_close(group):
    with open_buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        recv = buffer.dispatch(x_of(buffer), topk())
        rows = recv.x.clone()
    del buffer
    meet(group)
    return torch.equal(recv.x, rows) and bool(rows.abs().sum())


@WORLDS
def test_rows_stay_readable_after_close(world):
    assert all(world.run(read_after_close))


def make_many(group, num_buffers):
    """Bytes of the device in use, by this process and all others, after a few buffers and after many."""
    used = []
    for number in range(num_buffers):
        with open_buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
            check_round(buffer)
        del buffer
        if number in (4, num_buffers - 1):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            meet(group)
            free, total = torch.cuda.mem_get_info()
            used.append(total - free)
            meet(group)
    return used


@pytest.mark.worlds("cuda-2")
def test_buffers_leave_no_memory_behind(world):
    """Each has a segment of 2 MiB at least, as CUDA maps memory. Tests beside this one take some meanwhile, too."""
    grown = [max(many - few for few, many in world.run(make_many, 45))]
    while grown[-1] >= 40 * 2**20 and len(grown) < 3:
        grown.append(max(many - few for few, many in world.run(make_many, 45)))
    assert min(grown) < 40 * 2**20


def die_between_calls(group, kind):
    """The last rank is killed when its device has nothing to do, so that no kernel of its goes with it."""
    buffer = open_buffer(group, SPEC, timeout_s=TIMEOUT_S)
    kept = check_round(buffer)
    rows = kept.x.clone()
    torch.cuda.synchronize()
    meet(group)
    if buffer.rank == buffer.topology.num_ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    routing = kept.plan if kind == "cached" else topk()
    error, seconds = caught(buffer, lambda: buffer.dispatch(x_of(buffer), routing))
    assert torch.equal(kept.x, rows)
    return error, seconds


@pytest.mark.worlds("cuda-2", "cuda-4")
def test_a_killed_rank_is_named_on_all_survivors_long_before_the_deadline(world):
    """One way in each world: to make its processes anew takes longer than all that a test does."""
    kind = {2: "cached", 4: "fresh"}[world.num_ranks]
    *others, lost = world.outcomes(die_between_calls, kind)
    assert isinstance(lost, WorkerLost)
    assert "exit code -9" in str(lost)
    for outcome in others:
        assert not isinstance(outcome, BaseException), outcome
        error, seconds = outcome
        assert isinstance(error, (PeerTimeout, PeerFailed))
        assert error.rank == len(others) or isinstance(error, PeerFailed)
        assert seconds < AT_ONCE_S


def without_the_killed(group):
    """The last rank is killed between two calls; the others mask it, and go on in every layout, and with a graph."""
    layouts = (Expanded(), Compact(), Padded())
    buffers = [open_buffer(group, replace(SPEC, layout=layout), timeout_s=TIMEOUT_S) for layout in layouts]
    first, rank, victim = buffers[0], buffers[0].rank, buffers[0].topology.num_ranks - 1
    olds = [check_round(buffer) for buffer in buffers]
    case = make_case(first.spec, [T] * (victim + 1))
    case = replace(
        case,
        x=[on_cpu.x_of(r).to(device()) for r in range(victim + 1)],
        topk=[topk()] * (victim + 1),
        weights=[torch.ones(T, K, device=device())] * (victim + 1),
    )
    step = Step(first, case, is_cached=False, pulls=True)
    torch.cuda.synchronize()
    meet(group)
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    lost, _ = caught(first, lambda: first.dispatch(x_of(first), topk()))
    kept = drop_picks(on_cpu.TOPK, [victim], num_local=8 // (victim + 1)).to(device())
    refused = []
    for buffer, old in zip(buffers, olds, strict=True):
        buffer.mask(victim)
        refused.append(caught(buffer, lambda buffer=buffer, old=old: buffer.dispatch(x_of(buffer), old.plan))[0])
        for number in range(4):
            x = x_of(buffer, number)
            recv = buffer.dispatch(x, topk()) if number % 2 else buffer.dispatch_start(x, topk()).wait()
            y = recv.output_rows().copy_(recv.x * 2) if number < 2 else recv.x * 2
            out = buffer.combine(y, recv.plan)
            again = buffer.dispatch(x, recv.plan)
            buffer.check()
            assert torch.equal(out, x * 2 * (kept >= 0).sum(1, keepdim=True)), (buffer.spec.layout, number)
            assert torch.equal(again.src_idx, recv.src_idx)
            assert not (recv.src_idx // SPEC.max_tokens == victim).any()
    step.inputs[1].copy_(first.drop_masked(topk()))
    for _ in range(10):
        assert same_results(step.replay(), step.run())
    step.inputs[1].copy_(topk())
    error, _ = caught(first, step.replay)
    x = x_of(first)
    recv = first.dispatch(x, topk())
    assert torch.equal(first.combine(recv.x, recv.plan), x * (kept >= 0).sum(1, keepdim=True))
    first.check()
    return lost, refused, error


@pytest.mark.worlds("cuda-4")
def test_a_killed_rank_is_masked_and_the_others_go_on(world):
    *others, gone = world.outcomes(without_the_killed)
    assert isinstance(gone, WorkerLost)
    for rank, outcome in enumerate(others):
        assert not isinstance(outcome, BaseException), outcome
        lost, refused, error = outcome
        assert isinstance(lost, (PeerTimeout, PeerFailed))
        for old in refused:
            assert type(old) is ConfigError
            assert "older than the mask of rank 3" in str(old)
        assert type(error) is (PeerFailed if rank else ConfigError)
        assert rank or "buffer.drop_masked(topk_idx)" in str(error)
