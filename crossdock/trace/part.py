"""One rank's part of a trace: a file of JSON lines, each written before the call that it tells of has returned.

The first line tells of the rank and its clock, the others have ``is``, what they tell of, and times ``t`` in
nanoseconds of this process's ``time.perf_counter_ns``:

    verb     a method of the buffer from beginning to end: its name, the call that it began or waited for, its error
    start    a call that was begun; its word was posted at ``posted`` unless its turn had not come
    call     the same once it is done or void: words seen by peer, rows moved from when to when, rows by peer
    wait     the host has waited for peers: ``what`` they had not done, and when each had
    waiting  it still does; said once a second
    failed   this rank has told the others that it gives up, and why
    end      the buffer was closed; what it has counted
    span     of a program itself
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO, TypeVar

from crossdock.transport.base import Group

Value = TypeVar("Value")
now = time.perf_counter_ns
SUFFIX = ".jsonl"
_PREFIX = "crossdock-rank"
_encode = json.JSONEncoder(separators=(",", ":")).encode
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def open_problem(folder: object) -> str | None:
    """What is wrong with a folder for a trace, which is made if need be; None when nothing is."""
    if not isinstance(folder, (str, os.PathLike)):
        return f"trace={folder!r} is a {type(folder).__name__}; pass the path of a folder"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"trace={os.fspath(folder)!r} cannot be made ({error.strerror}); pass a folder that can be written"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"trace={os.fspath(folder)!r} cannot be written; pass a folder that can"
    return None


def parts_in(folder: Path) -> list[Path]:
    """The files of all parts in a folder."""
    return sorted(folder.glob(f"{_PREFIX}*{SUFFIX}"))


class Part:
    """Writes the file. It keeps the lines of one call at most; a line that is in the file survives the process.

    Args:
        header: the first line, besides what is known of the process and its clock.
    """

    def __init__(self, folder: str | os.PathLike[str], rank: int, header: dict[str, Any]) -> None:
        self._lines: list[str] = []
        self._file: TextIO | None = None
        self._problem: OSError | None = None
        self._path = folder
        try:
            self._file = file = _create(Path(folder), rank)
            weakref.finalize(self, file.close)
        except OSError as error:
            self._problem = error
        clock = {"t": now(), "unix": time.time_ns(), "boot": _boot()}
        self.add({"rank": rank, "pid": os.getpid(), "host": platform.node(), "clock": clock, **header})
        self.flush()

    def add(self, line: dict[str, Any]) -> None:
        """Keeps a line for the next ``flush``."""
        self._lines.append(_encode(line))

    def flush(self) -> None:
        """Writes what was added. A disk that is full ends the trace and no call."""
        if not self._lines:
            return
        text = "\n".join(self._lines) + "\n"
        self._lines.clear()
        if self._file is not None:
            try:
                self._file.write(text)
                self._file.flush()
            except OSError as error:
                self._file, self._problem = None, error

    def close(self) -> None:
        """Writes the rest; warns when not all could be written. What is added later is dropped."""
        self.flush()
        file, self._file = self._file, None
        if file is not None:
            file.close()
        if self._problem is not None:
            why, self._problem = self._problem.strerror, None
            warnings.warn(f"the trace in {self._path} is not complete: {why}", RuntimeWarning, stacklevel=2)


def write_spans(
    folder: str | os.PathLike[str], rank: int, spans: Iterable[tuple[str, float, float]], *, num_ranks: int
) -> None:
    """A part of a program itself: names of what it did, from when to when in seconds of ``time.perf_counter``."""
    header = {"buffer": "", "ranks": list(range(num_ranks)), "met": [], "is_program": True}
    part = Part(folder, rank, header)
    for name, began, ended in spans:
        part.add({"is": "span", "name": name, "t": [round(began * 1e9), round(ended * 1e9)]})
    part.close()


class StampedGroup:
    """A group that notes when this rank came to each exchange, and when it left it.

    Nobody leaves an exchange before all have come: what is known of clocks of several hosts.
    """

    def __init__(self, members: Group) -> None:
        self.rank, self.size = members.rank, members.size
        self.met: list[tuple[int, int]] = []
        self._members = members

    def all_gather(self, value: Value) -> list[Value]:
        """See Group."""
        came = now()
        gathered = self._members.all_gather(value)
        self.met.append((came, now()))
        return gathered


def _create(folder: Path, rank: int) -> TextIO:
    """A file that nobody has: a rank may have several buffers, one after the other or at once."""
    for number in itertools.count():
        try:
            return (folder / f"{_PREFIX}{rank}-{os.getpid()}-{number}{SUFFIX}").open("x", encoding="utf-8")
        except FileExistsError:
            continue
    raise AssertionError


def _boot() -> str:
    """Names the machine since it was started: its processes have one clock."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return platform.node()
