"""Worlds: the same program on threads (``inproc-4``) or on processes (``processes-4``), results and errors by rank."""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crossdock import PeerFailed, PeerTimeout, ThreadGroup, run_local

LIMIT_S = 60
"""A program that has not ended by then is a failed test."""
_GROUP_LIMIT_S = 30

Program = Callable[..., Any]


class WorkerLost(Exception):
    """A rank's process ended, or did not answer in time."""


class World:
    """Ranks to run programs on.

    A program is a function of a module, ``program(group, *args)``; its ``group`` goes into ``crossdock.Buffer``.
    """

    def __init__(self, name: str, pools: Pools) -> None:
        kind, num_ranks = name.split("-")
        self.name = name
        self.kind = kind
        self.num_ranks = int(num_ranks)
        self._pools = pools

    def run(self, program: Program, *args: Any) -> list[Any]:
        """The results by rank. Raises what the lowest rank raised that failed by itself, not because of a peer."""
        outcomes = self.outcomes(program, *args)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, (PeerFailed, PeerTimeout)))
        return outcomes

    def outcomes(self, program: Program, *args: Any) -> list[Any]:
        """What each rank returned, or the exception that it raised."""
        if self.kind == "processes":
            return self._pools.outcomes(self.num_ranks, program, args)
        return run_local(lambda group: _outcome(program, group, args).value, self.num_ranks)


def meet(group: Any) -> None:
    """All ranks of a program have come here; not through a buffer."""
    if isinstance(group, ThreadGroup):
        group.all_gather(None)
    else:
        dist.barrier(group)


class Pools:
    """Sets of processes, made when first asked for and again when one of them was lost."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}

    def outcomes(self, num_ranks: int, program: Program, args: tuple[Any, ...]) -> list[Any]:
        if num_ranks not in self._pools:
            self._pools[num_ranks] = _Pool(num_ranks)
        pool = self._pools[num_ranks]
        outcomes = pool.run(program, args)
        if any(isinstance(outcome, WorkerLost) for outcome in outcomes):
            del self._pools[num_ranks]
            pool.close()
        return outcomes

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


@dataclass(frozen=True)
class _Outcome:
    value: Any
    """The result, or the exception."""
    text: str = ""
    """The exception's traceback, as the other process printed it."""


def _outcome(program: Program, group: Any, args: tuple[Any, ...]) -> _Outcome:
    try:
        return _Outcome(program(group, *args))
    except BaseException as error:  # noqa: BLE001 - how a rank leaves its program is an outcome too
        return _Outcome(error, traceback.format_exc())


class _Pool:
    """Processes that run one program after another, each in a process group of its own."""

    def __init__(self, num_ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="crossdock-test-")
        self._connections, self._processes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_serve, args=(rank, num_ranks, store, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, program: Program, args: tuple[Any, ...]) -> list[Any]:
        message = _dumps((program, args))
        for connection in self._connections:
            connection.send_bytes(message)
        lost = [WorkerLost(f"rank {rank} did not end within {LIMIT_S} s") for rank in range(len(self._connections))]
        outcomes: list[Any] = list(lost)
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        deadline = time.monotonic() + LIMIT_S
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ready in multiprocessing.connection.wait(list(waiting), left):
                rank = waiting.pop(ready)
                outcomes[rank] = self._receive(rank)
        return outcomes

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(0.5)
            process.kill()
            process.join()
            process.close()
        self._folder.cleanup()

    def _receive(self, rank: int) -> Any:
        try:
            outcome = pickle.loads(self._connections[rank].recv_bytes())  # noqa: S301 - our own process
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(5)
            return WorkerLost(f"the process of rank {rank} ended with exit code {self._processes[rank].exitcode}")
        if outcome.text and hasattr(outcome.value, "add_note"):
            outcome.value.add_note(f"Raised on rank {rank}:\n{outcome.text}")
        return outcome.value


def _serve(rank: int, num_ranks: int, store: str, connection: multiprocessing.connection.Connection) -> None:
    """What a process does: programs in, outcomes out, until the pipe is closed."""
    warnings.simplefilter("error")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=_GROUP_LIMIT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=limit)
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            os._exit(0)
        # A group of its own, so that a program that left its collectives half done does not disturb the next.
        group = dist.new_group(timeout=limit)
        try:
            program, args = pickle.loads(message)  # noqa: S301 - our own process
            outcome = _outcome(program, group, args)
        except BaseException as error:  # noqa: BLE001 - whatever goes wrong is for the test to see
            outcome = _Outcome(error, traceback.format_exc())
        try:
            reply = _dumps(outcome)
            if outcome.text:
                pickle.loads(reply)  # noqa: S301 - our own
        except BaseException:  # noqa: BLE001 - an exception that cannot be sent is told in words
            error = RuntimeError(f"rank {rank} gave {outcome.value!r}, which cannot be sent\n{traceback.format_exc()}")
            reply = _dumps(_Outcome(error, outcome.text))
        connection.send_bytes(reply)
        dist.destroy_process_group(group)


class _Pickler(pickle.Pickler):
    """Sends a tensor as its bytes. Pickle would send all memory behind a view, a whole arena, and no FP8 at all."""

    def reducer_override(self, obj: object) -> Any:
        if type(obj) is not torch.Tensor:
            return NotImplemented
        flat = obj.detach().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if obj.numel() else b""
        return _tensor, (raw, obj.dtype, obj.shape, obj.requires_grad)


def _tensor(raw: bytes, dtype: torch.dtype, shape: torch.Size, requires_grad: bool) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.view(shape).requires_grad_(requires_grad)


def _dumps(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()
