"""Ranks as processes of this host: started together, and all killed when one of them fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from ctypes import Array, c_double
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from crossdock._env import num_cores
from crossdock.cli.device import Gpus
from crossdock.cli.line import StartingLine, shared_moments
from crossdock.cli.signals import handled
from crossdock.errors import CrossdockError, PeerFailed, PeerTimeout

Job = TypeVar("Job")
Result = TypeVar("Result")

_HOST = "127.0.0.1"
_GRACE_S = 0.5
"""Seconds after the first failure in which other ranks may report theirs: the first is not always the cause."""
_EXIT_S = 10.0


@dataclass(frozen=True)
class Member:
    """One rank, as its program sees it. The default process group is initialised, on gloo."""

    rank: int
    num_ranks: int
    line: StartingLine
    tell: Callable[..., None]
    """Calls the world's ``on_progress`` with the same arguments; ignored on other ranks than 0."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The rank's device; a GPU is also the current device."""
    has_nccl: bool = False
    """Whether the default group has NCCL for CUDA tensors; NCCL refuses ranks that share a GPU."""


@dataclass(frozen=True, kw_only=True)
class _Seat:
    """Arguments of a rank's process."""

    rank: int
    num_ranks: int
    port: int
    moments: Array[c_double]
    gpus: Gpus | None


class RankDied(CrossdockError, RuntimeError):
    """A rank's process ended without a result."""


def run_world(
    program: Callable[[Member, Job], Result],
    job: Job,
    *,
    num_ranks: int,
    on_progress: Callable[..., None],
    gpus: Gpus | None = None,
) -> list[Result]:
    """Runs ``program(member, job)`` in ``num_ranks`` new processes and returns the results by rank.

    Each process gets an equal share of the cores as torch threads, and a GPU if ``gpus`` is given. Program, job and
    results are pickled, so the program must be a function of a module. If a rank fails or dies, or this process is
    interrupted, all processes are killed; they also end when this process has ended.

    Args:
        on_progress: called in this process with the arguments of rank 0's ``Member.tell``.
        gpus: the ranks' GPUs (``gpus_for``); None: CPUs.

    Raises:
        CrossdockError: a rank's error; if several ranks failed, one that is not about a peer.
        RankDied: a rank's process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    moments = shared_moments(num_ranks, context.RawArray)
    processes: list[BaseProcess] = []
    receivers: list[Connection] = []
    wait_s = 0.0
    try:
        with _interrupts_ignored():
            for rank in range(num_ranks):
                receiver, sender = context.Pipe(duplex=False)
                seat = _Seat(rank=rank, num_ranks=num_ranks, port=store.port, moments=moments, gpus=gpus)
                args = (program, job, seat, sender)
                process: BaseProcess = context.Process(target=_serve, args=args, daemon=True, name=f"rank {rank}")
                process.start()
                sender.close()  # otherwise the pipe would stay open when the process ends
                processes.append(process)
                receivers.append(receiver)
        results = _collect(receivers, processes, on_progress)
        wait_s = _EXIT_S
        return results
    finally:
        for process in processes:
            process.join(wait_s)
            process.kill()
            process.join()


def _collect(receivers: list[Connection], processes: list[BaseProcess], on_progress: Callable[..., None]) -> list[Any]:
    """All ranks' results; raises the error that is closest to the cause."""
    results: dict[int, Any] = {}
    errors: list[CrossdockError] = []
    running = {receiver: rank for rank, receiver in enumerate(receivers)}
    deadline = float("inf")
    while running and (left_s := deadline - time.monotonic()) > 0:
        for receiver in connection.wait(list(running), None if not errors else left_s):
            assert isinstance(receiver, Connection)
            rank = running[receiver]
            try:
                kind, value = receiver.recv()
            except (EOFError, ConnectionResetError):
                kind, value = "error", _death(rank, processes[rank])
            if kind == "progress":
                on_progress(*value)
                continue
            del running[receiver]
            if kind == "result":
                results[rank] = value
            else:
                errors.append(value)
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    if errors:
        raise first_cause(errors)
    return [results[rank] for rank in range(len(receivers))]


def first_cause(errors: Sequence[CrossdockError]) -> CrossdockError:
    """Of the errors of several ranks, one that is closest to the cause: not about a peer, if there is one."""
    return min(errors, key=_distance_from_cause)


def _distance_from_cause(error: CrossdockError) -> int:
    if isinstance(error, RankDied):
        return 0
    if isinstance(error, (PeerFailed, PeerTimeout)):
        return 2
    return 3 if type(error) is CrossdockError else 1


def _death(rank: int, process: BaseProcess) -> RankDied:
    process.join(_EXIT_S)
    code = process.exitcode
    by_signal = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else None
    how = by_signal or f"ended with exit code {code}"
    hint = "; SIGKILL is often the system running out of memory: pass fewer tokens or ranks" if code == -9 else ""
    return RankDied(f"the process of rank {rank} {how} before it had a result{hint}")


def _interrupts_ignored() -> AbstractContextManager[None]:
    """Ignores Ctrl-C, so that processes started within the block ignore it from their first instruction.

    The parent ends them. SIGINT is ignored and not blocked, because multiprocessing unblocks it when it starts its
    resource tracker. A Ctrl-C within the block, some milliseconds, is lost.
    """
    return handled((signal.SIGINT,), signal.SIG_IGN)


def _serve(program: Callable[[Member, Any], Any], job: object, seat: _Seat, sender: Connection) -> None:
    """The main function of a rank's process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, num_cores() // seat.num_ranks))

    def tell(*progress: object) -> None:
        if seat.rank == 0:
            sender.send(("progress", progress))

    try:
        device, backend = _take_device(seat)
        store = TCPStore(_HOST, seat.port, is_master=False)
        dist.init_process_group(backend, store=store, rank=seat.rank, world_size=seat.num_ranks)
        line = StartingLine(seat.moments, seat.rank)
        result = program(Member(seat.rank, seat.num_ranks, line, tell, device, "nccl" in backend), job)
        dist.destroy_process_group()
        sender.send(("result", result))
    except CrossdockError as error:
        sender.send(("error", error))
    except Exception:  # noqa: BLE001 - the parent process must show any error
        sender.send(("error", CrossdockError(f"rank {seat.rank} failed:\n{traceback.format_exc()}")))


def _take_device(seat: _Seat) -> tuple[torch.device, str]:
    """The rank's device, made current, and the backend of its process group. CUDA must not be initialised yet."""
    if seat.gpus is None:
        return torch.device("cpu"), "gloo"
    os.environ.update(seat.gpus.variables)
    sharing = seat.gpus.sharing
    device = torch.device("cuda", seat.rank % sharing.num_gpus)
    torch.cuda.set_device(device)
    return device, "cpu:gloo,cuda:nccl" if sharing.kind == "own" and dist.is_nccl_available() else "gloo"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
