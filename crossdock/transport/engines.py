"""Which engine a rail is made by, and whether ranks need one."""

from __future__ import annotations

from typing import Literal

from crossdock.errors import BackendUnavailable, ConfigError
from crossdock.spec import Topology
from crossdock.transport import domains
from crossdock.transport.base import Group, ProcessGroup, raise_on_all
from crossdock.transport.inproc import ThreadGroup
from crossdock.transport.rail import Engine
from crossdock.transport.rails.dist import DistEngine
from crossdock.transport.rails.inproc import InprocEngine
from crossdock.transport.rails.nixl import NixlEngine

RailName = Literal["auto", "inproc", "dist", "nixl"]
NAMES: tuple[str, ...] = ("auto", "inproc", "dist", "nixl")
AnyRail = RailName | Engine | None


def check_rail(rail: object) -> None:
    """Raises ConfigError for what is no ``rail=``."""
    if not (rail is None or rail in NAMES or hasattr(rail, "box")):
        raise ConfigError(f"rail={rail!r}; pass {', '.join(map(repr, NAMES))}, an engine, or None for no rail")


def named(rail: AnyRail) -> str:
    """What ranks compare of what they were given."""
    return str(rail) if rail is None or isinstance(rail, str) else f"{type(rail).__name__}({rail.box})"


def choose(members: Group, topology: Topology, rail: AnyRail) -> Engine | None:
    """What the rails between these ranks are made by; None where they need none. Collective.

    Raises:
        ConfigError: the nodes of the topology are not those whose ranks share memory; on all ranks.
        BackendUnavailable: what the engine needs is not there; on all ranks, with the command that adds it.
    """
    if rail is None or topology.num_nodes == 1:
        return None
    if rail == "auto":
        found = domains.find(members)
        if found.num_nodes == 1:
            return None  # all rows go by memory, and nodes say only whose rows are summed together
        if found.node_size % topology.node_size:
            raise ConfigError(
                f"the Topology has nodes of {topology.node_size} ranks, and ranks that share memory are "
                f"{found.node_size} each; pass Topology.grid(nodes={found.num_nodes}, local={found.node_size})"
            )
    engine = _engine(members, rail)
    raise_on_all(members, engine.problem(members), BackendUnavailable)
    return engine


def _engine(members: Group, rail: RailName | Engine) -> Engine:
    if rail == "inproc" or (rail == "auto" and isinstance(members, ThreadGroup)):
        return InprocEngine()
    if not isinstance(rail, str):
        return rail
    if rail == "nixl" or (rail == "auto" and not isinstance(members, ProcessGroup)):
        return NixlEngine()
    return DistEngine()
