"""One lane of a rail: what may be put into a peer's box, and what has come in the own one.

Leave is given in chunks, counted from 0 over the life of the rail, and never taken back: "you may put chunks up to
number n". It stands before a call begins, so that its first rows wait for nobody. A chunk names its call; what a call
that failed has left in a box is skipped by the next one, and its room is given again. So nothing has to be counted
anew after a failure, and a chunk that comes late cannot be mistaken for one of a later call.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from crossdock.consent import SEQUENCE_MASK
from crossdock.transport.rail import Box, Rail

HEADER_BYTES = 64


class Chunk(NamedTuple):
    """Rows that have landed."""

    num_rows: int
    memory: Tensor
    """uint8: the chunk behind its header."""


class Lane:
    """This rank's side of both boxes that it shares with the rail peer of one node."""

    def __init__(self, rail: Rail, box: Box, node: int) -> None:
        self.node = node
        self._rail = rail
        self._num_chunks = box.num_chunks
        self._out, self._in = rail.outbox[node], rail.inbox[node]
        self.num_taken = 0
        self.may_put = box.num_chunks
        """The number of the first chunk for which there is no leave yet."""
        self.granted = box.num_chunks
        """What the peer has been told."""

    @property
    def num_put(self) -> int:
        """Chunks that have been put so far."""
        return self._rail.num_put(self.node)

    @property
    def has_room(self) -> bool:
        """Whether a chunk may be put."""
        return self.num_put < self.may_put

    @property
    def num_landed(self) -> int:
        """Chunks that have come from the peer so far."""
        return self._rail.landed(self.node)

    def room(self) -> Tensor:
        """Where the next chunk is to be packed: uint8, behind its header."""
        assert self.has_room, "no leave to put"
        return self._out[self.num_put % self._num_chunks, HEADER_BYTES:]

    def put(self, sequence: int, num_rows: int, num_bytes: int) -> None:
        """Sends what was packed: so many rows of a call, in so many bytes."""
        chunk = self._out[self.num_put % self._num_chunks]
        _header(chunk)[:2] = sequence, num_rows
        self._rail.put(self.node, HEADER_BYTES + num_bytes)

    def next_of(self, sequence: int) -> Chunk | None:
        """The oldest chunk that has landed, if it is of this call; those of calls before it are skipped."""
        while self.num_taken < self._rail.landed(self.node):
            chunk = self._in[self.num_taken % self._num_chunks]
            theirs, num_rows = _header(chunk)[:2].tolist()
            if theirs == sequence:
                return Chunk(num_rows, chunk[HEADER_BYTES:])
            if is_later(theirs, sequence):
                return None
            self.done()
        return None

    def done(self) -> None:
        """The oldest chunk has been emptied."""
        self.num_taken += 1
        self._rail.freed(self.node, self.num_taken)

    @property
    def grant(self) -> int:
        """What the peer may put by now; to be told with a note."""
        return self.num_taken + self._num_chunks

    @property
    def is_due(self) -> bool:
        """Whether so much has been emptied since the last note that the peer might be waiting for it."""
        return 2 * (self.grant - self.granted) >= self._num_chunks


def _header(chunk: Tensor) -> npt.NDArray[np.int64]:
    """Of a chunk: its call, and how many rows it has."""
    words: npt.NDArray[np.int64] = chunk[:HEADER_BYTES].numpy().view(np.int64)
    return words


def is_later(sequence: int, other: int) -> bool:
    """Whether a call comes after another; epochs wrap around."""
    return 0 < (sequence - other) & SEQUENCE_MASK <= SEQUENCE_MASK // 2
