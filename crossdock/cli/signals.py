"""Context managers that replace signal handlers for a block."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process without raising a Python exception, as SIGINT would."""


@contextmanager
def handled(
    numbers: Iterable[int], handler: signal.Handlers | Callable[[int, FrameType | None], Any]
) -> Iterator[None]:
    """Installs a handler for these signals within the block. Does nothing outside of the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handled_before in before.items():
            signal.signal(number, handled_before)


@contextmanager
def deferred() -> Iterator[None]:
    """Defers signals that have a Python handler to the end of the block.

    Otherwise a handler could raise between the start of a process and the assignment of its name, and the process could
    not be ended.
    """
    came: list[int] = []
    try:
        with handled(filter(_is_handled, (signal.SIGINT, *ENDS)), lambda number, _: came.append(number)):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)


def _is_handled(number: int) -> bool:
    return callable(signal.getsignal(number))
