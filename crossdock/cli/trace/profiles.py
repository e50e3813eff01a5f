"""Traces of torch's profiler, moved onto the time axis of ours: kernels and operators in their rank's process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crossdock.cli.trace.parts import Trace
from crossdock.errors import ConfigError

_FIRST_TRACK = 1000
"""Behind those of buffers."""
_KINDS = ("X", "i", "s", "f", "b", "e", "C")


class Profile(NamedTuple):
    """A file that ``torch.profiler.profile.export_chrome_trace`` has written, and the rank that it is of."""

    path: Path
    rank: int
    events: Sequence[dict[str, Any]]
    base_ns: int
    """Since 1970, what its times count from."""


def read_profile(argument: str) -> Profile:
    """From ``FILE``, which names its rank where the process had a process group, or ``RANK=FILE``.

    Raises:
        ConfigError: it cannot be read, is no such file, or its rank is not known.
    """
    number, _, name = argument.partition("=")
    if not number.isdigit():
        number, name = "", argument
    try:
        profile = json.loads(Path(name).read_text(encoding="utf-8"))
        events, base_ns = profile["traceEvents"], int(profile.get("baseTimeNanoseconds", 0))
    except OSError as error:
        raise ConfigError(f"profile={name} cannot be read ({error.strerror}); pass a file that can") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"profile={name} is no Chrome trace; pass what torch.profiler's export_chrome_trace has written"
        ) from error
    rank = int(number) if number else profile.get("distributedInfo", {}).get("rank")
    if rank is None:
        raise ConfigError(f"profile={name} does not say whose it is; pass its rank too: --profile 0={name}")
    return Profile(Path(name), rank, events, base_ns)


def events_of(profile: Profile, trace: Trace) -> list[dict[str, Any]]:
    """Its events in the process of its rank, a track for each of its threads and streams.

    Raises:
        ConfigError: the trace has no such rank, or both are of different times.
    """
    parts = [part for part in trace.parts if part.rank == profile.rank]
    if not parts:
        raise ConfigError(f"profile={profile.path} is of rank {profile.rank}, of which the trace has no part")
    clock = parts[0].clock
    to_us = (profile.base_ns - clock.unix + parts[0].at(clock.t) - trace.first) / 1e3
    tracks: dict[tuple[Any, Any], int] = {}
    shown = []
    for event in profile.events:
        if event.get("ph") not in _KINDS or "ts" not in event or event.get("cat") == "Trace":
            continue
        tid = tracks.setdefault((event.get("pid"), event.get("tid")), _FIRST_TRACK + len(tracks))
        flow = {"id": f"{profile.rank} {event['id']}"} if "id" in event else {}
        shown.append({**event, **flow, "pid": profile.rank, "tid": tid, "ts": float(event["ts"]) + to_us})
    names = {
        (event.get("pid"), event.get("tid")): event["args"]["name"]
        for event in profile.events
        if event.get("ph") == "M" and event.get("name") == "thread_name"
    }
    about: dict[str, Any] = {"ph": "M", "pid": profile.rank}
    metadata = [
        {**about, "name": "thread_name", "tid": tid, "args": {"name": f"profiler: {names.get(of, of[1])}"}}
        for of, tid in tracks.items()
    ]
    first, last = min(part.span[0] for part in parts), max(part.span[1] for part in parts)
    times = [event["ts"] for event in shown]
    if times and (max(times) < 0 or min(times) > (last - first) / 1e3 + 60e6):
        raise ConfigError(f"profile={profile.path} is of another time than the trace; pass one of the same run")
    return metadata + shown
