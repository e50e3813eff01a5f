"""What becomes of the others when a rank gives up, dies, stops, or is late; and what a buffer leaves behind."""

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crossdock import (
    Arena,
    Buffer,
    Expanded,
    Fp32,
    PeerFailed,
    PeerTimeout,
    Spec,
    Topology,
    TransportError,
    run_local,
)
from crossdock._env import shm_dir
from tests.child import run_child
from tests.world import WorkerLost

T, H = 4, 16
SPEC = Spec(num_experts=8, num_topk=2, hidden=H, max_tokens=T, wire=Fp32(), layout=Expanded())
TOPK = torch.tensor([[0, 7], [3, -1], [5, 2], [6, 1]])
TIMEOUT_S = 40
AT_ONCE_S = 15


def x_of(rank, number=0):
    return torch.arange(T * H, dtype=torch.float32).view(T, H) + 1000 * rank + 100_000 * number


def check_round(buffer, number=0):
    x = x_of(buffer.rank, number)
    recv = buffer.dispatch(x, TOPK)
    out = buffer.combine(recv.x * 2, recv.plan)
    assert torch.equal(out, x * 2 * (TOPK >= 0).sum(1, keepdim=True))
    return recv


def raised(call):
    """The error, and the seconds it took to be raised."""
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        call()
    return caught.value, time.monotonic() - began


def raise_between(group):
    """The last rank's block ends by an exception; the others' combine fails, and a new buffer works."""
    seen = None
    with contextlib.suppress(KeyError), Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        recv = check_round(buffer)
        recv = buffer.dispatch(x_of(buffer.rank), TOPK)
        if buffer.rank == buffer.topology.num_ranks - 1:
            raise KeyError("experts fell over")
        seen = raised(lambda: buffer.combine(recv.x, recv.plan))
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        check_round(buffer)
    return seen


@pytest.mark.worlds("inproc-2", "inproc-4", "processes-4")
def test_an_exception_between_dispatch_and_combine_is_told_to_the_others(world):
    *others, _ = world.run(raise_between)
    for error, seconds in others:
        assert type(error) is PeerFailed
        assert error.rank == len(others)
        assert "KeyError: 'experts fell over'" in error.reason
        assert seconds < AT_ONCE_S


def abort_between(group, when):
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        kept = check_round(buffer)
        rows = kept.x.clone()
        seen = None
        if buffer.rank == 0:
            if when == "between":
                buffer.dispatch(x_of(0), TOPK)
                buffer.abort("too hot")
            elif when == "in flight":
                pending = buffer.dispatch_start(x_of(0), TOPK)
                buffer.abort("too hot")
                seen = pending.is_done
            else:
                buffer.abort("\udcff is in no text")
        else:

            def step():
                recv = buffer.dispatch(x_of(buffer.rank), TOPK)
                buffer.combine(recv.x, recv.plan)

            seen = raised(step)
        assert torch.equal(kept.x, rows)
        for number in range(3):
            check_round(buffer, number)
        return seen


@pytest.mark.worlds("inproc-2", "inproc-4", "processes-2")
@pytest.mark.parametrize("when", ["between", "in flight"])
def test_abort_is_heard_at_once_and_the_next_calls_work(world, when):
    _, *others = world.run(abort_between, when)
    for error, seconds in others:
        assert type(error) is PeerFailed
        assert error.rank == 0
        assert error.reason == "too hot"
        assert seconds < AT_ONCE_S


@pytest.mark.worlds("inproc-2")
def test_abort_takes_any_text(world):
    """A path that is no UTF-8 gets into the message of an exception, and so into a reason."""
    _, (error, seconds) = world.run(abort_between, "odd text")
    assert type(error) is PeerFailed
    assert "is in no text" in error.reason
    assert seconds < AT_ONCE_S


def abort_while_one_is_late(group):
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        check_round(buffer)
        if buffer.rank == 0:
            time.sleep(5)
        elif buffer.rank == 1:
            buffer.dispatch_start(x_of(1), TOPK)
            buffer.abort("too hot")
        seen = None if buffer.rank == 1 else raised(lambda: buffer.dispatch(x_of(buffer.rank), TOPK))
        check_round(buffer, 1)
        return seen


@pytest.mark.worlds("inproc-4")
def test_abort_is_heard_although_another_rank_is_late(world):
    _, _, *others = world.run(abort_while_one_is_late)
    for error, seconds in others:
        assert error.rank == 1
        assert seconds < 3


def abort_then_reset(group, who):
    with Buffer(group, SPEC, timeout_s=3) as buffer:
        check_round(buffer)
        if buffer.rank == 0:
            buffer.abort("too hot")
        else:
            raised(lambda: buffer.dispatch(x_of(buffer.rank), TOPK))
        if who in ("all", buffer.rank):
            buffer.reset()
        check_round(buffer, 1)
    return True


@pytest.mark.worlds("inproc-2", "inproc-4")
@pytest.mark.parametrize("who", ["all", 0, 1])
def test_reset_after_a_failure_says_no_word_to_the_peers(world, who):
    assert all(world.run(abort_then_reset, who))


def die_in_a_call(group):
    buffer = Buffer(group, SPEC, timeout_s=TIMEOUT_S)
    kept = check_round(buffer)
    rows = kept.x.clone()
    if buffer.rank == 2:
        buffer.dispatch_start(x_of(2), TOPK)
        os.kill(os.getpid(), signal.SIGKILL)
    error, seconds = raised(lambda: check_round(buffer, 1))
    assert torch.equal(kept.x, rows)
    return error, seconds, leftovers("/dev/shm", buffer)


def leftovers(folder, buffer=None):
    """The names of segments there; of one buffer, because other tests may make theirs meanwhile."""
    number = f"{buffer.connection.number:016x}" if buffer else ""
    return [path.name for path in Path(folder).glob(f"crossdock-{number}*")]


@pytest.mark.worlds("processes-4")
def test_a_killed_rank_is_named_on_all_survivors_long_before_the_deadline(world):
    outcomes = world.outcomes(die_in_a_call)
    assert isinstance(outcomes.pop(2), WorkerLost)
    for error, seconds, names in outcomes:
        assert type(error) is PeerTimeout
        assert error.rank == 2
        assert "gone" in str(error)
        assert seconds < AT_ONCE_S
        assert not names


def stop_for_a_while(group, timeout_s):
    """Rank 1 stands still in the middle of a call for longer than the others wait."""
    with Buffer(group, SPEC, timeout_s=timeout_s) as buffer:
        kept = check_round(buffer)
        rows = kept.x.clone()
        if buffer.rank == 1:
            waker = subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
            waker.wait()
        error, seconds = raised(lambda: check_round(buffer, 1))
        assert torch.equal(kept.x, rows)
        buffer._queue._timeout_s = TIMEOUT_S  # the machine may be slow; the test is over
        for number in range(2, 5):
            check_round(buffer, number)
    return error, seconds


@pytest.mark.worlds("processes-4")
def test_a_stopped_rank_is_timed_out_and_all_go_on_together(world):
    outcomes = world.run(stop_for_a_while, 1)
    for rank, (error, seconds) in enumerate(outcomes):
        assert type(error) is PeerTimeout
        assert error.rank == 1
        assert "rank 1 did not begin this dispatch within timeout_s=1" in str(error)
        assert rank == 1 or 0.5 <= seconds < 4 + AT_ONCE_S


def be_late(group):
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        for number in range(3):
            if buffer.rank == number % buffer.topology.num_ranks:
                time.sleep(0.5)
            check_round(buffer, number)
        return buffer.stats.wait_s.sum().item()


@pytest.mark.worlds("inproc-4", "processes-2")
def test_a_rank_that_is_only_slow_is_no_error(world):
    assert max(world.run(be_late)) > 0.2


def in_folder(group, folder, spec=SPEC):
    """Sets a buffer up with segments in a folder; gives the error, and what is left there."""
    before = os.environ.get("CROSSDOCK_SHM_DIR")
    os.environ["CROSSDOCK_SHM_DIR"] = str(folder)
    try:
        with Buffer(group, spec, timeout_s=TIMEOUT_S) as buffer:
            check_round(buffer)  # all ranks have left the set-up then
            return leftovers(folder, buffer)
    finally:
        os.environ.pop("CROSSDOCK_SHM_DIR")
        if before is not None:
            os.environ["CROSSDOCK_SHM_DIR"] = before


@contextlib.contextmanager
def small_file_system(folder, options):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def segment_bytes(num_ranks):
    return Arena(spec=SPEC, topology=Topology(num_ranks=num_ranks)).num_bytes


@pytest.mark.worlds("processes-2", "processes-4")
@pytest.mark.parametrize("num_segments", [0.5, 1.5])
def test_a_memory_file_system_without_room_is_an_error_on_all_ranks(world, num_segments, tmp_path):
    """Also where the first ranks find room and the last does not."""
    with small_file_system(tmp_path, f"size={int(num_segments * segment_bytes(world.num_ranks)) // 4096 * 4096}"):
        outcomes = world.outcomes(in_folder, tmp_path)
        assert not leftovers(tmp_path)
    for error in outcomes:
        assert type(error) is TransportError
        for text in (str(tmp_path), "has no room", "--shm-size", "CROSSDOCK_SHM_DIR", "max_tokens"):
            assert text in str(error)
    assert world.run(in_folder, "/dev/shm") == [[]] * world.num_ranks


def limited(group, num_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        return in_folder(group, "/dev/shm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.worlds("processes-2")
def test_a_limit_of_file_sizes_is_told_as_that(world):
    for error in world.outcomes(limited, segment_bytes(2) - 1):
        assert type(error) is TransportError
        assert "larger file than" in str(error)
        assert "(ulimit -f)" in str(error)


@pytest.mark.worlds("processes-2")
def test_a_memory_file_system_without_room_for_another_file_is_an_error_on_all_ranks(world, tmp_path):
    with small_file_system(tmp_path, "size=64m,nr_inodes=2"):
        outcomes = world.outcomes(in_folder, tmp_path)
        assert not leftovers(tmp_path)
    for error in outcomes:
        assert type(error) is TransportError
        assert "CROSSDOCK_SHM_DIR" in str(error)


@pytest.mark.worlds("processes-2")
def test_a_folder_that_is_not_there_is_an_error_on_all_ranks(world, tmp_path):
    for error in world.outcomes(in_folder, tmp_path / "nowhere"):
        assert type(error) is TransportError
        for text in ("rank 0", str(tmp_path / "nowhere"), "No such file", "CROSSDOCK_SHM_DIR"):
            assert text in str(error)


@pytest.mark.worlds("processes-2")
def test_nothing_lies_in_the_folder_once_a_buffer_is_made(world, tmp_path):
    assert world.run(in_folder, tmp_path) == [[], []]


def read_after_close(group):
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        rank = buffer.rank
        recv = buffer.dispatch(x_of(rank), TOPK)
        rows = recv.x.clone()
    del buffer
    gc.collect()
    return torch.equal(recv.x, rows) and bool(rows.abs().sum())


def test_rows_stay_readable_after_close(world):
    assert all(world.run(read_after_close))


def several_at_once(group):
    specs = [SPEC, Spec(num_experts=8, num_topk=2, hidden=H, max_tokens=T, wire=Fp32()), SPEC]
    with contextlib.ExitStack() as stack:
        buffers = [stack.enter_context(Buffer(group, spec, timeout_s=TIMEOUT_S)) for spec in specs]
        rank = buffers[0].rank
        for number in range(3):
            pending = [b.dispatch_start(x_of(rank, number + i), TOPK) for i, b in enumerate(buffers)]
            for i, (buffer, call) in reversed(list(enumerate(zip(buffers, pending, strict=True)))):
                recv = call.wait()
                tokens = recv.src_idx % T
                sources = recv.src_idx // T
                assert torch.equal(
                    recv.x, torch.stack([x_of(int(s), number + i)[t] for s, t in zip(sources, tokens, strict=True)])
                )
                out = buffer.combine(recv.x, recv.plan)
                times = (TOPK >= 0).sum(1, keepdim=True)
                if i == 1:  # Compact: a row for all picks of a rank
                    num_ranks = buffer.topology.num_ranks
                    ranks = TOPK * num_ranks // 8
                    times = torch.tensor([[len({r for r in row if r >= 0})] for row in ranks.tolist()])
                assert torch.equal(out, x_of(rank, number + i) * times)
    return True


def test_several_buffers_live_side_by_side(world):
    assert all(world.run(several_at_once))


def make_many(group, num_buffers):
    def count():
        gc.collect()
        segment = str(shm_dir() / "crossdock-")  # not this library's own folder, which may be named so too
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if segment in line]
        return len(list(Path("/proc/self/fd").iterdir())), len(maps)

    check_round(Buffer(group, SPEC, timeout_s=TIMEOUT_S))
    before = count()
    for number in range(num_buffers):
        if number % 2:
            with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
                check_round(buffer)
                assert count()[1] > 0
        else:  # dropped without close
            buffer = Buffer(group, SPEC, timeout_s=TIMEOUT_S)
            check_round(buffer)
    del buffer
    return before, count()


@pytest.mark.worlds("processes-2")
def test_buffers_leave_no_descriptors_and_no_mappings(world):
    for before, after in world.run(make_many, 50):
        assert after[0] <= before[0] + 1
        assert after[1] == 0


LEFT_OPEN = """
    import os, sys, tempfile
    import torch, torch.distributed as dist
    from crossdock import Buffer, Fp32, Spec, run_local

    spec = Spec(num_experts=2, num_topk=1, hidden=8, max_tokens=2, wire=Fp32())
    x, topk_idx = torch.ones(2, 8), torch.tensor([[0], [1]])

    def program(group):
        buffer = Buffer(group, spec)
        return buffer, buffer.dispatch(x, topk_idx)

    if sys.argv[1] == "threads":
        kept = run_local(program, 2)
        pending = [buffer.dispatch_start(x, topk_idx) for buffer, _ in kept]
    else:
        store = tempfile.mktemp()
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        kept = program(None)
        dist.destroy_process_group()
        os.path.exists(store) and os.unlink(store)
    print("done")
"""


@pytest.mark.parametrize("ranks", ["threads", "a process"])
def test_a_program_may_end_with_buffers_open(ranks):
    script = [sys.executable, "-W", "error", "-c", textwrap.dedent(LEFT_OPEN), ranks]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    done = run_child(script, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_rank_that_did_its_part_and_left_is_not_missed():
    """It goes between the poll that misses its word and the look whether it is alive."""
    looks, gone = threading.Event(), threading.Event()

    def program(group):
        with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
            recv = buffer.dispatch(x_of(buffer.rank), TOPK)
            recv.output_rows().copy_(recv.x)
            if buffer.rank == 0:

                def is_alive(_):
                    looks.set()
                    return not gone.wait(TIMEOUT_S)

                buffer._transport.is_alive = is_alive
            else:
                assert looks.wait(TIMEOUT_S)
            out = buffer.combine(recv.output_rows(), recv.plan)
        gone.set()
        return out

    for rank, out in enumerate(run_local(program, 2)):
        assert torch.equal(out, x_of(rank) * (TOPK >= 0).sum(1, keepdim=True))


def side_by_side(num_ranks):
    """Buffers of all ranks in one thread, to be advanced by hand."""
    spec = replace(SPEC, num_experts=9 if num_ranks == 3 else 8)
    return run_local(lambda group: Buffer(group, spec, timeout_s=TIMEOUT_S), num_ranks)


def advance(buffers):
    for _ in range(20):
        for buffer in buffers:
            buffer._queue.drive()


def test_calls_started_before_a_rank_is_told_of_a_failure_belong_to_the_failed_step():
    """Rank 1 sees the flag between its two starts, rank 2 after both; the next step must pair the same calls."""
    buffers = side_by_side(3)

    def start_two(buffer):
        return [buffer.dispatch_start(x_of(buffer.rank, number), TOPK) for number in (1, 2)]

    started = start_two(buffers[2])
    buffers[0].abort("too hot")
    with pytest.raises(PeerFailed, match="too hot"):
        start_two(buffers[1])[0].wait()
    with pytest.raises(PeerFailed, match="too hot"):
        started[0].wait()
    step = [buffer.dispatch_start(x_of(rank, 3), TOPK) for rank, buffer in enumerate(buffers)]
    advance(buffers)
    assert [call.is_done for call in step] == [True] * 3
    for call in step:
        recv = call.wait()
        want = [x_of(int(at) // T, 3)[int(at) % T] for at in recv.src_idx]
        assert torch.equal(recv.x, torch.stack(want)), "rows of the step that failed"


def test_a_rank_that_goes_on_does_not_change_the_counts_that_another_is_about_to_read():
    """Rank 1 has all words of a call; before it reads the counts rank 0 gives the call up and begins the next."""
    buffers = side_by_side(2)
    buffers[0].dispatch_start(x_of(0), TOPK)
    make_plan = buffers[1]._backend._make_plan
    again = []

    def read_late(*args):
        buffers[1]._backend._make_plan = make_plan
        buffers[0].abort("too hot")
        again.append(buffers[0].dispatch_start(x_of(0, 1), TOPK.flip(0)))
        return make_plan(*args)

    buffers[1]._backend._make_plan = read_late
    void = buffers[1].dispatch_start(x_of(1), TOPK)
    advance(buffers)
    with pytest.raises(PeerFailed, match="too hot"):
        void.wait()
    again.append(buffers[1].dispatch_start(x_of(1, 1), TOPK))
    advance(buffers)
    assert [call.is_done for call in again] == [True, True]
    for call in again:
        recv = call.wait()
        want = [x_of(int(at) // T, 1)[int(at) % T] for at in recv.src_idx]
        assert torch.equal(recv.x, torch.stack(want))


def reset_in_good_health(group):
    with Buffer(group, SPEC, timeout_s=20) as buffer:
        check_round(buffer)
        if buffer.rank == 0:
            buffer.reset()
        check_round(buffer, 1)
    return True


def test_reset_of_a_buffer_in_good_health_changes_nothing(world):
    assert all(world.run(reset_in_good_health))
