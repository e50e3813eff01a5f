"""A rail over NIXL: chunks are written into the peer's inbox, notes are notifications; UCX or libfabric below.

NIXL is one-sided. A chunk is one write, and the notification that names it comes when it has landed. On one machine UCX
finds ways around the network: ``UCX_TLS=tcp,self`` keeps it to the link, and ``UCX_NET_DEVICES`` names that.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from crossdock.spec import Topology
from crossdock.transport.base import Group
from crossdock.transport.rail import Box, Rail

_MODULES = ("nixl_cu13", "nixl")
"""The wheels nixl-cu13 and nixl have the same under one name each."""
_CHUNK = struct.Struct("<cq")
_NOTE_KIND, _CHUNK_KIND, _BYE_KIND = b"n", b"c", b"b"
_LOOK_AGAIN_S = 0.5
_NAP_S = 2e-4
_GOODBYE_S = 2.0
"""How long a rank that leaves waits for its peers to leave too: NIXL may crash where a peer went first."""


class NixlEngine:
    """See Engine.

    Args:
        box: memory for the rows of one rail peer; None: the default.
        backend: of NIXL, such as "UCX" or "LIBFABRIC".
    """

    def __init__(self, *, box: Box | None = None, backend: str = "UCX") -> None:
        self.box = box or Box()
        self.backend = backend

    def problem(self, members: Group) -> str | None:
        """See Engine."""
        if _module() is None:
            return "rail='nixl' needs NIXL, which is not installed; pip install 'crossdock[nixl]'"
        return None

    def connect(self, members: Group, topology: Topology) -> Rail:
        """See Engine."""
        name = _module()
        assert name is not None, "vetted before"
        api = importlib.import_module(f"{name}._api")
        agent = api.nixl_agent(f"crossdock-{secrets.token_hex(8)}", api.nixl_agent_config(backends=[self.backend]))
        node, local = divmod(members.rank, topology.node_size)
        rail = NixlRail(agent, node, topology.num_nodes, self.box)
        told = members.all_gather(rail.address)
        rail.join({other: told[other * topology.node_size + local] for other in rail.nodes})
        members.all_gather(None)
        return rail


class NixlRail:
    """See Rail."""

    def __init__(self, agent: Any, node: int, num_nodes: int, box: Box) -> None:
        self._agent = agent
        self._node = node
        self.nodes = tuple(other for other in range(num_nodes) if other != node)
        shape = (num_nodes, box.num_chunks, box.chunk_bytes)
        self.outbox = torch.zeros(shape, dtype=torch.uint8, device="cpu")
        self.inbox = torch.zeros(shape, dtype=torch.uint8, device="cpu")
        self._registered = [agent.register_memory(memory.view(-1)) for memory in (self.outbox, self.inbox)]
        self._names: dict[int, str] = {}
        self._node_of: dict[str, int] = {}
        self._inbox_there: dict[int, int] = {}
        self._under_way: dict[int, deque[Any]] = {other: deque() for other in self.nodes}
        self._heard: deque[tuple[int, bytes]] = deque()
        self._landed = dict.fromkeys(self.nodes, 0)
        self._early: dict[int, set[int]] = {other: set() for other in self.nodes}
        self._gone: set[int] = set()
        self._left: set[int] = set()
        self._is_closed = False
        self._agents_turn = threading.RLock()
        self._has_writes = threading.Event()
        # A write is completed, and its notification sent, only while somebody asks for its state: also between calls.
        self._asks = threading.Thread(target=self._ask, name="crossdock-rail-writes", daemon=True)
        self._asks.start()

    @property
    def address(self) -> tuple[bytes, int]:
        """What peers need to reach this rank: NIXL's metadata, and where the inbox lies."""
        return self._agent.get_agent_metadata(), self.inbox.data_ptr()

    def join(self, addresses: dict[int, tuple[bytes, int]]) -> None:
        """Connects to the rail peers."""
        for node, (metadata, inbox) in addresses.items():
            name = self._agent.add_remote_agent(metadata)
            self._names[node] = name.decode() if isinstance(name, bytes) else name
            self._node_of[self._names[node]] = node
            self._inbox_there[node] = inbox
            self._agent.make_connection(self._names[node])

    def tell(self, node: int, note: bytes) -> None:
        """See Rail."""
        self._try(node, lambda: self._agent.send_notif(self._names[node], _NOTE_KIND + note))

    def put(self, node: int, number: int, num_bytes: int) -> None:
        """See Rail."""
        _, num_chunks, chunk_bytes = self.outbox.shape
        place = number % num_chunks
        here = self.outbox[node, place].data_ptr()
        there = self._inbox_there[node] + (self._node * num_chunks + place) * chunk_bytes

        def write() -> None:
            source = self._agent.get_xfer_descs([(here, num_bytes, 0)], "DRAM")
            target = self._agent.get_xfer_descs([(there, num_bytes, 0)], "DRAM")
            says = _CHUNK.pack(_CHUNK_KIND, number)
            handle = self._agent.initialize_xfer("WRITE", source, target, self._names[node], says)
            self._agent.transfer(handle)
            self._under_way[node].append(handle)
            self._has_writes.set()

        self._try(node, write)

    def heard(self) -> list[tuple[int, bytes]]:
        """See Rail."""
        self._look()
        notes = []
        while self._heard:
            notes.append(self._heard.popleft())
        return notes

    def landed(self, node: int) -> int:
        """See Rail."""
        return self._landed[node]

    def freed(self, node: int, number: int) -> None:
        """See Rail. The peer counts for itself what it may write."""

    def lost(self) -> frozenset[int]:
        """See Rail."""
        return frozenset(self._gone)

    def _ask(self) -> None:
        """The body of a thread: asks for the state of writes until they are done."""
        while not self._is_closed:
            if not self._has_writes.wait(_LOOK_AGAIN_S):
                continue
            self._has_writes.clear()
            while any(self._under_way.values()) and not self._is_closed:
                for node in self._under_way:
                    self._try(node, lambda node=node: self._settle(node))  # type: ignore[misc]
                time.sleep(_NAP_S)

    def close(self) -> None:
        """See Rail."""
        if self._is_closed:
            return
        for node in self.nodes:
            self._try(node, lambda node=node: self._agent.send_notif(self._names[node], _BYE_KIND))  # type: ignore[misc]
        until = time.monotonic() + _GOODBYE_S
        while len(self._gone | self._left) < len(self.nodes) and time.monotonic() < until:
            self._look()
            time.sleep(_NAP_S)
        self._is_closed = True
        self._asks.join()
        for node in self.nodes:
            self._try(node, lambda node=node: self._agent.remove_remote_agent(self._names[node]))  # type: ignore[misc]
        for registered in self._registered:
            self._agent.deregister_memory(registered)
        self._registered.clear()
        self.nodes = ()

    def _look(self) -> None:
        """Takes the notifications that have come."""
        with self._agents_turn:
            new = self._agent.get_new_notifs()
        for name, messages in new.items():
            node = self._node_of.get(name.decode() if isinstance(name, bytes) else name)
            if node is None:
                continue
            for message in messages:
                if message[:1] == _NOTE_KIND:
                    self._heard.append((node, message[1:]))
                elif message[:1] == _BYE_KIND:
                    self._left.add(node)
                else:
                    self._early[node].add(_CHUNK.unpack(message)[1])
            while self._landed[node] in self._early[node]:
                self._early[node].remove(self._landed[node])
                self._landed[node] += 1

    def _settle(self, node: int) -> None:
        """Lets go of writes that are done."""
        under_way = self._under_way[node]
        while under_way and self._agent.check_xfer_state(under_way[0]) == "DONE":
            self._agent.release_xfer_handle(under_way[0])
            under_way.popleft()

    def _try(self, node: int, act: Callable[[], object]) -> None:
        """Asks NIXL for something at a peer, which is gone if that fails."""
        with self._agents_turn:
            if node in self._gone:
                return
            try:
                act()
            except Exception:  # noqa: BLE001 - NIXL's errors have no base of their own
                self._gone.add(node)
                self._under_way[node].clear()


def _module() -> str | None:
    """What NIXL is called here."""
    return next((name for name in _MODULES if importlib.util.find_spec(name) is not None), None)
