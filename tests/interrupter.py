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
    """Raises KeyboardInterrupt before the n-th line of ours that this thread runs; some lines later again, if asked."""

    def __init__(self, nth: int, again: int = 0) -> None:
        self.left, self.again = nth, again
        self.where: str | None = None
        """The line that was not reached; None: there were not as many."""

    def _look(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(SOURCES) or code.co_name in FINALIZERS:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                self.left, self.again = self.again, 0
                raise KeyboardInterrupt
        return self._look

    def __enter__(self) -> Interrupter:
        sys.settrace(self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.settrace(None)
