"""Ranks that are processes of one host: POSIX shared memory, every segment mapped by every rank, side by side."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import weakref
from pathlib import Path

import torch
from torch import Tensor

from crossdock import _env
from crossdock.arena import Arena
from crossdock.errors import NotSupported, TransportError
from crossdock.transport.base import Group, raise_on_all
from crossdock.transport.host import HostTransport
from crossdock.transport.presence import is_unlocked, lock

_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


def connect(group: Group, arena: Arena, *, name: str) -> HostTransport:
    """Creates this rank's segment, opens everybody's, maps them; the files are unlinked before it returns. Collective.

    Args:
        name: what the files are called, the same on all ranks and no other buffer's.

    Raises:
        TransportError: a rank's segment could not be allocated; all ranks raise.
        NotSupported: a rank cannot open another's segment, so they are not of one host; all ranks raise.
    """
    path = _env.shm_dir() / f"{name}-{group.rank}"
    fds: list[int] = []
    try:
        raise_on_all(group, allocate(path, arena.num_bytes, fds), TransportError)
        paths = group.all_gather(path)
        problem = None
        peers = []
        for rank, peer_path in enumerate(paths):
            try:
                own = rank == group.rank  # to close a second descriptor of it would be to lose its lock
                peers.append(os.dup(fds[0]) if own else os.open(peer_path, os.O_RDWR | os.O_CLOEXEC))
            except OSError as error:
                problem = problem or (
                    f"cannot open the segment of rank {rank} ({error.strerror}): ranks must be processes of one user "
                    f"on one host that share {peer_path.parent}; ranks of several hosts are not supported yet"
                )
        fds.extend(peers)
        raise_on_all(group, problem, NotSupported)
        memory, problem = _map(peers, arena)
        raise_on_all(group, problem, TransportError)  # also: nobody unlinks before everybody has mapped
    except BaseException:
        _close(fds)
        raise
    finally:
        path.unlink(missing_ok=True)
    closed = weakref.finalize(memory, _close, fds)
    return HostTransport(
        memory,
        arena,
        rank=group.rank,
        between_processes=True,
        is_alive=lambda peer: not (peer != group.rank and closed.alive and is_unlocked(peers[peer])),
        close=closed,
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
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, num_bytes)
        else:
            os.ftruncate(fd, num_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM):
            return f"cannot create its segment {path} ({error.strerror}); set CROSSDOCK_SHM_DIR to a memory file system"
        for fd in fds:
            os.ftruncate(fd, 0)
        total = shutil.disk_usage(path.parent).total
        return (
            f"{path.parent} has no room for a segment of {num_bytes:,} bytes (its size is {total:,}, and every "
            f"rank of this host needs a segment); give it more (docker run --shm-size=8g, or mount -o remount,size=8g "
            f"{path.parent}), set CROSSDOCK_SHM_DIR to a larger memory file system, or pass a smaller max_tokens or "
            f"capacity="
        )
    return None


def _map(fds: list[int], arena: Arena) -> tuple[Tensor, str | None]:
    """All segments in one reserved range, unmapped when the last tensor over it is gone; or why not."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    total = arena.stride * len(fds)
    base = libc.mmap(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if base == _MAP_FAILED:
        return _nothing(), f"cannot reserve {total:,} bytes of addresses: {os.strerror(ctypes.get_errno())}"
    array = (ctypes.c_ubyte * total).from_address(base)
    weakref.finalize(array, libc.munmap, base, total).atexit = False
    for rank, fd in enumerate(fds):
        access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        if libc.mmap(base + rank * arena.stride, arena.num_bytes, access, flags, fd, 0) == _MAP_FAILED:
            return _nothing(), f"cannot map the segment of rank {rank}: {os.strerror(ctypes.get_errno())}"
    return torch.frombuffer(array, dtype=torch.uint8), None


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu")


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
