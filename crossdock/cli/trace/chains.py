"""Whose fault a wait is: among several nodes a rank often waits for one that waits itself.

A rank hears of its mates and its rail peers alone. So what it misses of one of these may be missing because a third
rank is late, which that one waits for at the same time. Such a part of a wait is charged to the end of the chain.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from crossdock.cli.trace.parts import SCALE_UP, Line, Part, Trace

_LONGEST = 4
"""Waits of a chain: any rank is two steps from any other."""


class _Wait(NamedTuple):
    began: int
    ended: int
    for_rank: int
    """In the buffer's group."""
    what: str
    kind: str


def last_of(part: Part) -> Iterator[tuple[Line, int]]:
    """Each wait for peers, with the peer that came last, for which alone it was in the end."""
    for line in part.waits():
        late = {**line["came"], **dict.fromkeys(line["missing"], line["t"][1])}
        if late:
            yield line, max(late, key=lambda peer: late[peer])


class Chains:
    """The waits of all ranks of buffers over nodes, by time."""

    def __init__(self, trace: Trace) -> None:
        self._kinds = {
            part.path: {tuple(line["call"]): line["kind"] for line in part.of("start")} for part in trace.parts
        }
        self._waits: dict[tuple[str, int], list[_Wait]] = defaultdict(list)
        for part in trace.parts:
            if "node_size" in part.header:
                own = self._waits[part.buffer, part.header["rank"]]
                own += (self._wait_of(part, line, peer) for line, peer in last_of(part))
                own.sort()

    def reached(self, part: Part) -> Iterator[tuple[str, int]]:
        """The ranks that a rank speaks with, and over which axis: its mates, and those of its local index."""
        own = part.header["rank"]
        for peer in range(len(part.ranks)):
            hop = None if peer == own else part.hop_to(peer)
            if hop is not None and (hop == SCALE_UP or (own - peer) % part.header["node_size"] == 0):
                yield hop, peer

    def charges(self, part: Part, line: Line, peer: int) -> Iterator[tuple[str, str, int, float]]:
        """What a wait was for, in which kind of call, for whom, and for how many seconds; they add up to the wait."""
        wait = self._wait_of(part, line, peer)
        for each, ns in self._ends(part.buffer, wait, {part.header["rank"]}):
            yield each.what, each.kind, each.for_rank, ns / 1e9

    def _ends(self, buffer: str, wait: _Wait, seen: set[int]) -> Iterator[tuple[_Wait, int]]:
        left = wait.ended - wait.began
        if len(seen) < _LONGEST and wait.for_rank not in seen:
            for other in self._during(buffer, wait):
                if other.for_rank in seen:
                    continue  # that one waits for this rank
                both = other._replace(began=max(wait.began, other.began), ended=min(wait.ended, other.ended))
                left -= both.ended - both.began
                yield from self._ends(buffer, both, {*seen, wait.for_rank})
        if left > 0:
            yield wait, left

    def _during(self, buffer: str, wait: _Wait) -> Iterator[_Wait]:
        """What the one that was waited for has waited for meanwhile."""
        theirs = self._waits.get((buffer, wait.for_rank), [])
        at = max(0, bisect_right(theirs, wait.began, key=lambda other: other.began) - 1)
        for other in theirs[at:]:
            if other.began >= wait.ended:
                return
            if other.ended > wait.began:
                yield other

    def _wait_of(self, part: Part, line: Line, peer: int) -> _Wait:
        began, ended = (part.at(t) for t in line["t"])
        return _Wait(began, ended, peer, line["what"], self._kinds[part.path].get(tuple(line["call"]), ""))
