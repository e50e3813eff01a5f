"""A rail among threads of one process, whose messages may be late: for trying grids out, and for tests."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.spec import Topology
from crossdock.transport.base import Group
from crossdock.transport.inproc import ThreadGroup
from crossdock.transport.rail import Box, Rail


class _Message(NamedTuple):
    ready: float
    """When it arrives, by the clock of ``time.monotonic``."""
    note: bytes
    number: int
    """Of a chunk."""
    num_bytes: int
    source: Tensor
    """The outbox of a chunk, which is read when the chunk arrives, as a NIC may."""


class Sea:
    """What ranks have sent to each other and not yet seen, by sender and receiver.

    All there from the start: sender and receiver come together, and of what is made when first asked for each could
    make its own.
    """

    def __init__(self, num_ranks: int) -> None:
        pairs = [*itertools.permutations(range(num_ranks), 2)]
        self.notes: dict[tuple[int, int], deque[_Message]] = {pair: deque() for pair in pairs}
        self.chunks: dict[tuple[int, int], deque[_Message]] = {pair: deque() for pair in pairs}
        """The last one stays when it has arrived, and says how many there were."""


class InprocEngine:
    """See Engine.

    Args:
        lateness: seconds that a message is under way, asked for each; None: none.
        box: memory for the rows of one rail peer; None: the default.
    """

    def __init__(self, lateness: Callable[[], float] | None = None, *, box: Box | None = None) -> None:
        self.box = box or Box()
        self.lateness = lateness
        self.down: set[int] = set()
        """Nodes from which nothing arrives just now: what is under way from there comes once they are not down."""

    def problem(self, members: Group) -> str | None:
        """See Engine."""
        if isinstance(members, ThreadGroup):
            return None
        return "rail='inproc' joins threads of one process, and the group is of processes; pass rail='dist'"

    def connect(self, members: Group, topology: Topology) -> Rail:
        """See Engine."""
        assert isinstance(members, ThreadGroup)
        sea = members.all_gather(Sea(members.size) if members.rank == 0 else None)[0]
        assert sea is not None
        return InprocRail(self, members, topology, sea)


class InprocRail:
    """See Rail."""

    def __init__(self, engine: InprocEngine, members: ThreadGroup, topology: Topology, sea: Sea) -> None:
        box = engine.box
        self._engine, self._members, self._sea = engine, members, sea
        self._node, self._local = divmod(members.rank, topology.node_size)
        self._node_size = topology.node_size
        self._num_chunks = box.num_chunks
        self.nodes = tuple(node for node in range(topology.num_nodes) if node != self._node)
        shape = (topology.num_nodes, box.num_chunks, box.chunk_bytes)
        self.outbox = torch.zeros(shape, dtype=torch.uint8, device="cpu")
        self.inbox = torch.zeros(shape, dtype=torch.uint8, device="cpu")
        self._heard: deque[tuple[int, bytes]] = deque()
        self._landed = dict.fromkeys(self.nodes, 0)
        self._freed = dict.fromkeys(self.nodes, 0)

    def tell(self, node: int, note: bytes) -> None:
        """See Rail."""
        self._sea.notes[self._to(node)].append(self._message(note=note))

    def put(self, node: int, num_bytes: int) -> None:
        """See Rail."""
        self._sea.chunks[self._to(node)].append(self._message(number=self.num_put(node), num_bytes=num_bytes))

    def num_put(self, node: int) -> int:
        """See Rail."""
        chunks = self._sea.chunks[self._to(node)]
        return chunks[-1].number + 1 if chunks else 0

    def heard(self) -> deque[tuple[int, bytes]]:
        """See Rail."""
        for node in self.nodes:
            notes = self._sea.notes[self._from(node)]
            while notes and self._has_arrived(notes[0], node):
                self._heard.append((node, notes[0].note))
                notes.popleft()
        return self._heard

    def landed(self, node: int) -> int:
        """See Rail."""
        chunks = self._sea.chunks[self._from(node)]
        while chunks and self._has_arrived(chunks[0], node):
            message = chunks[0]
            if message.number == self._landed[node]:
                assert message.number < self._freed[node] + self._num_chunks, "a chunk beyond what was granted"
                place = message.number % self._num_chunks
                self.inbox[node, place, : message.num_bytes] = message.source[self._node, place, : message.num_bytes]
                self._landed[node] += 1
            assert message.number < self._landed[node], "chunks out of order"
            if len(chunks) == 1:
                break
            chunks.popleft()
        return self._landed[node]

    def freed(self, node: int, number: int) -> None:
        """See Rail."""
        self._freed[node] = number

    def lost(self) -> frozenset[int]:
        """See Rail."""
        return frozenset(node for node in self.nodes if self._is_lost(node))

    def _is_lost(self, node: int) -> bool:
        """Whether a rank's program has ended, and all that it sent has come."""
        sender = self._rank_of(node)
        notes, chunks = self._sea.notes[self._from(node)], self._sea.chunks[self._from(node)]
        has_all = not notes and (not chunks or chunks[-1].number < self._landed[node])
        return has_all and not self._members.is_alive(sender)

    def leave(self) -> None:
        """See Rail."""

    def close(self) -> None:
        """See Rail."""

    def _rank_of(self, node: int) -> int:
        return node * self._node_size + self._local

    def _to(self, node: int) -> tuple[int, int]:
        return self._members.rank, self._rank_of(node)

    def _from(self, node: int) -> tuple[int, int]:
        return self._rank_of(node), self._members.rank

    def _message(self, *, note: bytes = b"", number: int = 0, num_bytes: int = 0) -> _Message:
        late = 0.0 if self._engine.lateness is None else self._engine.lateness()
        return _Message(time.monotonic() + late, note, number, num_bytes, self.outbox)

    def _has_arrived(self, message: _Message, node: int) -> bool:
        return message.ready <= time.monotonic() and node not in self._engine.down
