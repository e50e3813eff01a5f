"""Signals handled in another way for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDS = (signal.SIGTERM, signal.SIGHUP)
"""Those that end a process, and which Python, unlike Ctrl-C, does not make an exception of."""


@contextmanager
def handled(
    numbers: Iterable[int], handler: signal.Handlers | Callable[[int, FrameType | None], Any]
) -> Iterator[None]:
    """Signals that come while the block runs go to the handler; only in the main thread, no other may set one."""
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
    """Signals that Python handles and that come while the block runs are handled behind it.

    Else one may raise between the start of a process and the name that it is given, and nobody could end it.
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
