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

from crossdock.errors import BackendUnavailable
from crossdock.spec import Topology
from crossdock.transport.base import Group, raise_on_all
from crossdock.transport.leaving import at_exit
from crossdock.transport.rail import Box, Rail

_MODULES = ("nixl_cu13", "nixl")
"""The wheels nixl-cu13 and nixl have the same under one name each."""
_CHUNK = struct.Struct("<cq")
_HELLO_KIND, _NOTE_KIND, _CHUNK_KIND, _BYE_KIND = b"h", b"n", b"c", b"b"
_NAP_S, _LONGEST_NAP_S = 2e-4, 0.05
"""Between two looks: behind a note or a write of ours, and twice as long each time, up to this."""
_HELLO_S = 30.0
"""How long a rank waits for its peers to answer when the rail is made."""
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
        # NIXL's own thread would take a core for itself, looking without a pause.
        config = api.nixl_agent_config(backends=[self.backend], enable_prog_thread=False)
        agent = api.nixl_agent(f"crossdock-{secrets.token_hex(8)}", config)
        node, local = divmod(members.rank, topology.node_size)
        rail = NixlRail(agent, node, topology.num_nodes, self.box)
        told = members.all_gather(rail.address)
        problem = rail.join({other: told[other * topology.node_size + local] for other in rail.nodes})
        try:
            raise_on_all(members, problem, BackendUnavailable)
        except BackendUnavailable:
            rail.close()
            raise
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
        self._put: dict[int, deque[tuple[int, Any, str]]] = {other: deque() for other in self.nodes}
        """Writes under way: number, NIXL's handle, how it began; the last one stays, and says how many there were."""
        self._new: deque[tuple[bytes | str, list[bytes]]] = deque()
        self._heard: deque[tuple[int, bytes]] = deque()
        self._landed = dict.fromkeys(self.nodes, 0)
        self._early: dict[int, set[int]] = {other: set() for other in self.nodes}
        self._gone: set[int] = set()
        self._greeted: set[int] = set()
        self._left: set[int] = set()
        self._is_closed = self._is_left = False
        self._is_not_left_open = at_exit(self.close)
        self._agents_turn = threading.RLock()
        self._has_sent = threading.Event()
        self._looks = threading.Thread(target=self._keep_looking, name="crossdock-rail", daemon=True)
        self._looks.start()

    @property
    def address(self) -> tuple[str, bytes, int]:
        """What peers need to reach this rank: its name and metadata for NIXL, and where the inbox lies."""
        return self._agent.name, self._agent.get_agent_metadata(), self.inbox.data_ptr()

    def join(self, addresses: dict[int, tuple[str, bytes, int]]) -> str | None:
        """Connects to the rail peers; what is wrong, if one does not answer.

        Of two ranks the one of the lower node begins, and the other answers: UCX may end connections that cross.
        """
        self._node_of = {name: node for node, (name, _, _) in addresses.items()}
        to_greet = {node for node in addresses if node > self._node}
        until = time.monotonic() + _HELLO_S
        while len(self._greeted) < len(addresses) or to_greet:
            for node in sorted(to_greet):
                self._connect(node, *addresses[node])
            if time.monotonic() > until:
                missing = sorted(addresses.keys() - self._greeted)
                return (
                    f"rail='nixl': nothing came from nodes {missing} within {_HELLO_S:g} s; see that UCX_NET_DEVICES "
                    f"and UCX_TLS name a network that joins the nodes"
                )
            time.sleep(_NAP_S)
            self._look()
            to_greet = self._greeted - self._inbox_there.keys()
        return None

    def _connect(self, node: int, name: str, metadata: bytes, inbox: int) -> None:
        self._names[node], self._inbox_there[node] = name, inbox
        with self._agents_turn:
            self._agent.add_remote_agent(metadata)
            self._agent.make_connection(name)
            self._agent.send_notif(name, _HELLO_KIND)

    def tell(self, node: int, note: bytes) -> None:
        """See Rail."""
        self._try(node, lambda: self._agent.send_notif(self._names[node], _NOTE_KIND + note))
        self._has_sent.set()

    def put(self, node: int, num_bytes: int) -> None:
        """See Rail."""
        _, num_chunks, chunk_bytes = self.outbox.shape
        number = self.num_put(node)
        place = number % num_chunks
        here = self.outbox[node, place].data_ptr()
        there = self._inbox_there[node] + (self._node * num_chunks + place) * chunk_bytes

        def write() -> None:
            source = self._agent.get_xfer_descs([(here, num_bytes, 0)], "DRAM")
            target = self._agent.get_xfer_descs([(there, num_bytes, 0)], "DRAM")
            says = _CHUNK.pack(_CHUNK_KIND, number)
            handle = self._agent.initialize_xfer("WRITE", source, target, self._names[node], says)
            self._put[node].append((number, handle, self._agent.transfer(handle)))

        self._try(node, write)
        self._has_sent.set()

    def num_put(self, node: int) -> int:
        """See Rail."""
        put = self._put[node]
        return put[-1][0] + 1 if put else 0

    def heard(self) -> deque[tuple[int, bytes]]:
        """See Rail."""
        self._look()
        return self._heard

    def landed(self, node: int) -> int:
        """See Rail."""
        return self._landed[node]

    def freed(self, node: int, number: int) -> None:
        """See Rail. The peer counts for itself what it may write."""

    def lost(self) -> frozenset[int]:
        """See Rail."""
        return frozenset(self._gone)

    def _keep_looking(self) -> None:
        """The body of a thread. NIXL goes on with what it was given only while somebody asks it: also between calls."""
        nap_s = _NAP_S
        while not self._is_closed:
            nap_s = _NAP_S if self._has_sent.wait(nap_s) else min(2 * nap_s, _LONGEST_NAP_S)
            self._has_sent.clear()
            self._look()
            if self._is_left:
                self.close()

    def leave(self) -> None:
        """See Rail. The rail's thread closes it."""
        self._is_left = True
        self._has_sent.set()

    def close(self) -> None:
        """See Rail."""
        if self._is_closed:
            return
        self._is_not_left_open()
        for node in self.nodes:
            self._try(node, lambda node=node: self._agent.send_notif(self._names[node], _BYE_KIND))  # type: ignore[misc]
        until = time.monotonic() + _GOODBYE_S
        while len(self._gone | self._left) < len(self.nodes) and time.monotonic() < until:
            self._look()
            time.sleep(_NAP_S)
        self._is_closed = True
        if threading.current_thread() is not self._looks:
            self._looks.join()
        for node in self.nodes:
            self._try(node, lambda node=node: self._agent.remove_remote_agent(self._names[node]))  # type: ignore[misc]
        for registered in self._registered:
            self._agent.deregister_memory(registered)
        self._registered.clear()
        self.nodes = ()

    def _look(self) -> None:
        """Takes the notifications that have come, and lets go of writes that are done. By one thread at a time."""
        with self._agents_turn:
            for node in self.nodes:
                self._try(node, lambda node=node: self._settle(node))  # type: ignore[misc]
            self._new.extend(self._agent.get_new_notifs().items())
            while self._new:
                self._take_in(*self._new[0])
                self._new.popleft()

    def _take_in(self, name: bytes | str, messages: list[bytes]) -> None:
        """Notifications of one peer, in order."""
        node = self._node_of.get(name.decode() if isinstance(name, bytes) else name)
        if node is None:
            return
        for message in messages:
            if message[:1] == _NOTE_KIND:
                self._heard.append((node, message[1:]))
            elif message[:1] == _HELLO_KIND:
                self._greeted.add(node)
            elif message[:1] == _BYE_KIND:
                self._left.add(node)
            else:
                self._early[node].add(_CHUNK.unpack(message)[1])
        while self._landed[node] in self._early[node]:
            self._landed[node] += 1
        self._early[node] = {number for number in self._early[node] if number > self._landed[node]}

    def _settle(self, node: int) -> None:
        """Lets go of writes that are done, but for the last one."""
        put = self._put[node]
        while put and (state := self._agent.check_xfer_state(put[0][1])) != "PROC":
            if state == "ERR":
                raise ConnectionError(f"write {put[0][0]} to node {node} failed")
            if len(put) == 1:
                return
            self._agent.release_xfer_handle(put[0][1])
            put.popleft()

    def _try(self, node: int, act: Callable[[], object]) -> None:
        """Asks NIXL for something at a peer, which is gone if that fails."""
        with self._agents_turn:
            if node in self._gone:
                return
            try:
                act()
            except Exception:  # noqa: BLE001 - NIXL's errors have no base of their own
                self._gone.add(node)


def _module() -> str | None:
    """What NIXL is called here."""
    return next((name for name in _MODULES if importlib.util.find_spec(name) is not None), None)
