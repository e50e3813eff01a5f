"""An interrupt at any moment of a call, a child that was forked in the middle, two threads: nothing stays in flight."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from crossdock import Buffer, ConfigError, CrossdockError, Expanded, Fp32, PeerFailed, PeerTimeout, Spec, run_local
from crossdock.spec import Topology
from crossdock.transport.rail import Box
from crossdock.transport.rails.inproc import InprocEngine
from crossdock.turn import Turn
from tests.interrupter import Interrupter
from tests.world import WorkerLost, meet

SPEC = Spec(num_experts=6, num_topk=2, hidden=4, max_tokens=4, wire=Fp32(), layout=Expanded())
TOPK = torch.tensor([[0, 3], [1, 2]])
TIMEOUT_S = 0.7
"""In a step of few milliseconds: some of the calls wait for as long, and the machine may be busy."""
NUM_AFTER = 4
"""Steps behind the one that was interrupted; the last two must work."""


def step(buffer, number=1.0):
    recv = buffer.dispatch(torch.full((2, 4), number), TOPK)
    return buffer.combine(recv.x.clone(), recv.plan)[:, 0].tolist()


def interrupted(group, interrupter, spec=SPEC, **options):
    """How the step ended that rank 0 was interrupted in, how those behind it ended, and where it was."""
    log, where = [], None
    buffer = Buffer(group, spec, timeout_s=TIMEOUT_S, **options)  # no with block: nobody else tells the peers
    step(buffer)
    for number in range(1 + NUM_AFTER):
        group.all_gather(None)
        try:
            if number == 0 and group.rank == 0:
                with interrupter:
                    out = step(buffer)
            else:
                out = step(buffer, float(number))
            log.append("right" if number == 0 or out == [2.0 * number] * 2 else f"{out}")
        except (KeyboardInterrupt, CrossdockError) as error:
            log.append(type(error).__name__)
        finally:
            if number == 0 and group.rank == 0:
                where = interrupter.where
    group.all_gather(None)
    buffer.close()
    return log, where


@pytest.mark.parametrize("again", [0, 2, 9, 25])
def test_an_interrupt_at_any_line_leaves_nothing_in_flight(again):
    """All lines at the beginning of a step, every few of the rest; and while the first interrupt is dealt with."""
    nth, seen, told = 1, set(), 0
    while nth < 4000:
        (log, where), (other, _) = run_local(lambda group: interrupted(group, Interrupter(nth, again)), 2)  # noqa: B023
        if where is None:
            break
        seen.add(where)
        assert log[0] == "KeyboardInterrupt", (nth, where, log, other)
        assert log[-2:] == other[-2:] == ["right", "right"], (nth, where, log, other)
        told += other[0] == "PeerFailed"
        nth += 1 if nth < 60 and not again else 13
    assert len(seen) > 40, seen
    assert told > 0.6 * len(seen), "peers wait for a rank that was interrupted"


OVER_NODES = {
    "spec": dataclasses.replace(SPEC, reduce="node"),
    "topology": Topology.grid(nodes=2, local=1),
    "rail": InprocEngine(box=Box(chunk_bytes=1024, num_chunks=2)),
}


def test_an_interrupt_before_any_line_of_the_way_between_nodes_leaves_nothing_in_flight():
    """Each once, when a step comes there first; and some lines later again."""
    looks = Interrupter()
    (log, _), _ = run_local(lambda group: interrupted(group, looks, **OVER_NODES), 2)
    assert log == ["right"] * 5
    lines = sorted(line for line in looks.seen if line.startswith(("transport/", "backends/nodes/outbound")))
    assert {"transport/lanes.py", "transport/nodes.py", "transport/rails/inproc.py"} < {
        x.partition(":")[0] for x in lines
    }
    for i, line in enumerate(lines):
        at = Interrupter(at=line, again=(0, 3, 11)[i % 3])
        (log, where), (other, _) = run_local(lambda group: interrupted(group, at, **OVER_NODES), 2)  # noqa: B023
        if where is not None:  # some come only where a message is late
            assert log[0] == "KeyboardInterrupt", (where, log, other)
            assert log[-2:] == other[-2:] == ["right", "right"], (where, log, other)


def interrupted_by_a_signal(group):
    """Rank 0 gets SIGINT while it waits for rank 1, which comes once that has ended rank 0's call."""
    buffer = Buffer(group, SPEC, timeout_s=20)
    step(buffer)
    if buffer.rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    else:
        meet(group)
    began = time.monotonic()
    try:
        step(buffer)
        error = None
    except (KeyboardInterrupt, CrossdockError) as caught:
        error = caught
    took = time.monotonic() - began
    if buffer.rank == 0:
        meet(group)
    meet(group)
    outs = [step(buffer, float(number)) for number in range(3)]
    buffer.close()
    return error, took, outs


@pytest.mark.worlds("processes-2")
def test_an_interrupted_wait_is_told_at_once_and_the_next_steps_work(world):
    (own, _, outs), (told, told_took, other_outs) = world.run(interrupted_by_a_signal)
    assert isinstance(own, KeyboardInterrupt)
    assert isinstance(told, PeerFailed)
    assert told.rank == 0
    assert "KeyboardInterrupt" in told.reason
    assert told_took < 5
    assert outs == other_outs == [[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]]


def left_by_a_child(group):
    """Rank 1 forks in the block; the child is refused every call, and leaves the block as a program does that ends."""
    code = None
    with Buffer(group, SPEC, timeout_s=20) as buffer:
        outs, pending = [step(buffer)], buffer.dispatch_start(torch.ones(2, 4), TOPK)
        if buffer.rank == 1:
            child = os.fork()
            if not child:
                refused = [refusal(call) for call in (lambda: step(buffer), pending.wait, buffer.reset, buffer.restart)]
                buffer.__exit__(SystemExit, SystemExit(0), None)
                os._exit(sum(f"this is process {os.getpid()}, which was forked" in text for text in refused))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        meet(group)
        pending.wait()
        outs += [step(buffer, float(number)) for number in (2, 3)]
    return outs, code


def refusal(call):
    try:
        call()
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.worlds("processes-2")
def test_a_child_has_no_part_in_its_parent_s_buffer(world):
    for rank, (outs, code) in enumerate(world.run(left_by_a_child)):
        assert outs == [[2.0, 2.0], [4.0, 4.0], [6.0, 6.0]]
        assert code == (None, 4)[rank]


def killed_with_a_child(group):
    buffer = Buffer(group, SPEC, timeout_s=20)
    step(buffer)
    if buffer.rank == 1:
        if not os.fork():  # as a data loader does, or multiprocessing by default
            close_pipes()
            time.sleep(12)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(PeerTimeout, match=r"rank 1 .* is gone"):
        step(buffer)
    took = time.monotonic() - began
    buffer.mask(1)
    return took, step(buffer)


def close_pipes():
    """So that the test sees the end of the parent; files stay open, its segment's among them."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith(("pipe:", "socket:")):  # noqa: PTH115
                os.close(int(name))


@pytest.mark.worlds("processes-2")
def test_a_killed_rank_is_noticed_and_masked_though_a_child_of_it_lives_on(world):
    (took, out), lost = world.outcomes(killed_with_a_child)
    assert isinstance(lost, WorkerLost)
    assert took < 10
    assert out == [1.0, 2.0]  # of the first token's picks one is left


def two_threads(group):
    """While this thread waits for rank 1 in a call, another one makes calls; then they take turns."""
    with Buffer(group, SPEC, timeout_s=20) as buffer:
        begun, texts, outs = threading.Event(), [], []
        if group.rank == 1:
            group.all_gather(None)  # the other thread of rank 0 has been refused
            outs = [step(buffer), step(buffer, 2.0)]
        else:

            def intrude():
                begun.wait(10)
                calls = (lambda: step(buffer), buffer.check, lambda: buffer.abort("no"), buffer.restart, buffer.close)
                texts.extend(map(refusal, calls))
                group.all_gather(None)

            def take_turns():
                outs.append(step(buffer, 2.0))

            idle = buffer._transport.idle

            def idle_and_tell(num_polls):
                begun.set()
                idle(num_polls)

            buffer._transport.idle = idle_and_tell
            intruder = threading.Thread(target=intrude, name="intruder")
            intruder.start()
            outs.append(step(buffer))
            intruder.join()
            second = threading.Thread(target=take_turns)
            second.start()
            second.join()
        group.all_gather(None)
    return outs, texts


def test_a_second_thread_in_a_call_is_refused_and_threads_may_take_turns():
    (outs, texts), (other_outs, _) = run_local(two_threads, 2)
    assert outs == other_outs == [[2.0, 2.0], [4.0, 4.0]]
    assert len(texts) == 5
    for text in texts:
        assert "thread 'intruder' made a call while thread 'rank" in text
        assert "take turns" in text


def leave_before_the_turn_is_given_back(buffer):
    """A step, left by an interrupt before the first line of ``Turn.__exit__``; then this thread ends."""

    def interrupt(frame, event, _):
        if frame.f_code is Turn.__exit__.__code__ and event == "line":
            sys.settrace(None)
            raise KeyboardInterrupt
        return interrupt

    sys.settrace(interrupt)
    try:
        step(buffer)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def call_after_a_thread_that_was_interrupted(group):
    with Buffer(group, SPEC, timeout_s=20) as buffer:
        with ThreadPoolExecutor(1) as thread:
            was_interrupted = thread.submit(leave_before_the_turn_is_given_back, buffer).result()
            group.all_gather(None)
            buffer.reset()  # both left out the combine
            group.all_gather(None)
            outs = [step(buffer)]  # the interrupted thread still lives
        outs.append(step(buffer, 2.0))
    return was_interrupted, outs


def test_a_thread_that_was_interrupted_while_it_gave_its_turn_back_does_not_keep_it():
    for outcome in run_local(call_after_a_thread_that_was_interrupted, 2):
        assert outcome == (True, [[2.0, 2.0], [4.0, 4.0]])
