"""A rail: a rank's connection to the ranks of its local index on other nodes, by messages alone.

Letters: N nodes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.spec import Topology
from crossdock.transport.base import Group


@dataclass(frozen=True, kw_only=True)
class Box:
    """The memory in which one rail peer's rows arrive: chunks, used in turn.

    The default was tried on links of 200 Mbit/s, 2 nodes of 4 ranks, with rows of 14 KiB: dispatch took 1.10 times as
    long as TCP for the same bytes, and 1.28 times with half as many chunks of twice the size.

    Args:
        chunk_bytes: of one chunk, a multiple of 64; the most that travels as one message.
        num_chunks: at least 2; so many may be under way, or wait to be forwarded.

    Raises:
        ConfigError: there are too few, or they are too small.
    """

    chunk_bytes: int = 256 * 1024
    num_chunks: int = 16

    def __post_init__(self) -> None:
        if self.chunk_bytes < 1024 or self.chunk_bytes % 64 or self.num_chunks < 2:
            raise ConfigError(
                f"{self.num_chunks} chunks of {self.chunk_bytes} bytes; pass at least 2, of 1024 bytes or more each, "
                f"in multiples of 64"
            )


class Rail(Protocol):
    """Messages between this rank and its rail peers: notes, and chunks of rows.

    Chunks to a node are numbered from 0 over the life of the rail; number i lies in chunk ``i % num_chunks`` of a box.
    They arrive in order, and so do notes; a note may overtake chunks, or be overtaken. Nothing here waits for a peer.
    """

    nodes: tuple[int, ...]
    """The other nodes, ascending."""
    outbox: Tensor
    """uint8 [N, num_chunks, chunk_bytes]: what this rank sends, by node. A chunk is left alone until the peer says that
    it may be used again."""
    inbox: Tensor
    """uint8 [N, num_chunks, chunk_bytes]: what came, by node; nobody but that node's rank writes there."""

    def tell(self, node: int, note: bytes) -> None:
        """Sends a note of at most ``MAX_NOTE_BYTES``. It does not wait behind chunks that are put later."""

    def heard(self) -> deque[tuple[int, bytes]]:
        """The notes that have come, oldest first, with the node of each; who has dealt with one takes it away."""
        raise NotImplementedError

    def put(self, node: int, num_bytes: int) -> None:
        """Sends the first bytes of the outbox's next chunk into the same place of the peer's inbox.

        The caller has the peer's leave. An interrupt leaves a chunk sent and counted by ``num_put``, or neither.
        """

    def num_put(self, node: int) -> int:
        """How many chunks have been put to that node since the rail was made: the number of the next one."""
        raise NotImplementedError

    def landed(self, node: int) -> int:
        """How many chunks of that node have landed since the rail was made; what they brought is visible then."""
        raise NotImplementedError

    def freed(self, node: int, number: int) -> None:
        """Chunks of that node before this number have been emptied: their places may be written again."""

    def lost(self) -> frozenset[int]:
        """Nodes whose rank is known to be gone for good: nothing more comes from there."""
        raise NotImplementedError

    def leave(self) -> None:
        """Says goodbye, and waits for nobody: what is held is let go of once the peers have answered."""

    def close(self) -> None:
        """Lets go of the peers. Local; what was sent before is still delivered where the peers live."""


MAX_NOTE_BYTES = 16 * 1024


class Engine(Protocol):
    """Makes rails: ``rail=`` of a ``Connection`` is the name of one, or one itself, the same on all ranks."""

    box: Box

    def problem(self, members: Group) -> str | None:
        """What this rank lacks for it, and the command that adds it; None where nothing is missing. Local."""

    def connect(self, members: Group, topology: Topology) -> Rail:
        """This rank's rail. Collective among all ranks, once none of them has a problem."""
        raise NotImplementedError
