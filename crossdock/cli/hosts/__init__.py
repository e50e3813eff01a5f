"""Hosts that are network namespaces of this machine: ranks that share no memory, joined by links of a known rate.

What happens between machines can so be seen on one: ``crossdock bench --hosts 2x4``, ``crossdock demo --hosts 2x2``,
and the tests. Only Linux has them, only root may make them, and iproute2 does it.
"""

from __future__ import annotations

from crossdock.cli.hosts.network import Network, parse_grid, problem, sent_bytes
from crossdock.cli.hosts.world import Hosts, run_hosts

__all__ = ["Hosts", "Network", "parse_grid", "problem", "run_hosts", "sent_bytes"]
