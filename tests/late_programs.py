"""Programs of a kernel that take turns in Triton's interpreter, some of which begin late, as on a crowded GPU.

The interpreter runs a kernel's programs one after the other, each to its end. Here there is room for so many of them at
a time: the first one begins first, and others, in any order, once there is room. At each atomic any of those that have
begun may go on. So programs wait for each other as they do on a GPU, and for those that have found no room they wait
for ever, if they do that at all.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

PATIENCE_S = 60.0
"""How long a kernel may take, which also waits for other ranks."""
_NAP_AFTER, _NAP_S = 200, 1e-4
"""Turns without an end of any program, after which the other ranks may have the processor."""


class Stuck(Exception):
    """Programs of a kernel wait for something that does not come."""


class _Ended(BaseException):
    """In a program that is not to go on."""


class _Program:
    """One of a kernel's programs, on a thread of its own, which runs only in its turns."""

    def __init__(self, number: int, body: Callable[[], None]) -> None:
        self.number = number
        self.is_done = False
        self.is_ended = False
        self.error: BaseException | None = None
        self._body = body
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def turn(self) -> None:
        """Lets it run up to its next pause, or its end."""
        self._mine.release()
        self._theirs.acquire()

    def pause(self) -> None:
        """From within: lets others run."""
        self._theirs.release()
        self._mine.acquire()
        if self.is_ended:
            raise _Ended

    def end(self) -> None:
        """Ends it where it is."""
        if not self.is_done:
            self.is_ended = True
            self.turn()
        self._thread.join()

    def _run(self) -> None:
        self._mine.acquire()
        try:
            if not self.is_ended:
                self._body()
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised where the kernel was launched
            self.error = error
        self.is_done = True
        self._theirs.release()


class Turns:
    """Runs programs of kernels with room for so many of them at a time."""

    def __init__(self, builder: Any, *, room: int, seed: int, patience_s: float = PATIENCE_S) -> None:
        self._builder = builder
        self._room, self._patience_s = room, patience_s
        self._random = random.Random(seed)
        self._current: _Program | None = None
        self.num_late = 0
        """Programs that have begun when another had ended."""

    def run(self, num: int, body: Callable[[], None]) -> None:
        """All programs of a grid of one axis.

        Raises:
            Stuck: they have not ended in time.
        """
        late = list(range(1, num))
        self._random.shuffle(late)
        late.insert(0, 0)
        here: list[_Program] = []
        until, num_turns = time.monotonic() + self._patience_s, 0
        try:
            while late or here:
                while late and len(here) < self._room:
                    self.num_late += num - len(late) >= self._room
                    here.append(_Program(late.pop(0), body))
                program = self._current = self._random.choice(here)
                self._builder.grid_idx = (program.number, 0, 0)
                program.turn()
                num_turns += 1
                if program.error is not None:
                    raise program.error
                if program.is_done:
                    here.remove(program)
                    num_turns = 0
                elif num_turns > _NAP_AFTER:
                    time.sleep(_NAP_S)
                    if time.monotonic() > until:
                        numbers = sorted(program.number for program in here)
                        raise Stuck(f"programs {numbers} of {num} wait, and {len(late)} more have had no room")
        finally:
            self._current = None
            for program in here:
                program.end()

    def pause(self) -> None:
        """Before each atomic of a program."""
        if (program := self._current) is not None:
            program.pause()


@contextlib.contextmanager
def late_programs(*, room: int, seed: int, patience_s: float = PATIENCE_S) -> Iterator[Turns]:
    """Within, kernels have room for so many programs at a time, which take turns in an order of the seed's."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    turns = Turns(builder, room=room, seed=seed, patience_s=patience_s)

    def execute(fn: Any, *rest: Any) -> Any:
        bodies: list[Callable[[], None]] = []

        def take(args: dict[str, Any]) -> None:
            bodies.append(lambda: fn(**args))
            if len(bodies) == math.prod(builder.grid_dim):
                turns.run(len(bodies), bodies[0])

        def note(**args: Any) -> None:
            take(args)

        # Triton looks at what a kernel's globals and parameters are.
        noting = types.FunctionType(note.__code__, fn.__globals__, fn.__name__, None, note.__closure__)
        noting.__annotations__, noting.__signature__ = fn.__annotations__, inspect.signature(fn)  # type: ignore[attr-defined]
        return executor(noting, *rest)

    def pausing(make: Any) -> Any:
        def make_in_turn(*args: Any) -> Any:
            turns.pause()
            return make(*args)

        return make_in_turn

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(interpreter, "GridExecutor", execute))
        for name in ("create_atomic_rmw", "create_atomic_cas"):
            patches.enter_context(mock.patch.object(builder, name, pausing(getattr(builder, name))))
        yield turns
