"""The parts of a trace as its ranks have written them, of one run, on one clock."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from crossdock.cli.trace.clocks import Clock, fits
from crossdock.errors import ConfigError
from crossdock.trace.part import parts_in

Line = dict[str, Any]
CallName = tuple[int, int]
SCALE_UP, SCALE_OUT = "scale_up", "scale_out"
HOPS = (SCALE_UP, SCALE_OUT)
_HEADER = frozenset({"rank", "pid", "host", "clock", "buffer", "ranks", "met"})
"""What the first line of a part says at least."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank's buffer did; or a program, which has spans only."""

    path: Path
    header: Line
    lines: Sequence[Line]
    """All but the header, in the order in which they were written."""
    shift: int = field(default=0)
    """Nanoseconds to be added to its times."""

    @property
    def buffer(self) -> str:
        """The same for all ranks' parts of one buffer."""
        name: str = self.header["buffer"]
        return name

    @property
    def ranks(self) -> list[int]:
        """The ranks of the buffer's group, as ``torch.distributed`` numbers all of them."""
        ranks: list[int] = self.header["ranks"]
        return ranks

    def hop_to(self, peer: int) -> str | None:
        """The axis over which it reaches a rank of its buffer; None where there is but one."""
        node_size = self.header.get("node_size")
        if node_size is None:
            return None
        return SCALE_UP if peer // node_size == self.header["rank"] // node_size else SCALE_OUT

    @cached_property
    def rank(self) -> int:
        """This rank, among all."""
        return self.ranks[self.header["rank"]]

    @property
    def clock(self) -> Clock:
        """What is known of its clock."""
        told = self.header["clock"]
        process = f"{self.header['host']} {told['boot']} {self.header['pid']}"
        return Clock(
            process,
            told["boot"],
            self.buffer,
            told["t"],
            told["unix"],
            self.header["met"],
            self.header["rank"],
            {tuple(line["call"]): (line["posted"], line["words"]) for line in self.of("call")},
        )

    @property
    def launch(self) -> tuple[str, int] | None:
        """The process that started its own and those of other groups; None where there are no others."""
        by = self.header.get("launched_by")
        return (self.header["clock"]["boot"], by) if by else None

    @cached_property
    def span(self) -> tuple[int, int]:
        """When it begins and when it ends, shifted."""
        times = [t for line in self.lines for t in _times(line)]
        began: int = self.header["clock"]["t"]
        return min([began, *times]) + self.shift, max([began, *times]) + self.shift

    def of(self, *kinds: str) -> Iterator[Line]:
        """Its lines of these kinds."""
        return (line for line in self.lines if line["is"] in kinds)

    def at(self, t: int) -> int:
        """A time of its clock on the clock of all."""
        return t + self.shift

    def waits(self) -> Iterator[Line]:
        """Its waits; of one that had not ended when the rank did, what was said last."""
        last: Line | None = None
        for line in self.of("wait", "waiting"):
            if line["is"] == "wait":
                last = None
                yield line
            else:
                last = line
        if last is not None:
            yield last


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The parts of one run."""

    parts: Sequence[Part]
    num_others: int
    """Parts of other runs in the same folder, which were left out."""
    clocks_within_ns: int = 0
    """How far apart clocks of several machines may be after all; 0 where all have one."""

    @cached_property
    def ranks(self) -> list[int]:
        """All that have a part, or that a rank with one knows of."""
        return sorted({rank for part in self.parts for rank in part.ranks})

    @cached_property
    def first(self) -> int:
        """When it begins: nanoseconds."""
        return min(part.span[0] for part in self.parts)


def read(folder: Path) -> Trace:
    """The last run whose parts lie in a folder.

    Raises:
        ConfigError: there are none, or the folder cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; pass the one that Buffer(trace=) or CROSSDOCK_TRACE named")
    found = [part for path in parts_in(folder) if (part := _read_part(path)) is not None]
    if not found:
        raise ConfigError(
            f"{folder} has no part of a trace; make one with Buffer(trace={str(folder)!r}), or with "
            f"crossdock trace {folder} -- python program.py"
        )
    run = _last_run(found)
    within = max(fit.within for fit in fits([part.clock for part in run]))
    return Trace(parts=aligned(run), num_others=len(found) - len(run), clocks_within_ns=within)


def aligned(parts: Sequence[Part]) -> list[Part]:
    """The parts on one clock, by rank."""
    moved = fits([part.clock for part in parts])
    shifted = [replace(part, shift=fit.shift) for part, fit in zip(parts, moved, strict=True)]
    return sorted(shifted, key=lambda part: (part.rank, part.span))


def _read_part(path: Path) -> Part | None:
    """A file, up to a line that was not written to its end; None if not even the first was.

    Raises:
        ConfigError: it cannot be read, or is no part of a trace.
    """
    lines: list[Line] = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                if (line := _parsed(text)) is None:
                    break
                lines.append(line)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); take it out of the folder") from error
    if not lines:
        return None
    if not (lines[0].keys() >= _HEADER and isinstance(lines[0]["ranks"], list)):
        raise ConfigError(f"{path} is no part of a trace: its first line does not say whose; take it out of the folder")
    for line in lines:
        for name in ("came", "words", "put", "landed"):  # JSON has no numbers as keys
            if name in line:
                line[name] = {int(peer): t for peer, t in line[name].items()}
    return Part(path=path, header=lines[0], lines=lines[1:])


def _parsed(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _last_run(parts: Sequence[Part]) -> list[Part]:
    """Those parts that have a buffer, a process or its parent in common, or the time, and that end last."""
    runs: list[list[Part]] = []
    by_time = {part.path: _wall_span(part) for part in parts}

    def belongs(part: Part, other: Part) -> bool:
        (a, b), (c, d) = by_time[part.path], by_time[other.path]
        if part.buffer == other.buffer or part.clock.process == other.clock.process or (a <= d and c <= b):
            return True
        return part.launch == other.launch is not None

    for part in parts:
        is_mine = [any(belongs(part, other) for other in run) for run in runs]
        joined = [other for run, mine in zip(runs, is_mine, strict=True) if mine for other in run]
        runs = [run for run, mine in zip(runs, is_mine, strict=True) if not mine] + [[part, *joined]]
    return max(runs, key=lambda run: max(by_time[part.path][1] for part in run))


def _wall_span(part: Part) -> tuple[int, int]:
    """The same as ``span``, in nanoseconds since 1970."""
    clock = part.header["clock"]
    first, last = part.span
    return first - clock["t"] + clock["unix"], last - clock["t"] + clock["unix"]


def _times(line: Line) -> list[int]:
    t = line.get("t", [])
    return t if isinstance(t, list) else [t]
