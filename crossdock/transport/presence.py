"""Who still exists: a file per rank, locked while its process lives; the kernel lets go of the lock when that ends.

The locks are POSIX's (``fcntl``), which belong to the process: a child that was forked from a rank has none, and is no
rank. A process loses such a lock by closing any descriptor of the file, so it opens its own only once.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from crossdock.errors import TransportError
from crossdock.transport.base import Group, raise_on_all
from crossdock.transport.segments import remedy, unlink


class Presence:
    """The ranks of a group, as far as they are processes of this host. Collective to make.

    Args:
        group: the ranks.
        path: of this rank's file, in a folder that the ranks share; it is gone again before this returns.

    Raises:
        TransportError: a rank could not make its file; on all ranks.
    """

    def __init__(self, group: Group, path: Path) -> None:
        self._own: int | None = None
        self._fds: list[int | None] = []
        try:
            problem = None
            try:
                self._own = lock(path)
            except OSError as error:
                what_to_do = remedy(error, "set CROSSDOCK_SHM_DIR to a folder for small files")
                problem = f"cannot make {path} ({error.strerror}); {what_to_do}"
            raise_on_all(group, problem, TransportError)
            for rank, theirs in enumerate(group.all_gather(path)):
                self._fds.append(None if rank == group.rank else _open(theirs))  # to look at one's own lock loses it
            group.all_gather(None)  # nobody unlinks before everybody has opened
        except BaseException:
            self.close()
            raise
        finally:
            unlink(path)

    def is_alive(self, rank: int) -> bool:
        """False when the rank's process has ended; True also for a rank whose file could not be opened."""
        fd = self._fds[rank] if self._fds else None  # its own is not there
        return fd is None or not is_unlocked(fd)

    def close(self) -> None:
        """Lets go of the lock and of the files."""
        for fd in (self._own, *self._fds):
            if fd is not None:
                os.close(fd)
        self._own, self._fds = None, []


def lock(path: Path) -> int:
    """Makes a file that nobody else has, locked until this process ends, or closes the descriptor, which this gives."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX)
    except OSError:
        os.close(fd)
        raise
    return fd


def is_unlocked(fd: int) -> bool:
    """Whether the process that locked the file no longer does: it has ended, however, or has closed the file.

    Not for the process that locked it: that would lose the lock.
    """
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.lockf(fd, fcntl.LOCK_UN)
    return True


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
