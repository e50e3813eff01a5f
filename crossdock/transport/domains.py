"""Which ranks can map each other's memory: found by trying to open a peer's file, not by names of hosts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from crossdock import _env
from crossdock.errors import ConfigError, TransportError
from crossdock.masks import listed
from crossdock.spec import Topology
from crossdock.transport.base import Group, raise_on_all
from crossdock.transport.inproc import ThreadGroup
from crossdock.transport.segments import TOO_MANY, remedy, unlink


def find(group: Group) -> Topology:
    """The scale-up domains of a group of processes, as nodes. Collective.

    Each rank leaves a small file beside which its segment would lie, and opens those of the others.

    Raises:
        ConfigError: domains differ in size, or their ranks do not follow each other; on all ranks, with the list of who
            sees whom.
        TransportError: a rank could not make its file; on all ranks.
    """
    if isinstance(group, ThreadGroup):
        return Topology.flat(group.size)
    seen = group.all_gather(_seen_by(group))
    return topology_of(dict(enumerate(seen)))


def topology_of(seen: Mapping[int, Sequence[int]]) -> Topology:
    """The ranks as a mesh, from whom each of them sees, itself included.

    Raises:
        ConfigError: they form none.

    >>> topology_of({0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}).num_nodes
    2
    """
    num_ranks, size = len(seen), len(seen[0])
    for rank, others in seen.items():
        first = rank // size * size
        if num_ranks % size or list(others) != list(range(first, first + size)):
            domains = "; ".join(f"rank {r} sees {listed(set(seen[r]) - {r})}" for r in sorted(seen))
            raise ConfigError(
                f"ranks that map each other's memory form no nodes of equal size whose ranks follow each other: "
                f"{domains}; start as many ranks on each host, numbered host by host (torchrun does both), and give "
                f"those of a host one /dev/shm (containers: --ipc=host) or one CROSSDOCK_SHM_DIR"
            )
    return Topology(num_ranks=num_ranks, scale_up=None if size == num_ranks else size)


def _seen_by(group: Group) -> list[int]:
    token = secrets.token_bytes(16)
    path = _env.shm_dir() / f"crossdock-domain-{token.hex()}"
    try:
        raise_on_all(group, _write(path, token), TransportError)
        left = group.all_gather((path, token))
        seen, problem = [], None
        for rank, (theirs, content) in enumerate(left):
            try:
                if theirs.read_bytes() == content:
                    seen.append(rank)
            except OSError as error:  # that of another host
                if error.errno in TOO_MANY:
                    problem = f"cannot open {theirs} ({error.strerror}); {remedy(error, '')}"
        raise_on_all(group, problem, TransportError)  # also: nobody unlinks before everybody has read
    finally:
        unlink(path)
    return seen


def _write(path: Path, token: bytes) -> str | None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        what_to_do = remedy(error, "set CROSSDOCK_SHM_DIR to a memory file system")
        return f"cannot make {path} ({error.strerror}); {what_to_do}"
    with os.fdopen(fd, "wb") as file:
        file.write(token)
    return None
