"""Segments of ranks whose memory this process maps: a file each, mapped side by side."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import resource
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from crossdock import _env
from crossdock.arena import PAGE

NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.ENOMEM)
TOO_MANY = (errno.EMFILE, errno.ENFILE)
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_PUNCH_HOLE = 0x02 | 0x01
"""Linux' FALLOC_FL_PUNCH_HOLE with FALLOC_FL_KEEP_SIZE: the bytes are no longer allocated, and read as zeros."""


class SideBySide(NamedTuple):
    """All segments in one range of addresses."""

    memory: Tensor
    """uint8; of each segment only its own bytes exist."""
    stride: int
    """Bytes from one segment to the next."""

    def segment(self, rank: int, num_bytes: int) -> Tensor:
        """A rank's segment."""
        return self.memory[rank * self.stride :][:num_bytes]


class Segments:
    """The files of all ranks' segments, and how they are mapped.

    Args:
        fds: of the files, by rank; closed when this is dropped.
        num_bytes: of each segment.
        is_lazy: memory is taken when it is first written to, as that of a process is.
    """

    def __init__(self, fds: list[int], num_bytes: int, *, is_lazy: bool = False) -> None:
        self._fds = fds
        self._is_lazy = is_lazy
        self.num_ranks = len(fds)
        self.num_bytes = num_bytes
        self._mapped: list[SideBySide] = []
        self.close = weakref.finalize(self, close_all, fds)
        """Lets go of the files; what is mapped stays so as long as there are tensors over it."""

    @classmethod
    def in_memory(cls, num_ranks: int, num_bytes: int) -> Segments:
        """Of ranks that are threads of one process: nobody else sees the files.

        Raises:
            OSError: there is no room.
        """
        fds: list[int] = []
        try:
            for _ in range(num_ranks):
                fds.append(_nameless())
                os.ftruncate(fds[-1], num_bytes)
        except BaseException:
            close_all(fds)
            raise
        return cls(fds, num_bytes, is_lazy=True)

    def side_by_side(self, row_bytes: int = 1) -> SideBySide:
        """The segments at a stride that is a multiple of pages and of rows: rows of all ranks are rows of one matrix.

        Raises:
            OSError: there are no addresses for them.
        """
        for mapped in self._mapped:
            if mapped.stride % row_bytes == 0:
                return mapped
        stride = -(-self.num_bytes // (unit := math.lcm(PAGE, row_bytes))) * unit
        self._mapped.append(SideBySide(_map(self._fds, self.num_bytes, stride), stride))
        return self._mapped[-1]

    def grew(self, num_bytes: int) -> None:
        """All files are that large now; what was mapped stays so, and is the beginning of what will be."""
        self.num_bytes = num_bytes
        self._mapped.clear()

    def allocate(self, rank: int, num_bytes: int) -> str | None:
        """Gives a rank's file so many bytes, and memory for all of them; or says why not."""
        try:
            (os.ftruncate if self._is_lazy else allocate)(self._fds[rank], num_bytes)
        except OSError as error:
            return no_room(_env.shm_dir(), num_bytes) if error.errno in NO_ROOM else str(error)
        return None

    def cut(self, rank: int) -> None:
        """The file is as large as it was."""
        os.ftruncate(self._fds[rank], self.num_bytes)

    def punch(self, rank: int, first: int) -> str | None:
        """Gives back the memory of a rank's file from there on, which reads as zeros then; or says why not."""
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "fallocate"):
            return "this system gives back no part of a file; close the connection, and make it again"
        libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if libc.fallocate(self._fds[rank], _PUNCH_HOLE, first, self.num_bytes - first):
            return f"cannot give back its memory: {os.strerror(ctypes.get_errno())}"
        return None


def remedy(error: OSError, otherwise: str) -> str:
    """What to do about a file that cannot be opened: that there are too many is not the file's own fault."""
    if error.errno in TOO_MANY:
        return "raise the limit of open files (ulimit -n): a connection holds one for each rank of its node"
    return otherwise


def no_room(folder: Path, num_bytes: int) -> str:
    """What to do where there is no room for a segment: in a file system, or by a limit of this process."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if 0 <= most < num_bytes:  # RLIM_INFINITY is negative
        return (
            f"a segment of {num_bytes:,} bytes is a larger file than the {most:,} that this process may make; raise "
            f"that limit (ulimit -f), or pass a smaller max_tokens or capacity="
        )
    return (
        f"{folder} has no room for a segment of {num_bytes:,} bytes (its size is {shutil.disk_usage(folder).total:,}, "
        f"and every rank of this host needs a segment); give it more (docker run --shm-size=8g, or mount -o "
        f"remount,size=8g {folder}), set CROSSDOCK_SHM_DIR to a larger memory file system, or pass a smaller "
        f"max_tokens or capacity="
    )


def unlink(path: Path) -> None:
    """Takes the name of a file away, if it is there: what kept it from being made is told by who tried."""
    with suppress(OSError):
        path.unlink()


def allocate(fd: int, num_bytes: int) -> None:
    """Makes a file so large, with memory for all of it where the system can give that ahead; raises OSError."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, num_bytes)
    else:
        os.ftruncate(fd, num_bytes)


def close_all(fds: list[int]) -> None:
    """Closes them, once."""
    while fds:
        os.close(fds.pop())


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("crossdock")
    with tempfile.TemporaryFile(dir=_env.shm_dir()) as file:
        return os.dup(file.fileno())


def _map(fds: Sequence[int], num_bytes: int, stride: int) -> Tensor:
    """All files in one reserved range, unmapped when the last tensor over it is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    total = stride * len(fds)
    base = libc.mmap(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if base == _MAP_FAILED:
        raise OSError(f"cannot reserve {total:,} bytes of addresses: {os.strerror(ctypes.get_errno())}")
    array = (ctypes.c_ubyte * total).from_address(base)
    weakref.finalize(array, libc.munmap, base, total).atexit = False
    for rank, fd in enumerate(fds):
        access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        if libc.mmap(base + rank * stride, num_bytes, access, flags, fd, 0) == _MAP_FAILED:
            raise OSError(f"cannot map the segment of rank {rank}: {os.strerror(ctypes.get_errno())}")
    return torch.frombuffer(array, dtype=torch.uint8)
