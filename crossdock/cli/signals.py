"""Context managers that replace signal handlers for a block."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

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
def ends_raised() -> Iterator[None]:
    """Signals that would end this process without a word raise SystemExit, so that blocks end as they should."""

    def raise_exit(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    with handled([number for number in ENDS if signal.getsignal(number) is signal.SIG_DFL], raise_exit):
        yield


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
