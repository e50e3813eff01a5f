"""What moves rows, as the model sees it: the share of a link's rate that it reaches, and what a call costs besides.

The figures are of others' tables and of this library's (docs/model.md has each beside what they predict).
"""

from __future__ import annotations

from dataclasses import dataclass

from crossdock.errors import ConfigError

SM_BANDWIDTH = 59e9
"""Bytes per second that one SM of an H200 stores, measured with 1 to 32 SMs; the same for every store instruction."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to move rows.

    Args:
        name: for the tables.
        fixed_s: seconds of a call beside its bytes: words, launches, waiting for the last rank.
        rail_s: seconds more of a call between nodes: counts and the first chunk over the network.
        num_hops: 2: a row crosses the rail once per node, and goes on from there. 1: it goes to its rank at once.
        per_pick: a row for each pick crosses, and not for each rank.
        through_memory: all ranks share one GPU, whose memory is the link.
        nic_share: of the line rate that rows reach.
        link_share: of the scale-up rate that a maker states.
        memory_share: of a memory's measured copy rate that dispatch and combine reach.
        load_bandwidth: bytes per second that one SM loads from a peer and sums; loads want more in flight than stores.
    """

    name: str
    fixed_s: float
    rail_s: float = 0.0
    num_hops: int = 2
    per_pick: bool = False
    through_memory: bool = False
    nic_share: float = 0.90
    link_share: float = 0.84
    memory_share: float = 0.90
    load_bandwidth: float = SM_BANDWIDTH * 2 / 3

    def __post_init__(self) -> None:
        shares = self.nic_share, self.link_share, self.memory_share
        if self.num_hops not in (1, 2) or min(shares) <= 0 or max(shares) > 1 or min(self.fixed_s, self.rail_s) < 0:
            raise ConfigError(f"{self}; pass 1 or 2 hops, shares above 0 and up to 1, and seconds that are 0 or more")


TWO_HOPS = Method(name="two hops", fixed_s=10e-6, rail_s=40e-6)
"""This library's way. 10 us are a cached dispatch's of few tokens within a node, in a CUDA graph; 50 us in all are what
a high-throughput call of DeepEP V1 takes beside its bytes (its notify step was seen to take 40 to 73)."""
ONE_HOP = Method(name="one hop", fixed_s=10e-6, rail_s=40e-6, num_hops=1)
"""A row for each rank, over the network at once."""
LOW_LATENCY = Method(name="direct, per pick", fixed_s=29e-6, num_hops=1, per_pick=True)
"""A row for each pick, over the network at once, as DeepEP V1's low-latency calls; fitted to two of their rows."""
ONE_GPU = Method(name="one GPU's memory", fixed_s=10e-6, through_memory=True)
"""Ranks that share a GPU under MPS."""
SOCKETS = Method(name="TCP", fixed_s=1e-3, rail_s=4e-3, nic_share=1448 / 1514)
"""Ranks on CPUs, whose rows go through gloo or NIXL over TCP: Ethernet, IP and TCP take 66 bytes of each 1514."""
METHODS = {"two-hops": TWO_HOPS, "one-hop": ONE_HOP, "low-latency": LOW_LATENCY, "sockets": SOCKETS}
"""By the names of the command line."""
