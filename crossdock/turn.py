"""Whose turn it is: one thread at a time, in the process that made the buffer."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType

from crossdock.errors import ConfigError, CrossdockError

_PACKAGE = os.path.join(os.path.dirname(__file__), "")  # noqa: PTH118, PTH120 - as the code of a frame names its file


class Turn:
    """Surrounds every call of a buffer. Threads may take turns; to call while another does is refused.

    A lock that waited would give threads some order, and ranks must have the same.

    Args:
        left_by: told the exceptions that leave a call and are not Crossdock's, such as KeyboardInterrupt.

    >>> with Turn(print) as turn:
    ...     turn.is_of_this_process
    True
    """

    def __init__(self, left_by: Callable[[BaseException], None]) -> None:
        self._left_by = left_by
        self._process = os.getpid()
        self._lock = threading.RLock()  # a call may be made of others
        self._holder = 0  # none, or one that is just coming
        self._depth = 0
        self._taking_over = threading.Lock()

    @property
    def is_of_this_process(self) -> bool:
        """False in a child that was forked: its parent is the rank, and it has no part in its parent's calls."""
        return os.getpid() == self._process

    def __enter__(self) -> Turn:
        if os.getpid() != self._process:
            raise ConfigError(
                f"this buffer was made by process {self._process}, and this is process {os.getpid()}, which was forked "
                f"from it; only the process that made a buffer calls it: make another in a group of this process's own"
            )
        if not (self._lock.acquire(blocking=False) or self._take_over()):
            raise ConfigError(
                f"thread {threading.current_thread().name!r} made a call while thread {_name_of(self._holder)!r} is in "
                f"one; calls have one order, the same on all ranks: let threads take turns, in that order, or give "
                f"each a buffer of its own"
            )
        self._holder = threading.get_ident()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None and not isinstance(error, CrossdockError):
                self._left_by(error)
        finally:
            self._depth -= 1
            if not self._depth:
                self._holder = 0
            self._lock.release()

    def _take_over(self) -> bool:
        """Takes the turn of a thread that an interrupt has thrown out of ``__exit__`` before it gave its turn back."""
        held = self._lock
        with self._taking_over:
            if self._lock is held and self._holder and not _is_in_a_call(self._holder):
                self._lock, self._depth = threading.RLock(), 0
        return self._lock.acquire(blocking=False)


def _is_in_a_call(ident: int) -> bool:
    """Whether a thread runs code of this package."""
    frame = sys._current_frames().get(ident)  # noqa: SLF001 - documented, in spite of its name
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame is not None


def _name_of(ident: int) -> str:
    """A thread's name, from its number."""
    return next((thread.name for thread in threading.enumerate() if thread.ident == ident), f"number {ident}")
