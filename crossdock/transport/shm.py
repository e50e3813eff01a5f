"""Ranks that are processes of one host: POSIX shared memory, every segment mapped by every rank."""

from __future__ import annotations

import os
from pathlib import Path

from crossdock import _env
from crossdock.arena import Control
from crossdock.errors import NotSupported, TransportError
from crossdock.transport.base import Group, NodeGroup, raise_on_all
from crossdock.transport.host import HostTransport
from crossdock.transport.presence import is_unlocked, lock
from crossdock.transport.segments import NO_ROOM, Segments, close_all, no_room, remedy, unlink
from crossdock.transport.segments import allocate as take


def connect(group: Group, control: Control, num_bytes: int, *, name: str, row_bytes: int = 1) -> HostTransport:
    """Creates this rank's segment, opens everybody's, maps them; the files are unlinked before it returns. Collective.

    Args:
        num_bytes: of each segment.
        row_bytes: of the rows that are expected, so that they need no other mapping.
        name: what the files are called, the same on all ranks and no other buffer's.

    Raises:
        TransportError: a rank's segment could not be allocated; all ranks raise.
        NotSupported: a rank cannot open another's segment, so they are not of one host; all ranks raise.
    """
    first = group.first if isinstance(group, NodeGroup) else 0
    path = _env.shm_dir() / f"{name}-{first + group.rank}"
    fds: list[int] = []
    try:
        raise_on_all(group, allocate(path, num_bytes, fds), TransportError)
        paths = group.all_gather(path)
        problem = None
        by_rank: list[int] = []
        for rank, peer_path in enumerate(paths):
            try:
                if rank != group.rank:  # to close a second descriptor of its own would be to lose its lock
                    fds.append(os.open(peer_path, os.O_RDWR | os.O_CLOEXEC))
                by_rank.append(fds[0] if rank == group.rank else fds[-1])
            except OSError as error:
                together = (
                    f"ranks must be processes of one user on one host that share {peer_path.parent}; for ranks of "
                    f"several hosts pass topology=Topology.of(group), on all ranks"
                )
                problem = problem or (
                    f"cannot open the segment of rank {rank} ({error.strerror}): {remedy(error, together)}"
                )
        raise_on_all(group, problem, NotSupported)
        fds[:] = by_rank
        segments = Segments(fds, num_bytes)
        problem = None
        try:
            segments.side_by_side(row_bytes)
        except OSError as error:
            problem = str(error)
        raise_on_all(group, problem, TransportError)  # also: nobody unlinks before everybody has mapped
    except BaseException:
        close_all(fds)
        raise
    finally:
        unlink(path)
    return HostTransport(
        segments,
        control,
        rank=first + group.rank,
        between_processes=True,
        is_alive=lambda peer: (
            not (peer != first + group.rank and segments.close.alive and is_unlocked(fds[peer - first]))
        ),
        close=segments.close,
        first=first,
    )


def allocate(path: Path, num_bytes: int, fds: list[int]) -> str | None:
    """Makes a file of that size, allocated for real, locked while its descriptor is open; or says why not.

    Args:
        path: of the new file.
        num_bytes: of a segment, or of what one shall have room for (`crossdock doctor`).
        fds: gets the descriptor, which the caller closes, also when the file could not be made as large.
    """
    try:
        fd = lock(path)
        fds.append(fd)
        take(fd, num_bytes)
    except OSError as error:
        if error.errno not in NO_ROOM:
            what_to_do = remedy(error, "set CROSSDOCK_SHM_DIR to a memory file system")
            return f"cannot create its segment {path} ({error.strerror}); {what_to_do}"
        for fd in fds:
            os.ftruncate(fd, 0)
        return no_room(path.parent, num_bytes)
    return None
