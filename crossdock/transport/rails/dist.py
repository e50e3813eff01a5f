"""A rail over torch.distributed: gloo sends and receives, with threads that wait for what comes.

Gloo is two-sided, its requests cannot be polled, and one that times out closes the connection. So a thread for each
peer and kind of message posts receives ahead, as many as there is room for, and waits for them without a deadline; who
waits in a call has deadlines of its own. Posted receives are where chunks arrive, in the inbox itself.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as _c10d

from crossdock.spec import Topology
from crossdock.transport.base import Group, ProcessGroup
from crossdock.transport.leaving import at_exit
from crossdock.transport.rail import MAX_NOTE_BYTES, Box, Rail

_FOREVER = timedelta(days=10_000)
_NOTES, _CHUNKS = 1, 2
"""Tags of the two kinds of messages: they do not wait for each other."""
_NOTES_AHEAD = 4
_LENGTH = np.dtype(np.int64)
_BYE = -1
_LAST_CHUNK = torch.full((16,), 255, dtype=torch.uint8, device="cpu")
"""No chunk begins so: its call would have a negative number."""
_MOST_HELD = 64
"""Messages to a peer that are held although they may have gone: nobody has asked yet."""
_Sent = tuple[int, Any, Tensor]
"""A message's number, gloo's work, and its memory."""
_GOODBYE_S = 10.0
"""How long a rank that leaves waits for its peers to let go of it too, which their threads do at once, but where their
host is busy. A thread that came out of gloo while Python ends would abort the process."""


class DistEngine:
    """See Engine.

    Args:
        box: memory for the rows of one rail peer; None: the default.
    """

    def __init__(self, *, box: Box | None = None) -> None:
        self.box = box or Box()

    def problem(self, members: Group) -> str | None:
        """See Engine."""
        if not isinstance(members, ProcessGroup):
            return f"rail='dist' sends through torch.distributed, and the group is a {type(members).__name__}"
        if not dist.is_gloo_available():
            return "rail='dist' on CPUs needs gloo, which this torch was built without; pip install torch"
        return None

    def connect(self, members: Group, topology: Topology) -> Rail:
        """See Engine."""
        assert isinstance(members, ProcessGroup)
        node, local = divmod(members.rank, topology.node_size)
        # Not dist.new_group: it names groups by their ranks, and so finds what an earlier one has left in the store.
        name = members.all_gather(f"crossdock-rail-{secrets.token_hex(8)}")[0]
        store = _c10d.PrefixStore(f"{name}-{local}", dist.distributed_c10d._get_default_store())
        group = _c10d.ProcessGroupGloo(store, node, topology.num_nodes, _FOREVER)
        rail = DistRail(group, node, topology.num_nodes, self.box)
        members.all_gather(None)
        return rail


class DistRail:
    """See Rail."""

    def __init__(self, group: Any, node: int, num_nodes: int, box: Box) -> None:
        self._group = group
        self.nodes = tuple(other for other in range(num_nodes) if other != node)
        shape = (num_nodes, box.num_chunks, box.chunk_bytes)
        self.outbox = torch.zeros(shape, dtype=torch.uint8, device="cpu")
        self.inbox = torch.zeros(shape, dtype=torch.uint8, device="cpu")
        self._heard: deque[tuple[int, bytes]] = deque()
        self._notes: dict[int, deque[_Sent]] = {other: deque() for other in self.nodes}
        self._put: dict[int, deque[_Sent]] = {other: deque() for other in self.nodes}
        """What was sent, with its number, until it has gone; the last one stays, and says how many there were."""
        self._chunks = {other: _Chunks(box.num_chunks) for other in self.nodes}
        self._gone: set[int] = set()
        self._said_bye: set[int] = set()
        self._lock = threading.RLock()  # what drops a rail may run in the middle of a line
        self._is_closed = False
        self._is_not_left_open = at_exit(self.close)
        self._threads = [
            threading.Thread(target=listen, args=(other,), name=f"crossdock-rail-{other}", daemon=True)
            for other in self.nodes
            for listen in (self._hear_notes, self._take_chunks)
        ]
        for thread in self._threads:
            thread.start()

    def tell(self, node: int, note: bytes) -> None:
        """See Rail."""
        self._send(node, _framed(len(note), note), _NOTES)

    def put(self, node: int, num_bytes: int) -> None:
        """See Rail."""
        box = self.outbox[node]
        self._send(node, box[self.num_put(node) % box.shape[0], :num_bytes], _CHUNKS)

    def num_put(self, node: int) -> int:
        """See Rail."""
        return _count(self._put[node])

    def heard(self) -> deque[tuple[int, bytes]]:
        """See Rail."""
        return self._heard

    def landed(self, node: int) -> int:
        """See Rail."""
        return self._chunks[node].num_landed

    def freed(self, node: int, number: int) -> None:
        """See Rail."""
        self._chunks[node].free(number)

    def lost(self) -> frozenset[int]:
        """See Rail. What a lost peer has sent has all been heard: its connection is read to its end first."""
        return frozenset(self._gone)

    def leave(self) -> None:
        """See Rail. Peers let go of each other: each answers a goodbye, so that no receive is left behind."""
        for node in self.nodes:
            self._say_bye(node)
        for chunks in self._chunks.values():
            chunks.end()

    def close(self) -> None:
        """See Rail."""
        if self._is_closed:
            return
        self._is_closed = True
        self._is_not_left_open()
        self.leave()
        until = time.monotonic() + _GOODBYE_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._group = None
        self._notes.clear()
        self._put.clear()  # or its thread in gloo would look forever at a connection that its peer has closed

    def _say_bye(self, node: int) -> None:
        """Once to each peer, the last that it is sent: by the one that leaves first, and as an answer."""
        with self._lock:
            if node in self._said_bye:
                return
            self._said_bye.add(node)
            self._post(node, _framed(_BYE, b""), _NOTES)
            self._post(node, _LAST_CHUNK, _CHUNKS)

    def _send(self, node: int, message: Tensor, tag: int) -> None:
        """Sends it, unless the two have said goodbye: the peer's threads say that while this rank is in a call."""
        with self._lock:
            if node not in self._said_bye:
                self._post(node, message, tag)

    def _post(self, node: int, message: Tensor, tag: int) -> None:
        """Sends it, as far as the peer still lives; holds it until it has gone."""
        group = self._group
        if group is None or node in self._gone:
            return
        sent = (self._notes if tag == _NOTES else self._put)[node]
        try:
            # One step of the interpreter's: what an interrupt finds sent is also held, and counted.
            sent.extend(zip((_count(sent),), map(group.send, ([message],), (node,), (tag,)), (message,), strict=True))
        except RuntimeError:
            self._gone.add(node)
            return
        while len(sent) > _MOST_HELD and sent[0][1].is_completed():
            sent.popleft()

    def _receive(self, node: int, room: Tensor, tag: int) -> Callable[[], None]:
        """Posts a receive; gives what waits for it."""
        assert self._group is not None
        wait: Callable[[], None] = self._group.recv([room], node, tag).wait
        return wait

    def _hear_notes(self, node: int) -> None:
        """The body of a thread: notes of one peer, in order, until it says goodbye or is gone."""
        try:
            ahead: deque[tuple[Callable[[], None], Tensor]] = deque()
            while True:
                while len(ahead) < _NOTES_AHEAD:
                    room = torch.empty(_LENGTH.itemsize + MAX_NOTE_BYTES, dtype=torch.uint8, device="cpu")
                    ahead.append((self._receive(node, room, _NOTES), room))
                wait, room = ahead.popleft()
                wait()
                raw = room.numpy()
                length = int(raw[: _LENGTH.itemsize].view(_LENGTH)[0])
                if length == _BYE:
                    self._say_bye(node)
                    return
                self._heard.append((node, raw[_LENGTH.itemsize :][:length].tobytes()))
        except RuntimeError:
            self._gone.add(node)

    def _take_chunks(self, node: int) -> None:
        """The body of a thread: chunks of one peer, in order, until all is done with for which a receive is posted.

        What comes for a receive that is no more stays in the connection, before all that follows it, and gloo's thread
        looks at it without a pause.
        """
        chunks, ahead = self._chunks[node], deque[Callable[[], None]]()
        try:
            while chunks.may_come(len(ahead)):
                for number in chunks.to_post(len(ahead)):
                    ahead.append(self._receive(node, self.inbox[node, number % chunks.num_chunks], _CHUNKS))
                if not ahead:  # it has ended in between
                    continue
                ahead.popleft()()
                if torch.equal(
                    self.inbox[node, chunks.num_landed % chunks.num_chunks][: _LAST_CHUNK.numel()], _LAST_CHUNK
                ):
                    return
                chunks.land()
        except RuntimeError:
            self._gone.add(node)


class _Chunks:
    """Which chunks of a peer have landed, and for which there is room."""

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.num_landed = 0
        self._num_freed = 0
        self._is_ended = False
        self._changed = threading.Condition()  # of an RLock, see DistRail

    def free(self, number: int) -> None:
        """Those before this number have been emptied."""
        with self._changed:
            self._num_freed = number
            self._changed.notify()

    def end(self) -> None:
        """None is wanted any more."""
        with self._changed:
            self._is_ended = True
            self._changed.notify()

    def land(self) -> None:
        """One more has come."""
        self.num_landed += 1

    def to_post(self, num_ahead: int) -> range:
        """Numbers of the chunks for which receives can be posted now; none once it has ended."""
        first = self.num_landed + num_ahead
        return range(first, first if self._is_ended else self._num_freed + self.num_chunks)

    def may_come(self, num_ahead: int) -> bool:
        """Waits until a chunk can come, or is on its way; False when none can any more."""
        with self._changed:
            self._changed.wait_for(lambda: num_ahead or self._is_ended or len(self.to_post(num_ahead)))
            return num_ahead > 0 or not self._is_ended


def _count(sent: deque[_Sent]) -> int:
    """How many messages have been sent."""
    return sent[-1][0] + 1 if sent else 0


def _framed(length: int, note: bytes) -> Tensor:
    """A note behind its length, in memory of its own."""
    return torch.frombuffer(bytearray(np.array(length, _LENGTH).tobytes() + note), dtype=torch.uint8)
