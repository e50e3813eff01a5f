"""Ranks of several nodes: mates by memory that is mapped, rail peers by notes; the same boxes of words for both.

A word that a rank posts to a rail peer travels as a note, and is written into the peer's own box when the peer looks
for it. So consent asks the same questions of both.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Sequence

from torch import Tensor

from crossdock.arena import REASON_BYTES, Control
from crossdock.transport.base import Group, NodeGroup
from crossdock.transport.host import HostTransport
from crossdock.transport.lanes import Lane
from crossdock.transport.rail import Box, Rail

_NOTE = struct.Struct("<hiqq")
"""Box, index, value, and what the peer may put by now."""
_NO_BOX = -1
_POLLS_FOR_ONE = 40
"""A poll that also looks for notes takes so many times as long as one of memory."""


class NodesTransport:
    """A rank's Transport to its mates and its rail peers; it reaches no other rank.

    Args:
        host: to the mates.
        rail: to the rail peers.
    """

    def __init__(self, host: HostTransport, rail: Rail, control: Control, box: Box) -> None:
        topology = control.topology
        self.host = host
        self.box = box
        self.rank, self.num_ranks, self.node_size = host.rank, topology.num_ranks, topology.node_size
        self.node, self.local = divmod(self.rank, self.node_size)
        self.mates = range(host.first, host.first + self.node_size)
        """The ranks of this node, this one included."""
        self.rail_peers = {node: node * self.node_size + self.local for node in rail.nodes}
        self.lanes = {node: Lane(rail, box, node) for node in rail.nodes}
        self.linger_s = 0.0
        self.num_notes = 0
        """Notes sent so far."""
        self._rail = rail
        self._process = os.getpid()
        weakref.finalize(self, _leave, rail, self._process).atexit = False  # its threads keep the rail
        self._node_of = {rank: node for node, rank in self.rail_peers.items()}
        self._names = [name for name in control.regions if name != "counts"]
        self._reasons: dict[int, bytes] = {}
        self._attached: dict[int, bytes] = {}
        self._brought: dict[tuple[int, int], bytes] = {}
        self.close = self._close

    @property
    def segment(self) -> Tensor:
        """See Transport."""
        return self.host.segment

    @property
    def peers(self) -> list[int]:
        """Mates and rail peers, ascending; this rank is one of its mates."""
        return sorted((*self.mates, *self.rail_peers.values()))

    def attach(self, peer: int, payload: bytes) -> None:
        """Sends this along with the next word to a rail peer."""
        self._attached[peer] = payload

    def brought(self, index: int, peer: int) -> bytes:
        """What came along with a rail peer's last word for that entry of the ring."""
        return self._brought.get((index, peer), b"")

    def post(self, peer: int, box: str, index: int, value: int) -> None:
        """See Mailbox."""
        node = self._node_of.get(peer)
        if node is None:
            self.host.post(peer, box, index, value)
            return
        payload = self._reasons.pop(peer, b"") if box == "aborts" else b""
        if box == "words":
            payload = self._attached.pop(peer, b"")
        elif box == "closed":
            value += self.lanes[node].num_put
        self._tell(node, _NOTE.pack(self._names.index(box), index, value, self.lanes[node].grant) + payload)

    def load(self, box: str, index: int, sender: int) -> int:
        """See Mailbox."""
        node = self._node_of.get(sender)
        if node is None:
            return self.host.load(box, index, sender)
        self.hear()
        value = self.host.load(box, index, sender)
        if box == "closed" and value > 1 + self.lanes[node].num_landed:
            return 0  # its note has overtaken rows
        return value

    def hear(self) -> None:
        """Writes the notes that have come into this rank's boxes, and takes the leave that they give."""
        heard = self._rail.heard()
        while heard:
            self._take_in(*heard[0])
            heard.popleft()  # behind it: a note that an interrupt keeps from being dealt with is not lost

    def _take_in(self, node: int, note: bytes) -> None:
        box, index, value, grant = _NOTE.unpack_from(note)
        lane, sender = self.lanes[node], self.rail_peers[node]
        lane.may_put = max(lane.may_put, grant)
        if box == _NO_BOX:
            return
        name, payload = self._names[box], note[_NOTE.size :]
        if name == "words":
            self._brought[index, sender] = payload
        elif name == "aborts":
            self.host.leave_reason(sender, payload)
        self.host.leave(name, index, sender, value)

    def give_leave(self) -> None:
        """Tells rail peers what they may put by now, if they might be waiting for it."""
        for node, lane in self.lanes.items():
            if lane.is_due:
                self._tell(node, _NOTE.pack(_NO_BOX, 0, 0, lane.grant))

    def _tell(self, node: int, note: bytes) -> None:
        self._rail.tell(node, note)
        self.lanes[node].granted = self.lanes[node].grant
        self.num_notes += 1

    def write_reason(self, peer: int, text: bytes) -> None:
        """See Mailbox."""
        if peer in self._node_of:
            self._reasons[peer] = text[:REASON_BYTES]
        else:
            self.host.write_reason(peer, text)

    def read_reason(self, sender: int) -> bytes:
        """See Mailbox."""
        return self.host.read_reason(sender)

    def forget(self, box: str) -> None:
        """See Mailbox."""
        self.host.forget(box)

    def idle(self, num_polls: int) -> None:
        """See Transport. Sleeps sooner than where memory alone is waited for: a network's threads want the cores."""
        self.hear()
        self.host.idle(num_polls * _POLLS_FOR_ONE)

    def is_alive(self, peer: int) -> bool:
        """See Transport. Of ranks that this one does not reach others judge: it says that they are gone."""
        if peer in self.mates:
            return self.host.is_alive(peer)
        node = self._node_of.get(peer)
        return node is not None and node not in self._rail.lost()

    def mask(self, ranks: Sequence[int]) -> None:
        """See Transport."""
        self.host.mask(ranks)
        for rank in ranks:
            if (node := self._node_of.pop(rank, None)) is not None:
                del self.lanes[node], self.rail_peers[node]

    def grow(self, group: Group, num_bytes: int) -> bool:
        """See Transport."""
        return self.host.grow(NodeGroup(group, self.node_size), num_bytes)

    def release(self, group: Group, first: int) -> bool:
        """See Transport."""
        return self.host.release(NodeGroup(group, self.node_size), first)

    def reacquire(self, group: Group) -> bool:
        """See Transport."""
        return self.host.reacquire(NodeGroup(group, self.node_size))

    def _close(self) -> None:
        if os.getpid() == self._process:  # a child that was forked has its parent's sockets, and would say goodbye
            self._rail.close()
        self.host.close()


def _leave(rail: Rail, process: int) -> None:
    """Of a transport that nobody has any more; not in a child, which has its parent's sockets."""
    if os.getpid() == process:
        rail.leave()
