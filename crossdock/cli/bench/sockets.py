"""Plain TCP between ranks of the same local index: what any exchange of as many bytes takes on these links."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from crossdock.cli.hosts.network import Network
from crossdock.spec import Topology

_PORT = 29800
_BLOCK = 1 << 20


class PlainTcp:
    """One connection to each rank of this local index on other hosts. Making it is collective."""

    def __init__(self, topology: Topology, rank: int) -> None:
        node, local = divmod(rank, topology.node_size)
        server = socket.create_server(("", _PORT + local), backlog=topology.num_nodes)
        dist.barrier()  # all listen
        self._peers: dict[int, socket.socket] = {}
        for other in range(node):
            self._peers[other] = socket.create_connection((Network.address(other), _PORT + local))
            self._peers[other].sendall(bytes([node]))
        for _ in range(node + 1, topology.num_nodes):
            peer, _ = server.accept()
            self._peers[peer.recv(1)[0]] = peer
        server.close()
        self._block = memoryview(bytearray(_BLOCK))

    def __enter__(self) -> PlainTcp:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for peer in self._peers.values():
            peer.close()

    def exchange(self, sent: npt.NDArray[np.int64], received: npt.NDArray[np.int64]) -> None:
        """Sends and receives as many bytes to and from each node, both at once."""
        work: list[tuple[Any, socket.socket, int]] = []
        for node, peer in self._peers.items():
            work += [(self._send, peer, int(sent[node])), (_receive, peer, int(received[node]))]
        threads = [threading.Thread(target=do, args=args) for do, *args in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _send(self, peer: socket.socket, num_bytes: int) -> None:
        while num_bytes > 0:
            peer.sendall(self._block[: min(num_bytes, _BLOCK)])
            num_bytes -= _BLOCK


def _receive(peer: socket.socket, num_bytes: int) -> None:
    room = memoryview(bytearray(_BLOCK))
    while num_bytes > 0:
        came = peer.recv_into(room[: min(num_bytes, _BLOCK)])
        if not came:
            raise ConnectionError("a host has closed its connection; see what its ranks say")
        num_bytes -= came
