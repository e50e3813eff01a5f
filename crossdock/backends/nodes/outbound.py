"""What a call puts into the boxes of rail peers, chunk by chunk, as long as it has their leave."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from crossdock.backends.nodes.chunks import ChunkFormat
from crossdock.transport.nodes import NodesTransport

Pack = Callable[[int, int, int, list[Tensor]], None]
"""``pack(node, start, stop, arrays)``: writes those rows to a node into the arrays of a chunk."""


class Outbound:
    """Rows on their way to other nodes.

    Args:
        num_rows: by node; this rank's own is passed over.
        chunk_format: the arrays of a chunk.
        pack: fills them.
    """

    def __init__(
        self,
        transport: NodesTransport,
        sequence: int,
        num_rows: list[int],
        chunk_format: ChunkFormat,
        pack: Pack,
    ) -> None:
        self._transport = transport
        self._sequence = sequence
        self._num_rows = num_rows
        self._format = chunk_format
        self._pack = pack
        self._most = chunk_format.most_rows(transport.box) if any(chunk_format.widths) else 1
        self._done = {node: 0 for node in transport.lanes if num_rows[node]}

    def push(self) -> None:
        """Puts what may be put now, one chunk to each node in turn."""
        has_moved = True
        while self._done and has_moved:
            has_moved = False
            for node in self._nodes_from_next():
                lane = self._transport.lanes[node]
                if not lane.has_room:
                    continue
                start = self._done[node]
                stop = min(start + self._most, self._num_rows[node])
                self._pack(node, start, stop, self._format.arrays(lane.room(), stop - start))
                lane.put(self._sequence, stop - start, self._format.num_bytes(stop - start))
                self._done[node] = stop
                if stop == self._num_rows[node]:
                    del self._done[node]
                has_moved = True

    @property
    def waiting(self) -> list[int]:
        """Rail peers whose leave is waited for."""
        return [self._transport.rail_peers[node] for node in self._done]

    def _nodes_from_next(self) -> list[int]:
        """Every node begins with another one, so that they do not all send to one."""
        first = self._transport.node
        return sorted(self._done, key=lambda node: (node - first) % len(self._num_rows))


class Inbound:
    """Rows that come from other nodes, chunk by chunk.

    Args:
        num_rows: by node; this rank's own is passed over.
        chunk_format: the arrays of a chunk.
    """

    def __init__(
        self, transport: NodesTransport, sequence: int, num_rows: list[int], chunk_format: ChunkFormat
    ) -> None:
        self._transport = transport
        self._sequence = sequence
        self._num_rows = num_rows
        self._format = chunk_format
        self._came = {node: 0 for node in transport.lanes if num_rows[node]}

    def take(self, use: Callable[[int, int, list[Tensor]], None]) -> bool:
        """Calls ``use(node, start, arrays)`` for each chunk that has landed, and gives its room back.

        Gives whether any had.
        """
        has_any = has_freed = False
        for node in list(self._came):
            lane = self._transport.lanes[node]
            num_taken = lane.num_taken
            while node in self._came and (chunk := lane.next_of(self._sequence)) is not None:
                use(node, self._came[node], self._format.arrays(chunk.memory, chunk.num_rows))
                lane.done()
                has_any = True
                self._came[node] += chunk.num_rows
                if self._came[node] == self._num_rows[node]:
                    del self._came[node]
            has_freed |= lane.num_taken != num_taken  # also by skipping what a call that failed has left
        if has_freed:
            self._transport.give_leave()
        return has_any

    @property
    def waiting(self) -> list[int]:
        """Rail peers whose rows are still to come."""
        return [self._transport.rail_peers[node] for node in self._came]
