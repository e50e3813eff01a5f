"""Ranks that are threads of one process: for trying things out, for doctests, and for virtual ranks in kernel tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from crossdock.arena import Control
from crossdock.errors import ConfigError, PeerFailed, TransportError
from crossdock.fields import is_integer
from crossdock.transport.base import NodeGroup, raise_on_all
from crossdock.transport.device import DeviceTransport
from crossdock.transport.host import HostTransport
from crossdock.transport.segments import Segments, remedy

Value = TypeVar("Value")
Result = TypeVar("Result")


class _Meeting:
    """Where the threads of one world exchange values, and see who has gone home."""

    def __init__(self, num_ranks: int, timeout_s: float) -> None:
        self.gone: set[int] = set()
        self.num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._brought: dict[int, Any] = {}
        self._round = 0
        self._gathered: list[Any] = []

    def gather(self, rank: int, value: Value) -> list[Value]:
        """Everybody's values once all have come; a round's are kept until all have come to the next."""
        with self._changed:
            this_round = self._round
            self._brought[rank] = value
            if len(self._brought) == self.num_ranks:
                self._gathered = [self._brought.pop(r) for r in range(self.num_ranks)]
                self._round += 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._round != this_round or self.gone, self._timeout_s)
            if self._round == this_round:
                late = min(self.gone, default=min(set(range(self.num_ranks)) - set(self._brought)))
                raise PeerFailed(late, "it did not take part in the set-up")
            return self._gathered

    def go(self, rank: int) -> None:
        """Says that a rank's program has ended."""
        with self._changed:
            self.gone.add(rank)
            self._changed.notify_all()


class ThreadGroup:
    """One thread's membership in a world of threads; ``ThreadGroup.world(4)`` makes all four."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = meeting.num_ranks
        self._meeting = meeting

    @staticmethod
    def world(num_ranks: int, *, timeout_s: float = 100) -> list[ThreadGroup]:
        """The groups of ``num_ranks`` threads, one for each."""
        if not is_integer(num_ranks, least=1):
            raise ConfigError(f"num_ranks={num_ranks!r}; pass a positive number of threads")
        meeting = _Meeting(num_ranks, timeout_s)
        return [ThreadGroup(rank, meeting) for rank in range(num_ranks)]

    def all_gather(self, value: Value) -> list[Value]:
        """Every rank's value, by rank. Collective among the world's threads.

        Raises:
            PeerFailed: a rank's program ended, or did not come in time.
        """
        return self._meeting.gather(self.rank, value)

    def is_alive(self, peer: int) -> bool:
        """False once the peer's program has ended."""
        return peer not in self._meeting.gone

    def go(self) -> None:
        """Says that this rank's program has ended."""
        self._meeting.go(self.rank)


def connect(group: ThreadGroup | NodeGroup, control: Control, num_bytes: int, *, row_bytes: int = 1) -> HostTransport:
    """Gives every thread the same segments, made by rank 0; of a node, by its first rank. Collective.

    Args:
        num_bytes: of each segment.
        row_bytes: of the rows that are expected, so that they need no other mapping.

    Raises:
        TransportError: there is no room for them; all ranks raise.
    """
    segments, problem = None, None
    if group.rank == 0:
        try:
            segments = Segments.in_memory(group.size, num_bytes)
            segments.side_by_side(row_bytes)
        except OSError as error:
            what_to_do = remedy(error, "pass a smaller max_tokens or capacity=")
            problem = f"cannot make {group.size} segments of {num_bytes:,} bytes ({error}); {what_to_do}"
    raise_on_all(group, problem, TransportError)
    segments = group.all_gather(segments)[0]
    assert segments is not None
    first, whole = (group.first, group.whole) if isinstance(group, NodeGroup) else (0, group)
    assert isinstance(whole, ThreadGroup)
    return HostTransport(
        segments,
        control,
        rank=first + group.rank,
        between_processes=False,
        is_alive=whole.is_alive,
        close=lambda: None,
        first=first,
    )


def connect_on_device(group: ThreadGroup, control: Control, num_bytes: int, device: torch.device) -> DeviceTransport:
    """The same in a GPU's memory: ranks are virtual ones, each on streams of its own. Collective."""

    def map_segments(num_bytes: int) -> Sequence[Tensor]:
        memory, problem = None, None
        if group.rank == 0:
            try:
                memory = torch.zeros(group.size, num_bytes, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError as error:
                problem = f"cannot make {group.size} segments of {num_bytes:,} bytes: {error}"
        raise_on_all(group, problem, TransportError)
        shared = group.all_gather(memory)[0]
        assert shared is not None
        return shared.unbind()

    transport = DeviceTransport(
        map_segments(num_bytes),
        control,
        map_segments=map_segments,
        rank=group.rank,
        ranks_here=group.size,
        is_alive=group.is_alive,
        close=lambda: None,
    )
    transport.shares_sms = True
    return transport


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

    groups = ThreadGroup.world(num_ranks)
    with ThreadPoolExecutor(num_ranks, thread_name_prefix="rank") as pool:
        futures = [pool.submit(run, group) for group in groups]
    errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, TransportError))
    return [future.result() for future in futures]
