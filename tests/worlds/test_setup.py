"""Making, sharing and leaving a buffer."""

import errno
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from crossdock import (
    Buffer,
    ConfigError,
    Connection,
    Expanded,
    Fp8,
    Fp32,
    NotSupported,
    PeerFailed,
    Spec,
    ThreadGroup,
    TransportError,
    run_local,
)
from tests import oracle
from tests.cases import check_received, make_case, observed, same_bits
from tests.world import meet

SPEC = Spec(num_experts=8, num_topk=2, hidden=16, max_tokens=5)


def rank_of(group):
    return group.rank if isinstance(group, ThreadGroup) else group.rank()


def make_with_another_spec(group, last):
    spec = Spec(num_experts=8, num_topk=2, hidden=16, max_tokens=6, wire=Fp32()) if rank_of(group) == last else SPEC
    try:
        Buffer(group, spec)
    except ConfigError as error:
        with Buffer(group, SPEC) as buffer:  # the group is as good as before
            buffer.dispatch(torch.zeros(0, 16, dtype=torch.bfloat16), torch.zeros(0, 2, dtype=torch.int64))
        return str(error)


@pytest.mark.worlds("inproc-2", "inproc-4", "processes-2")
def test_another_spec_is_found_on_every_rank(world):
    last = world.num_ranks - 1
    (text,) = set(world.run(make_with_another_spec, last))
    assert text.startswith(f"the Specs of rank 0 and rank {last} differ in max_tokens: 5 != 6; wire: Bf16() != Fp32()")


def make_with_other_scales(group):
    wire = Fp8(block=8, column_major=rank_of(group) == 1)
    with pytest.raises(ConfigError) as caught:
        Buffer(group, replace(SPEC, wire=wire))
    return str(caught.value)


@pytest.mark.worlds("inproc-2", "processes-2")
def test_scales_that_would_lie_in_other_places_are_found_on_every_rank(world):
    (text,) = set(world.run(make_with_other_scales))
    assert text.startswith("the Specs of rank 0 and rank 1 differ in wire: Fp8(block=8, ")
    assert text.count("column_major=") == 2


def make_with(group, spec, kwargs):
    return Buffer(group, spec, **kwargs)


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize(
    ("spec", "kwargs", "says"),
    [
        ("a spec", {}, "rank 0: spec is a str; pass a crossdock.Spec"),
        (SPEC, {"timeout_s": 0}, "rank 0: timeout_s=0; pass a positive number of seconds"),
        (Spec(num_experts=7, num_topk=2, hidden=16, max_tokens=5), {}, "num_experts=7 is not divisible by num_ranks=2"),
    ],
    ids=["spec", "timeout", "experts"],
)
def test_what_cannot_be_is_refused_on_every_rank(world, spec, kwargs, says):
    for error in world.outcomes(make_with, spec, kwargs):
        assert isinstance(error, ConfigError)
        assert str(error).startswith(says)


def test_the_default_group_must_exist():
    with pytest.raises(ConfigError, match=r"init_process_group first, or use crossdock\.run_local"):
        Buffer(None, SPEC)
    for num_ranks in (0, "2"):
        with pytest.raises(ConfigError, match=f"num_ranks={num_ranks!r}; pass a positive number of threads"):
            run_local(rank_of, num_ranks)


def use_default_group(_, case):
    with Buffer(None, case.spec) as buffer:
        assert buffer.rank == dist.get_rank()
        return observed(buffer.dispatch(case.x[buffer.rank], case.topk[buffer.rank]))


@pytest.mark.worlds("processes-2")
def test_no_group_is_the_default_group(world):
    case = make_case(SPEC, [5, 3])
    check_received(case, world.run(use_default_group, case), weights=False, extras=False)


def use_two_buffers(group, cases):
    """Two buffers of one group take turns, one's plan is refused by the other, and one outlives the other."""
    with Buffer(group, cases[0].spec, debug=True) as a:
        with Buffer(group, cases[1].spec, debug=True) as b:
            r = a.rank
            started = [buffer.dispatch_start(c.x[r], c.topk[r]) for buffer, c in zip((a, b), cases, strict=True)]
            recvs = [pending.wait() for pending in reversed(started)][::-1]
            rows = [observed(recv) for recv in recvs]
            with pytest.raises((ConfigError, PeerFailed), match="the plan was made by another buffer"):
                b.combine(cases[1].y[r], recvs[0].plan)
            outs = [b.combine(cases[1].y[r], recvs[1].plan)]
        return rows, [a.combine(cases[0].y[r], recvs[0].plan), *outs]


@pytest.mark.worlds("inproc-4", "processes-2")
def test_buffers_of_one_group_know_nothing_of_each_other(world):
    specs = SPEC, Spec(num_experts=16, num_topk=3, hidden=8, max_tokens=6, wire=Fp32(), layout=Expanded())
    cases = [make_case(spec, [spec.max_tokens] * world.num_ranks, seed=i) for i, spec in enumerate(specs)]
    got = world.run(use_two_buffers, cases)
    for i, case in enumerate(cases):
        check_received(case, [rows[i] for rows, _ in got], weights=False, extras=False)
        wants = oracle.combined(case.spec, case.topk, case.flat_y())
        assert all(same_bits(outs[i], want) for (_, outs), want in zip(got, wants, strict=True))


def watch_allocation(group, spec):
    """Bytes that set-up allocates for this rank's segment, what the arena says, and the names left in the folder."""
    sizes, allocate = [], os.posix_fallocate

    def fallocate(fd, start, size):
        sizes.append(size)
        allocate(fd, start, size)
        sizes.append(os.fstat(fd).st_size)

    os.posix_fallocate = fallocate
    try:
        buffer = Buffer(group, spec)
    finally:
        os.posix_fallocate = allocate
    buffer.gather_stats()  # everybody has come so far
    files = [path.name for path in Path("/dev/shm").glob(f"crossdock-{buffer.connection.number:016x}*")]
    buffer.close()
    return sizes, buffer.arena.num_bytes, str(buffer.arena), files


@pytest.mark.worlds("processes-2")
def test_a_segment_has_the_bytes_that_the_arena_prints_and_no_name(world):
    for sizes, num_bytes, printed, files in world.run(watch_allocation, SPEC):
        assert sizes == [num_bytes, num_bytes]
        assert printed.splitlines()[-1].split()[0] == f"{num_bytes:,}"
        assert files == []


def make_in_folder(group, folder, last):
    if rank_of(group) == last:
        os.environ["CROSSDOCK_SHM_DIR"] = folder
    try:
        with Buffer(group, SPEC) as buffer:
            recv = buffer.dispatch(torch.zeros(0, 16, dtype=torch.bfloat16), torch.zeros(0, 2, dtype=torch.int64))
            return recv.num_rows
    finally:
        os.environ.pop("CROSSDOCK_SHM_DIR", None)


@pytest.mark.worlds("processes-2")
def test_segments_may_lie_in_several_folders(world, tmp_path):
    for folder in (str(tmp_path), ""):  # none is the default, and no working directory
        assert world.run(make_in_folder, folder, 1) == [0, 0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.worlds("processes-2")
def test_a_rank_without_room_for_its_segment_is_known_to_all(world, tmp_path):
    (tmp_path / "file").touch()
    for folder in ("nowhere", "file"):
        for error in world.outcomes(make_in_folder, str(tmp_path / folder), 1):
            assert isinstance(error, TransportError)
            assert re.match(rf"rank 1: cannot create its segment .*{folder}.*set CROSSDOCK_SHM_DIR", str(error))


def leave_early(group, first):
    """One rank leaves after a call; what the others started with it in it is done, what they start then fails."""
    x, idx = torch.ones(1, 16, dtype=torch.bfloat16), torch.tensor([[0, 7]])
    buffer = Buffer(group, SPEC)
    assert "open" in repr(buffer)
    buffer.dispatch(x, idx)
    if buffer.rank == first:
        buffer.close()
        buffer.close()
        assert "closed" in repr(buffer)
        with pytest.raises(ConfigError, match="the buffer is closed; make a new one"):
            buffer.dispatch(x, idx)
        return None
    with pytest.raises(PeerFailed) as raised:
        buffer.dispatch(x, idx)
    return raised.value.rank, raised.value.reason


@pytest.mark.worlds("inproc-4", "processes-2")
@pytest.mark.parametrize("first", [0, 1])
def test_leaving_is_told_to_those_that_stay(world, first):
    got = world.run(leave_early, first)
    assert [answer for r, answer in enumerate(got) if r != first] == [(first, "it has closed its buffer")] * (
        len(got) - 1
    )


def find_no_segment(group, number):
    """Rank 1 cannot open rank 0's segment: it is not there, as of another host, or no more files can be opened."""
    real = os.open
    if rank_of(group) == 1:

        def opened(path, flags, *args, **kwargs):
            if not flags & os.O_CREAT and str(path).endswith("-0"):
                raise OSError(number, os.strerror(number), path)
            return real(path, flags, *args, **kwargs)

        os.open = opened
    try:
        Buffer(group, SPEC)
    finally:
        os.open = real


@pytest.mark.worlds("processes-2")
@pytest.mark.parametrize(
    ("number", "what_to_do"),
    [
        (errno.ENOENT, "for ranks of several hosts pass topology=Topology.of(group)"),
        (errno.EMFILE, "(Too many open files): raise the limit of open files (ulimit -n)"),
    ],
)
def test_a_segment_that_cannot_be_opened_is_told_to_all(world, number, what_to_do):
    for error in world.outcomes(find_no_segment, number):
        assert isinstance(error, NotSupported)
        assert "rank 1: cannot open the segment of rank 0" in str(error)
        assert what_to_do in str(error)


def fail_behind_the_meeting(group):
    """Rank 1 has no memory for what is its own of a buffer; then both have."""
    lay = Connection.lay

    def without_memory(connection, *args, **kwargs):
        if connection.rank == 1:
            raise MemoryError("no room")
        return lay(connection, *args, **kwargs)

    with mock.patch.object(Connection, "lay", without_memory), pytest.raises((MemoryError, TransportError)) as raised:
        Buffer(group, SPEC)
    Buffer(group, SPEC).close()
    return str(raised.value)


@pytest.mark.worlds("processes-2")
def test_what_fails_on_one_rank_behind_the_meeting_fails_on_all(world):
    assert world.run(fail_behind_the_meeting) == ["rank 1: MemoryError: no room", "no room"]


def fail_between_two_looks(group):
    """Rank 0 looks at rank 1's flag; then rank 1 fails, and leaves; then rank 0 goes on with what it saw."""
    buffer = Buffer(group, SPEC)
    if buffer.rank == 1:
        meet(group)
        with pytest.raises(KeyError), buffer:
            raise KeyError("mine")
        meet(group)
        return
    load, looked = buffer._transport.load, []

    def look(box, index, sender):
        value = load(box, index, sender)
        if (box, sender) == ("aborts", 1) and not looked:
            looked.append(value)
            meet(group)
            meet(group)
        return value

    buffer._transport.load = look
    with pytest.raises(PeerFailed, match="KeyError: 'mine'"):
        buffer.dispatch(torch.zeros(0, 16, dtype=torch.bfloat16), torch.zeros(0, 2, dtype=torch.int64))


@pytest.mark.worlds("inproc-2", "processes-2")
def test_why_a_rank_failed_is_known_also_when_it_leaves_at_once(world):
    world.run(fail_between_two_looks)


FORKED = """
import os, signal
import crossdock.nn
import torch
child = os.fork()
if child == 0:
    signal.alarm(20)
    group = crossdock.ThreadGroup.world(1)[0]
    spec = crossdock.Spec(num_experts=2, num_topk=2, hidden=64, max_tokens=512, wire=crossdock.Fp32())
    with crossdock.Buffer(group, spec) as buffer:
        recv = buffer.dispatch(torch.ones(512, 64), torch.tensor([[0, 1]]).repeat(512, 1))
        os._exit(0 if buffer.combine(recv.x, recv.plan).sum() == 512 * 64 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_importing_starts_no_thread_that_a_fork_would_miss():
    """Ranks may be forks of a process that has imported the library, as those of multiprocessing are by default."""
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKED], env=variables | {"OMP_NUM_THREADS": "2"}, check=False
    )
    assert ended.returncode == 0
