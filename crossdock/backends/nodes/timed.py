"""Rows over two hops that are timed, for a trace: how long those to each mate take, when those of rail peers come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from crossdock.backends.base import RowTimes
from crossdock.backends.nodes.outbound import Inbound, Outbound, Pack

_now = time.perf_counter_ns


class TimedMates(Sequence[dict[str, Tensor]]):
    """The regions of each mate. What is done with those of one before the next is asked for is time of rows to it."""

    def __init__(self, at: Sequence[dict[str, Tensor]], mates: Sequence[int], times: RowTimes) -> None:
        self._at, self._mates, self._times = at, mates, times

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, local: Any) -> Any:
        return self._at[local]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for mate, regions in zip(self._mates, self._at, strict=True):
            began = _now()
            yield regions
            self._times.move_ns[mate] += _now() - began


class TimedOutbound(Outbound):
    """Notes when the first and the last chunk were put into each box."""

    def __init__(
        self, times: RowTimes, transport: Any, sequence: int, num_rows: list[int], chunk_format: Any, pack: Pack
    ) -> None:
        peers = transport.rail_peers

        def pack_and_note(node: int, start: int, stop: int, arrays: list[Tensor]) -> None:
            pack(node, start, stop, arrays)
            t = _now()
            times.put.setdefault(peers[node], [t, t])[1] = t

        super().__init__(transport, sequence, num_rows, chunk_format, pack_and_note)


class TimedInbound(Inbound):
    """Notes when the first and the last chunk of each rail peer were seen, and how fast they came in between.

    A chunk that another look has missed just before has come just now. From one such chunk to another is the time of
    the rows behind the first.
    """

    def __init__(self, times: RowTimes, *args: Any) -> None:
        super().__init__(*args)
        self._times = times
        self._missed: set[int] = set()
        """Nodes of which the last look has found nothing."""
        self._num_since = dict.fromkeys(self._came, 0)
        """Rows since the last chunk that came just then."""

    def take(self, use: Callable[[int, int, list[Tensor]], None]) -> bool:
        """See Inbound."""
        looked_for, seen = set(self._came), set[int]()

        def note_and_use(node: int, start: int, arrays: list[Tensor]) -> None:
            t, peer = _now(), self._transport.rail_peers[node]
            landed = self._times.landed.setdefault(peer, [t, t, 0, 0, 0])
            landed[1] = t
            self._num_since[node] += arrays[0].shape[0]
            if node in self._missed and node not in seen:
                if landed[2]:
                    landed[3:] = t, landed[4] + self._num_since[node]
                else:
                    landed[2] = t
                self._num_since[node] = 0
            seen.add(node)
            use(node, start, arrays)

        has_any = super().take(note_and_use)
        self._missed = looked_for - seen
        return has_any
