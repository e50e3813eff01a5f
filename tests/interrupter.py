"""KeyboardInterrupt at a chosen line of the library, where a signal could come."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

FINALIZERS = {"close_all"}
"""What is run when something is gone, at any time: an interrupt in it goes nowhere."""
SOURCES = str(Path(__file__).parents[1] / "crossdock")


class Interrupter:
    """Raises KeyboardInterrupt before the n-th line of ours that this thread runs; some lines later again, if asked.

    Or before the first visit to a line that is named as ``where`` names it; with neither it only looks.
    """

    def __init__(self, nth: int = 0, again: int = 0, *, at: str | None = None) -> None:
        self.left, self.again, self.at = nth, again, at
        self.where: str | None = None
        """The line that was not reached; None: there were not as many."""
        self.seen: set[str] = set()

    def _look(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(SOURCES) or code.co_name in FINALIZERS:
            return None
        if event == "line":
            self.left -= 1
            here = f"{Path(code.co_filename).relative_to(SOURCES)}:{frame.f_lineno}"
            if self.left == 0 or (here == self.at and here not in self.seen):
                self.where = here
                self.left, self.again = self.again, 0
                self.seen.add(here)
                raise KeyboardInterrupt
            self.seen.add(here)
        return self._look

    def __enter__(self) -> Interrupter:
        sys.settrace(self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.settrace(None)
