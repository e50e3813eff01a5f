"""Ranks that meet by a group that is not torch's: processes joined by pipes, behind the adapter that the docs show."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from crossdock import Buffer, ConfigError, Expanded, Fp32, Group, PeerFailed, Spec, ThreadGroup, run_local
from crossdock.transport.base import group_of
from crossdock.transport.symmetric import _rendezvous, as_torchs
from tests.child import HUNG_S
from tests.house.pages import ROOT, blocks_of

SPEC = Spec(num_experts=6, num_topk=2, hidden=4, max_tokens=3, wire=Fp32(), layout=Expanded())
LIMIT_S = HUNG_S


class PipeComm:
    """What mpi4py's communicator has, over pipes: rank 0 gathers, and tells all."""

    def __init__(self, rank, pipes):
        self._rank, self._pipes = rank, pipes

    def Get_rank(self):  # noqa: N802 - mpi4py's name
        return self._rank

    def Get_size(self):  # noqa: N802
        return len(self._pipes) + 1 if self._rank == 0 else self._pipes[0]

    def allgather(self, value):
        if self._rank:
            self._pipes[1].send(value)
            return self._pipes[1].recv()
        values = [value, *(pipe.recv() for pipe in self._pipes)]
        for pipe in self._pipes:
            pipe.send(values)
        return values


def adapter():
    """The class that the docs show."""
    text = (ROOT / "docs" / "quickstart.md").read_text()
    (block,) = (block.text for block in blocks_of(text) if block.text.startswith("class MpiGroup"))
    names = {}
    exec(block, names)
    assert len(block.splitlines()) <= 11
    return names["MpiGroup"]


def serve(program, answers, rank, pipes):
    torch.set_num_threads(1)
    assert not dist.is_initialized()
    try:
        answers.put((rank, program(adapter()(PipeComm(rank, pipes)))))
    except BaseException as error:
        answers.put((rank, repr(error)))
        raise


def run_processes(program, num_ranks):
    """What the program gives on each rank, a process without torch.distributed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    answers, ends = context.Queue(), [context.Pipe() for _ in range(num_ranks - 1)]
    pipes = [[mine for mine, _ in ends], *([num_ranks, theirs] for _, theirs in ends)]
    processes = [context.Process(target=serve, args=(program, answers, r, pipes[r])) for r in range(num_ranks)]
    for process in processes:
        process.start()
    results = dict(answers.get(timeout=LIMIT_S) for _ in processes)
    for process in processes:
        process.join(LIMIT_S)
    assert [process.exitcode for process in processes] == [0] * num_ranks, results
    return [results[rank] for rank in range(num_ranks)]


def there_and_back(group):
    """A round, the statistics of all, and a failure of one rank, of which the others hear."""
    assert isinstance(group, Group)
    topk_idx = torch.tensor([[0, 5], [3, -1], [2, 4]])
    x = torch.full((3, 4), group.rank + 1.0)
    with Buffer(group, SPEC, timeout_s=LIMIT_S) as buffer:
        recv = buffer.dispatch(x, topk_idx)
        out = buffer.combine(recv.x * 10, recv.plan)
        stats = buffer.gather_stats()
        try:
            buffer.dispatch(x, topk_idx if group.rank else topk_idx + 6)
        except ConfigError as error:
            failure = str(error)
        except PeerFailed as error:
            failure = error.rank
        again = buffer.dispatch(x, topk_idx).num_rows
    return recv.src_idx.tolist(), out.tolist(), stats.num_tokens_per_expert.tolist(), failure, again


def test_processes_that_meet_by_pipes_exchange_rows():
    results = run_processes(there_and_back, 3)
    with_threads = run_local(there_and_back, 3)
    for (*rows, failure, again), (*wants, _, _), rank in zip(results, with_threads, range(3), strict=True):
        assert rows == wants
        assert rows[1] == [[20.0 * (rank + 1)] * 4, [10.0 * (rank + 1)] * 4, [20.0 * (rank + 1)] * 4]
        assert rows[2] == [3, 0, 3, 3, 3, 3]
        assert failure == 0 if rank else "topk_idx[0, 0] = 6" in failure
        assert again == len(rows[0])


def in_torchs_terms(group):
    """What torch finds by the name under which symmetric memory meets."""
    path = os.path.join(tempfile.gettempdir(), f"crossdock-test-{group.all_gather(os.getpid())[0]}")  # noqa: PTH118
    with as_torchs(group, "crossdock-name", path) as store:
        found = dist.distributed_c10d._resolve_process_group("crossdock-name")
        store.set(f"from {group.rank}", str(group.rank))
        heard = [found.get_group_store().get(f"from {rank}").decode() for rank in range(group.size)]
        seen = found.rank(), found.size(), heard
    with pytest.raises((RuntimeError, ValueError, LookupError)):
        dist.distributed_c10d._resolve_process_group("crossdock-name")
    group.all_gather(None)
    if group.rank == 0 and os.path.exists(path):  # noqa: PTH110
        os.unlink(path)  # noqa: PTH108
    return seen


def test_any_group_is_one_of_torchs_while_memory_is_mapped():
    """How ranks on GPUs meet; mapping itself takes a GPU."""
    assert run_processes(in_torchs_terms, 2) == [(rank, 2, ["0", "1"]) for rank in range(2)]


@pytest.mark.parametrize("is_older", [False, True])
def test_a_torch_that_wants_to_be_told_of_a_group_is_told(tmp_path, is_older):
    calls = []

    def rendezvous(_segment, name):
        calls.append("rendezvous")
        if is_older and "told" not in calls:
            raise RuntimeError(f"get_group_info: no group info associated with the group name {name}")
        return name

    memory = mock.Mock(rendezvous=rendezvous, set_group_info=lambda *_: calls.append("told"))
    with mock.patch("crossdock.transport.symmetric._c10d._SymmetricMemory", memory):
        group = ThreadGroup.world(1)[0]
        assert _rendezvous(group, torch.zeros(1), "crossdock-older", tmp_path / "store") == "crossdock-older"
    assert calls == (["rendezvous", "told", "rendezvous"] if is_older else ["rendezvous"])


class Made:
    def __init__(self, **parts):
        self.__dict__.update(parts)


BAD_GROUPS = {
    "no group": (3, "group is a int; pass a group of torch.distributed, a 1-D DeviceMesh, None .*crossdock.Group"),
    "a communicator of MPI": (PipeComm(0, []), "group is a PipeComm; .*any object with rank, size and all_gather"),
    "a rank that is a method": (
        Made(rank=len, size=2, all_gather=list),
        "has rank=<built-in function len> and size=2; give it integers",
    ),
    "a rank behind the last": (Made(rank=2, size=2, all_gather=list), "has rank=2 and size=2; .*from 0 to size - 1"),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_what_is_no_group_is_refused(name):
    given, says = BAD_GROUPS[name]
    with pytest.raises(ConfigError, match=says):
        Buffer(given, SPEC)
    with pytest.raises(ConfigError, match=says):
        group_of(given)


@pytest.mark.parametrize(
    ("all_gather", "says"),
    [
        (lambda value: [value], r"ranks \[0\]; give a list of every rank's, 0 to 1 in order"),
        (lambda value: [value, value], r"ranks \[0, 0\]"),
        (lambda value: [(1, *value[1:]), value], r"ranks \[1, 0\]"),
        (iter, "ranks tuple_iterator"),
    ],
)
def test_a_group_that_gathers_otherwise_is_refused(all_gather, says):
    with pytest.raises(ConfigError, match=f"all_gather of the group, a Made, gave the values of {says}"):
        Buffer(Made(rank=0, size=2, all_gather=all_gather), SPEC)
