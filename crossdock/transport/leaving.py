"""What is done when a process ends while something is still open."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from weakref import WeakMethod


def at_exit(method: Callable[[], None]) -> Callable[[], None]:
    """Has it called when this process ends, while threads still run; not in a child that was forked from it.

    A thread of a rail that came out of a library's C++ code only when Python has ended would abort the process. It does
    not keep the method's object. Gives what takes this back.
    """
    process, known = os.getpid(), WeakMethod(method)

    def act_here() -> None:
        if os.getpid() == process and (act := known()) is not None:
            act()

    atexit.register(act_here)
    return lambda: atexit.unregister(act_here)
