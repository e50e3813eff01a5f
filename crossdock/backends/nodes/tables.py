"""What a node was told: each rank's counts for it, in a table at every rank of the node.

A rank writes the rows of its rail peers and its own into all its mates' tables. Letters: P ranks, W counts of a node.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.consent import PAYLOAD_BITS, PAYLOAD_MASK, stamped
from crossdock.transport.nodes import NodesTransport


class Tables:
    """The tables of a node's ranks."""

    def __init__(self, arena: Arena, transport: NodesTransport) -> None:
        control, host = arena.control_words, transport.host
        memory = host.segments.side_by_side()
        segments = [memory.segment(i, control.num_bytes) for i in range(transport.node_size)]
        self._at = [control.view(segment, "counts").numpy() for segment in segments]
        self._transport = transport
        self._rail = np.arange(transport.local, transport.num_ranks, transport.node_size)
        self.width = arena.spec.num_node_counts(arena.topology)
        """W."""

    def write(self, sequence: int, entry: int, own: npt.NDArray[np.int32], told: Mapping[int, bytes]) -> None:
        """Writes the counts of this rank, and what its rail peers have told it, stamped, into all mates' tables."""
        rows = {self._transport.rank: own, **{peer: np.frombuffer(note, np.int32) for peer, note in told.items()}}
        for peer, counts in rows.items():
            assert counts.size == self.width, f"rank {peer} told {counts.size} counts, not {self.width}"
            for table in self._at:
                table[entry, peer, : self.width] = counts.astype(np.int64) | stamped(sequence, 0)

    def read(self, sequence: int, entry: int) -> Tensor:
        """What all ranks have told this node, int64 [P, W], once all mates have written; 0 of masked ranks."""
        words = self._at[self._transport.local][entry, :, : self.width]
        is_here = words >> PAYLOAD_BITS == stamped(sequence, 0) >> PAYLOAD_BITS
        reached = [*self._transport.mates, *self._transport.rail_peers.values()]
        assert is_here[reached].all(), "counts of another call"
        return torch.from_numpy(np.where(is_here, words & PAYLOAD_MASK, 0))

    def num_rail_rows(self, counts: Tensor) -> list[int]:
        """By node, the rows of its rank of this local index that cross the rail to this one."""
        numbers: list[int] = counts[self._rail, -1].tolist()
        return numbers
