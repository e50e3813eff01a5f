"""Worlds: run one program on ranks that are threads (``inproc-4``) or processes (``processes-4``).

Those of ``grid-2x3`` are threads of two nodes, with a rail between them whose messages are late; those of ``dist-2x2``
and ``nixl-2x2`` are processes, with torch.distributed or NIXL between nodes.

Results and errors are returned by rank. The ranks of ``interpreted-2`` are processes whose buffers use the CUDA backend
in Triton's interpreter. Those of ``cuda-4`` are processes that share GPUs; those of ``cudathreads-4`` are threads of
another process, with a stream each. On GPUs a program's arguments are moved to its rank's device, its results to the
CPU.
"""

from __future__ import annotations

import faulthandler
import io
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from crossdock import Buffer, Connection, PeerFailed, PeerTimeout, Spec, ThreadGroup, Topology, run_local
from crossdock.cli.mps.sharing import MOST_PROCESSES
from crossdock.transport.rail import Box
from crossdock.transport.rails.dist import DistEngine
from crossdock.transport.rails.inproc import InprocEngine
from crossdock.transport.rails.nixl import NixlEngine
from tests.child import HUNG_S
from tests.gpu.ranks import own_stream, take_all, take_share

_GROUP_LIMIT_S = 120
_LET_GO_S = 20
"""How long a rail's threads may take to end, once its peers have left too."""
_TIMEOUT_S = 30
"""Of a buffer on CUDA, whose calls of other ranks may have kernels to compile."""

Program = Callable[..., Any]


class WorkerLost(Exception):
    """A rank's process ended, or did not answer in time."""


class World:
    """Ranks to run programs on.

    A program is a function of a module, ``program(group, *args)``; it makes its buffers by ``open_buffer``.
    """

    def __init__(self, name: str, pools: Pools, **options: Any) -> None:
        kind, size = name.split("-")
        self.name = name
        nodes, _, local = size.rpartition("x")
        self.num_ranks = int(nodes or 1) * int(local)
        self.node_size = int(local)
        self.kind = {"grid": "inproc", "dist": "processes", "nixl": "processes"}.get(kind, kind)
        self._pools = pools
        self._options = _over_rails(kind, int(nodes), int(local)) | options if nodes else options

    def opening(self, **options: Any) -> World:
        """The same ranks; their programs' buffers are made with these options, whatever the program says."""
        return World(self.name, self._pools, **self._options | options)

    def run(self, program: Program, *args: Any) -> list[Any]:
        """The results by rank. Raises what the first rank raised that failed by itself, not because of a peer.

        On a GPU what a call gave is not right either once a peer has failed, and an assertion may find that first.
        """
        outcomes = self.outcomes(program, *args)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            raise min(errors, key=lambda error: (isinstance(error, (PeerFailed, PeerTimeout)), _raised_at(error)))
        return outcomes

    def outcomes(self, program: Program, *args: Any) -> list[Any]:
        """What each rank returned, or the exception that it raised."""
        job = _Job(program, args, self._options)
        if self.kind != "inproc":
            return self._pools.outcomes(self.kind, self.num_ranks, job)
        return run_local(lambda group: _outcome(job, group).value, self.num_ranks)


NIXL_PROBLEM = NixlEngine().problem(ThreadGroup.world(1)[0])
"""Why worlds with NIXL are skipped; None where it is installed."""
NIXL = pytest.param("nixl", marks=pytest.mark.skipif(NIXL_PROBLEM is not None, reason=str(NIXL_PROBLEM)))
"""A rail to try."""
LATEST_S = 0.003
"""Messages between the nodes of a grid of threads are under way for so long, at most."""


def _over_rails(kind: str, nodes: int, local: int) -> dict[str, Any]:
    """Of buffers on a grid: what joins nodes. Messages between threads are late."""
    box = Box(chunk_bytes=1024, num_chunks=2)
    late = InprocEngine(lambda: random.random() * LATEST_S, box=box)
    rail = {"grid": late, "dist": DistEngine(box=box), "nixl": NixlEngine(box=box)}[kind]
    return {"topology": Topology.grid(nodes=nodes, local=local), "rail": rail}


class _Place(threading.local):
    """Where this thread's program runs, and what its test wants of its buffers."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.make_buffer: Callable[..., Buffer] = Buffer
        self.make_connection: Callable[..., Connection] = Connection
        self.options: dict[str, Any] = {}


_place = _Place()


def device() -> torch.device:
    """Where a program's tensors lie in this world; cpu outside of programs."""
    return _place.device


def open_buffer(group: Any, spec: Spec, **options: Any) -> Buffer:
    """A buffer on this world's device, made with the test's options (``World.opening``) over the program's."""
    if _place.device.type != "cpu":
        options = {"device": _place.device, "timeout_s": _TIMEOUT_S} | options
    return _place.make_buffer(group, spec, **options | _place.options)


def open_connection(group: Any, num_bytes: int, **options: Any) -> Connection:
    """A connection on this world's device."""
    if _place.device.type != "cpu":
        options = {"device": _place.device, "timeout_s": _TIMEOUT_S} | options
    over_rails = {name: _place.options[name] for name in ("topology", "rail") if name in _place.options}
    return _place.make_connection(group, num_bytes, **options | over_rails)


def meet(group: Any) -> None:
    """All ranks of a program have come here; not through a buffer."""
    if isinstance(group, ThreadGroup):
        group.all_gather(None)
    else:
        dist.barrier(group)


class Pools:
    """Sets of processes, made when first asked for and again when one of them was lost.

    Of those on GPUs there are no more at a time than MPS takes: what has not been used for the longest time goes.
    """

    def __init__(self) -> None:
        self._pools: dict[tuple[str, int], _Pool] = {}

    def outcomes(self, kind: str, num_ranks: int, job: _Job) -> list[Any]:
        key = (kind, num_ranks)
        pool = self._pools.pop(key, None)
        if pool is None:
            self._make_room(kind, num_ranks)
            pool = _Pool(kind, num_ranks)
        self._pools[key] = pool  # the last one is the one that was used last
        outcomes = pool.run(job)
        if any(isinstance(outcome, WorkerLost) for outcome in outcomes):
            del self._pools[key]
            pool.close()
        return outcomes

    def _make_room(self, kind: str, num_ranks: int) -> None:
        if not kind.startswith("cuda"):
            return
        most = MOST_PROCESSES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        num_gpus, on_gpus = torch.cuda.device_count(), [key for key in self._pools if key[0].startswith("cuda")]
        while on_gpus and sum(_num_on_a_gpu(*key, num_gpus) for key in [*on_gpus, (kind, num_ranks)]) > most:
            self._pools.pop(on_gpus.pop(0)).close()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def _num_on_a_gpu(kind: str, num_ranks: int, num_gpus: int) -> int:
    """Processes of a world on each GPU; its threads are one."""
    return 1 if kind == "cudathreads" else -(-num_ranks // num_gpus)


class _Job(NamedTuple):
    program: Program
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class _Outcome:
    value: Any
    """The result, or the exception."""
    text: str = ""
    """The exception's traceback, as the other process printed it."""


def _outcome(job: _Job, group: Any) -> _Outcome:
    _place.options = job.options
    try:
        return _Outcome(job.program(group, *job.args))
    except BaseException as error:  # noqa: BLE001 - how a rank leaves its program is an outcome too
        vars(error)[_RAISED_AT] = time.monotonic()
        return _Outcome(error, traceback.format_exc())


_RAISED_AT = "raised_at"
"""When a rank left its program by an error, by a clock that all processes of a machine have."""


def _raised_at(error: BaseException) -> float:
    return float(vars(error).get(_RAISED_AT, math.inf))


class _Pool:
    """Processes that run one program after another, each time in a new group: a rank each, or all ranks in one."""

    def __init__(self, kind: str, num_ranks: int) -> None:
        context = _context_of(kind)
        self._num_ranks = num_ranks
        self._folder = tempfile.TemporaryDirectory(prefix="crossdock-test-")
        self._connections, self._processes = [], []
        store = str(Path(self._folder.name) / "store")
        num_devices = torch.cuda.device_count() if kind.startswith("cuda") else 0
        if kind.startswith("cuda") and not num_devices:
            raise RuntimeError(f"{kind}-{num_ranks}: this machine has no CUDA device")
        starts: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
            (_serve_interpreted if kind == "interpreted" else _serve, (rank, num_ranks, num_devices, store))
            for rank in range(num_ranks)
        ]
        if kind == "cudathreads":
            starts = [(_serve_threads, (num_ranks,))]
        for serve, args in starts:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, *args), daemon=True)
            with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"} if kind == "interpreted" else {}):
                process.start()  # Triton looks when it is imported
            theirs.close()  # so that the end of the process is the end of the pipe
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, job: _Job) -> list[Any]:
        """What became of the job, by rank."""
        message = _dumps(job)
        for connection in self._connections:
            connection.send_bytes(message)
        replies: dict[int, list[Any]] = {}
        waiting = {connection: i for i, connection in enumerate(self._connections)}
        deadline = time.monotonic() + HUNG_S
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ready in multiprocessing.connection.wait(list(waiting), left):
                i = waiting.pop(ready)
                replies[i] = self._receive(i)
        return [outcome for i in range(len(self._connections)) for outcome in replies.get(i) or self._late(i)]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(0.5)
            process.kill()
            process.join()
            process.close()
        self._folder.cleanup()

    def _ranks(self, i: int) -> range:
        """Those that process i is."""
        return range(self._num_ranks) if len(self._processes) < self._num_ranks else range(i, i + 1)

    def _late(self, i: int) -> list[Any]:
        pid = self._processes[i].pid
        assert pid is not None
        os.kill(pid, signal.SIGABRT)  # it says where each of its threads is (faulthandler)
        return [WorkerLost(f"rank {rank} did not end within {HUNG_S} s") for rank in self._ranks(i)]

    def _receive(self, i: int) -> list[Any]:
        """A process's outcomes, of each rank that it is."""
        try:
            replies = pickle.loads(self._connections[i].recv_bytes())  # noqa: S301 - our own process
        except (EOFError, ConnectionResetError):
            self._processes[i].join(5)
            code = self._processes[i].exitcode
            return [WorkerLost(f"the process of rank {rank} ended with exit code {code}") for rank in self._ranks(i)]
        outcomes = []
        for rank, reply in zip(self._ranks(i), replies, strict=True):
            outcome = pickle.loads(reply)  # noqa: S301 - our own process
            if outcome.text and hasattr(outcome.value, "add_note"):
                outcome.value.add_note(f"Raised on rank {rank}:\n{outcome.text}")
            outcomes.append(outcome.value)
        return outcomes


def _context_of(kind: str) -> Any:
    """How a kind's processes are made. CUDA does not survive a fork.

    And forks have the same addresses, where a kernel could take a peer's for its own.
    """
    return context_of_forks() if kind == "processes" else multiprocessing.get_context("spawn")


def context_of_forks() -> Any:
    """Processes are forks of a server that has imported torch, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    # Modules of tests import the last two.
    context.set_forkserver_preload([__name__, "hypothesis", "pytest"])
    return context


def _serve(
    connection: multiprocessing.connection.Connection, rank: int, num_ranks: int, num_devices: int, store: str
) -> None:
    """What a process does that is one rank: programs in, outcomes out, until the pipe is closed."""
    faulthandler.enable()
    warnings.simplefilter("error")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if num_devices:
        _place.device = take_share(rank, num_ranks, num_devices)
    limit = timedelta(seconds=_GROUP_LIMIT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=limit)
    while True:
        message = _next_message(connection)
        # A group of its own, so that a program that left its collectives half done does not disturb the next.
        group = dist.new_group(timeout=limit)
        try:
            outcome = _outcome(pickle.loads(message), group)  # noqa: S301 - our own process
        except BaseException as error:  # noqa: BLE001 - whatever goes wrong is for the test to see
            outcome = _Outcome(error, traceback.format_exc())
        connection.send_bytes(pickle.dumps([_reply(_without_rails(_settled(outcome)), rank)]))
        dist.destroy_process_group(group)


def _serve_interpreted(*args: Any) -> None:
    """The same, on the CUDA backend without a GPU."""
    from tests.interpreted import make_buffer, make_connection

    _place.make_buffer, _place.make_connection = make_buffer, make_connection
    _serve(*args)


def _serve_threads(connection: multiprocessing.connection.Connection, num_ranks: int) -> None:
    """What a process does whose threads are the ranks, each with a stream of its own."""
    faulthandler.enable()
    warnings.simplefilter("error")
    _place.device = place = take_all()

    def run(job: _Job, group: ThreadGroup) -> _Outcome:
        _place.device = place
        with own_stream(place):
            return _outcome(job, group)

    while True:
        message = _next_message(connection)
        try:
            job = pickle.loads(message)  # noqa: S301 - our own process
            torch.cuda.synchronize()  # its tensors came by another stream than the ranks'
            outcomes = run_local(lambda group, job=job: run(job, group), num_ranks)
        except BaseException as error:  # noqa: BLE001 - whatever goes wrong is for the test to see
            outcomes = [_Outcome(error, traceback.format_exc())] * num_ranks
        replies = [_reply(_settled(outcome), rank) for rank, outcome in enumerate(outcomes)]
        connection.send_bytes(pickle.dumps(replies))


def _next_message(connection: multiprocessing.connection.Connection) -> bytes:
    try:
        return connection.recv_bytes()
    except (EOFError, ConnectionResetError):
        os._exit(0)


def _settled(outcome: _Outcome) -> _Outcome:
    """The same, once the device has nothing more to do; a device that failed has lost this process."""
    if _place.device.type == "cpu":
        return outcome
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return _Outcome(WorkerLost(f"the device failed: {error}; the program gave {outcome.value!r}"), outcome.text)
    return outcome


def _without_rails(outcome: _Outcome) -> _Outcome:
    """The same, if the program has left no rail behind: a thread of one may take a core until the process ends."""
    until = time.monotonic() + _LET_GO_S
    for thread in threading.enumerate():
        if thread.name.startswith("crossdock-rail"):
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                return _Outcome(AssertionError(f"{thread} was left by a program that gave {outcome.value!r}"))
    return outcome


def _reply(outcome: _Outcome, rank: int) -> bytes:
    """The outcome to be sent; an exception that cannot be is told in words."""
    try:
        reply = _dumps(outcome)
        if outcome.text:
            pickle.loads(reply)  # noqa: S301 - our own
    except BaseException:  # noqa: BLE001 - whatever pickle says
        error = RuntimeError(f"rank {rank} gave {outcome.value!r}, which cannot be sent\n{traceback.format_exc()}")
        reply = _dumps(_Outcome(error, outcome.text))
    return reply


class _Pickler(pickle.Pickler):
    """Sends a tensor as its bytes, from any device to the receiver's.

    Pickle would send all memory behind a view, a whole arena, and no FP8 at all.
    """

    def reducer_override(self, obj: object) -> Any:
        if type(obj) is not torch.Tensor:
            return NotImplemented
        flat = obj.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if obj.numel() else b""
        return _tensor, (raw, obj.dtype, obj.shape, obj.requires_grad)


def _tensor(raw: bytes, dtype: torch.dtype, shape: torch.Size, requires_grad: bool) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.view(shape).to(_place.device).requires_grad_(requires_grad)


def _dumps(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()
