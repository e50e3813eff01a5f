"""Rows on CPUs that are timed: how long those to each peer take, for a trace."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.cpu.rows import Block, CpuRows
from crossdock.plan import Hop
from crossdock.transport.host import HostTransport


class TimedRows(CpuRows):
    """Adds up, in ``move_ns``, the nanoseconds in which rows were written to each peer."""

    def __init__(self, arena: Arena, transport: HostTransport, move_ns: list[int]) -> None:
        super().__init__(arena, transport)
        self.move_ns = move_ns

    def _gather(self, source: Tensor, idx: Tensor, region: str, blocks: Iterable[Block], slots: Sequence[int]) -> None:
        for peer, of_peer in groupby(blocks, key=_peer_of):
            began = time.perf_counter_ns()
            super()._gather(source, idx, region, of_peer, slots)
            self.move_ns[peer] += time.perf_counter_ns() - began

    def _incoming_blocks(self, hop: Hop) -> Iterator[Block]:
        for block in super()._incoming_blocks(hop):
            began = time.perf_counter_ns()
            yield block  # what is done with it is timed
            self.move_ns[block[0]] += time.perf_counter_ns() - began


def _peer_of(block: Block) -> int:
    return block[0]
