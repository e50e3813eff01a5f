"""The nodes of random rounds: how many of how many ranks, and what joins them."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from typing import Any

from crossdock import Topology
from crossdock.transport.rail import Box
from crossdock.transport.rails.dist import DistEngine
from crossdock.transport.rails.inproc import InprocEngine
from crossdock.transport.rails.nixl import NixlEngine

_BOX = Box(chunk_bytes=1024, num_chunks=3)
"""Less than the rows of many calls: they wait for leave."""
_LATE_SHARE, _LATEST_S = 0.05, 0.005
"""Of messages between threads, and how late such a one is at most."""


@dataclass(frozen=True)
class Grid:
    """Nodes that share no memory, of as many ranks each."""

    nodes: int
    local: int

    @staticmethod
    def of(text: str) -> Grid:
        """From the command line.

        >>> Grid.of("2x3").num_ranks
        6
        """
        nodes, by, local = text.partition("x")
        if not (by and nodes.isdecimal() and local.isdecimal() and int(nodes) > 1 and int(local) > 0):
            raise argparse.ArgumentTypeError(f"{text!r}; pass at least two nodes, and their ranks, such as 2x2")
        return Grid(int(nodes), int(local))

    @property
    def num_ranks(self) -> int:
        """All."""
        return self.nodes * self.local

    def options(self, rail: str) -> dict[str, Any]:
        """How buffers, or their connection, are made, with a rail of that name between nodes."""
        engines = {
            "inproc": InprocEngine(_lateness, box=_BOX),
            "dist": DistEngine(box=_BOX),
            "nixl": NixlEngine(box=_BOX),
        }
        return {"topology": Topology.grid(nodes=self.nodes, local=self.local), "rail": engines[rail]}

    def __str__(self) -> str:
        return f"{self.nodes}x{self.local}"


def _lateness() -> float:
    return random.random() * _LATEST_S if random.random() < _LATE_SHARE else 0.0  # noqa: S311 - no secret
