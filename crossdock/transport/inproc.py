"""Ranks that are threads of one process: for trying things out, for doctests, and for virtual ranks in kernel tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from crossdock.arena import Arena
from crossdock.errors import ConfigError, PeerFailed
from crossdock.transport.host import HostTransport

Value = TypeVar("Value")
Result = TypeVar("Result")


class _Meeting:
    """Where the threads of one world meet: a table of values and a barrier, and who has gone home."""

    def __init__(self, num_ranks: int, timeout_s: float) -> None:
        self.values: list[Any] = [None] * num_ranks
        self.gone = [False] * num_ranks
        self.barrier = threading.Barrier(num_ranks, timeout=timeout_s)


class ThreadGroup:
    """One thread's membership in a world of threads; ``ThreadGroup.world(4)`` makes all four."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = len(meeting.values)
        self._meeting = meeting

    @staticmethod
    def world(num_ranks: int, *, timeout_s: float = 100) -> list[ThreadGroup]:
        """The groups of ``num_ranks`` threads, one for each."""
        if num_ranks < 1:
            raise ConfigError(f"num_ranks={num_ranks}; pass a positive number of threads")
        meeting = _Meeting(num_ranks, timeout_s)
        return [ThreadGroup(rank, meeting) for rank in range(num_ranks)]

    def all_gather(self, value: Value) -> list[Value]:
        """Every rank's value, by rank. Collective among the world's threads."""
        self._meeting.values[self.rank] = value
        try:
            self._meeting.barrier.wait()
            values: list[Value] = list(self._meeting.values)
            self._meeting.barrier.wait()
        except threading.BrokenBarrierError:
            gone = [rank for rank, is_gone in enumerate(self._meeting.gone) if is_gone]
            raise PeerFailed(gone[0] if gone else self.rank, "it did not take part in the set-up") from None
        return values

    def is_alive(self, peer: int) -> bool:
        """False once the peer's program has ended."""
        return not self._meeting.gone[peer]

    def go(self) -> None:
        """Says that this rank's program has ended."""
        self._meeting.gone[self.rank] = True
        if self._meeting.barrier.n_waiting:
            self._meeting.barrier.abort()


def connect(group: ThreadGroup, arena: Arena) -> HostTransport:
    """Gives every thread the same memory, allocated by rank 0. Collective."""
    memory = torch.zeros(arena.stride * group.size, dtype=torch.uint8) if group.rank == 0 else None
    shared = group.all_gather(memory)[0]
    assert isinstance(shared, torch.Tensor)
    return HostTransport(
        shared, arena, rank=group.rank, between_processes=False, is_alive=group.is_alive, close=lambda: None
    )


def run_local(program: Callable[[ThreadGroup], Result], num_ranks: int) -> list[Result]:
    """Runs ``program(group)`` on ``num_ranks`` threads and gives their results by rank.

    The exception of the lowest rank whose program failed by itself is raised; one that only reports a failed peer
    comes second.

    >>> run_local(lambda group: sum(group.all_gather(group.rank)), 4)
    [6, 6, 6, 6]
    """

    def run(group: ThreadGroup) -> Result:
        try:
            return program(group)
        finally:
            group.go()

    with ThreadPoolExecutor(num_ranks, thread_name_prefix="rank") as pool:
        futures = [pool.submit(run, group) for group in ThreadGroup.world(num_ranks)]
    errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, PeerFailed))
    return [future.result() for future in futures]
