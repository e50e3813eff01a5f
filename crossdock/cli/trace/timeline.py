"""All ranks on one time axis: a Chrome trace, for ui.perfetto.dev or chrome://tracing, with a process for each rank.

The format is the "Trace Event Format": spans ("X") of microseconds, those within others drawn below them; moments
("i"); calls in flight ("b", "e"); arrows ("s", "f") from what a late rank did to the end of a wait for it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from crossdock.cli.trace.parts import SCALE_OUT, CallName, Line, Part, Trace

Event = dict[str, Any]
PROGRAM = 0
TRACKS = ("calls", "words", "rows", "waits")
_TRACKS_OF_BUFFER = 10
_ARROW_NS = 50_000
"""Shorter waits have no arrow."""
_ROUNDED_US = 1.0
"""Windows are other roundings of the moments that they begin and end at."""
_EDGE_US = 0.001
"""How far before its end an arrow meets a wait: within it."""


def events_of(trace: Trace, more: Iterable[Event] = ()) -> list[Event]:
    """Metadata first, then everything by time.

    Args:
        more: events of ranks from elsewhere, on the same time axis.
    """
    tracks = _tracks_of(trace)
    of_all: list[Event] = []
    for part in trace.parts:
        tid = tracks[part.path]
        of_all += _of_part(part, tid, trace.first)
    of_all += _arrows(trace, tracks)
    of_all += (event for event in more if event["ph"] != "M")
    of_all.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    return [*_names(trace, tracks), *(event for event in more if event["ph"] == "M"), *of_all]


def within(events: Sequence[Event], windows: Sequence[tuple[float, float]]) -> list[Event]:
    """Metadata, and what lies in one of these windows, microseconds, from beginning to end; no half of a pair."""

    def lies(event: Event) -> bool:
        began, ended = event["ts"] + _ROUNDED_US, event["ts"] + event.get("dur", 0.0) - _ROUNDED_US
        return any(start <= began and ended <= end for start, end in windows)

    kept = [event for event in events if event["ph"] == "M" or lies(event)]
    num_halves = Counter((event["cat"], event["id"]) for event in kept if event["ph"] in "besf")
    return [event for event in kept if event["ph"] not in "besf" or num_halves[event["cat"], event["id"]] == 2]


def _tracks_of(trace: Trace) -> dict[Any, int]:
    """The first track of each part in its rank's process: buffers in the order in which they were made."""
    tracks, num_buffers = {}, dict.fromkeys(trace.ranks, 0)
    for part in trace.parts:
        if part.header.get("is_program"):
            tracks[part.path] = PROGRAM
        else:
            tracks[part.path] = 1 + _TRACKS_OF_BUFFER * num_buffers[part.rank]
            num_buffers[part.rank] += 1
    return tracks


def _names(trace: Trace, tracks: dict[Any, int]) -> Iterator[Event]:
    def name(what: str, rank: int, tid: int, **args: object) -> Event:
        return {"name": what, "ph": "M", "pid": rank, "tid": tid, "args": args}

    for rank in sorted({part.rank for part in trace.parts}):
        yield name("process_name", rank, 0, name=f"rank {rank}")
        yield name("process_sort_index", rank, 0, sort_index=rank)
    for part in trace.parts:
        first = tracks[part.path]
        number = first // _TRACKS_OF_BUFFER
        for i, track in enumerate(("program",) if first == PROGRAM else TRACKS):
            of_buffer = f" of buffer {number + 1}" if number else ""
            yield name("thread_name", part.rank, first + i, name=f"{track}{of_buffer}")
            yield name("thread_sort_index", part.rank, first + i, sort_index=first + i)


def _of_part(part: Part, tid: int, first: int) -> Iterator[Event]:
    """The events of one rank's buffer."""
    calls, words, rows, waits = (tid + i for i in range(len(TRACKS)))
    kinds = {_name(line): line["kind"] for line in part.of("start")}
    in_flight: dict[CallName, Line] = {}

    def at(t: int) -> float:
        return (part.at(t) - first) / 1e3

    def span(name: str, on: int, t: Sequence[int], **args: object) -> Event:
        dur = max(t[1] - t[0], 0) / 1e3
        return {"name": name, "ph": "X", "pid": part.rank, "tid": on, "ts": at(t[0]), "dur": dur, "args": args}

    def moment(name: str, on: int, t: int, scope: str = "t", **args: object) -> Event:
        return {"name": name, "ph": "i", "s": scope, "pid": part.rank, "tid": on, "ts": at(t), "args": args}

    for line in part.of("verb", "start", "failed", "span"):
        if line["is"] == "verb":
            about = {"call": _said(line), "kind": kinds.get(_name(line))} if "call" in line else {}
            yield span(line["name"], calls, line["t"], **about, **_error(line))
            if line["name"].endswith("_start") and "call" in line:
                in_flight[_name(line)] = line
        elif line["is"] == "start" and line["posted"]:
            yield moment("posts its word", words, line["posted"], call=_said(line), kind=line["kind"])
        elif line["is"] == "failed":
            about = line["error"]
            yield moment(f"gives up: {about.get('type', 'error')}", calls, line["t"], "p", **about)
        elif line["is"] == "span":
            yield span(line["name"], tid, line["t"], **line.get("args", {}))
    for line in part.of("call"):
        said = _said(line)
        for about, t in _over_rail(part, line):
            yield from ({**about, "pid": part.rank, "tid": rows, "ph": ph, "ts": at(t)} for ph, t in zip("be", t))  # noqa: B905 - two of each
        for peer, t in line["words"].items():
            yield moment(f"word of rank {part.ranks[peer]}", words, t, call=said)
        yield from (span(name, rows, t, call=said, **args) for name, t, args in _rows_of(part, line))
        if (begun := in_flight.get(_name(line))) is not None:
            name, t = f"{line['kind']} in flight", (begun["t"][0], line["t"][1])
            about = {"name": name, "cat": "in flight", "id": f"{part.buffer} {part.rank} {said}"}
            yield from ({**about, "ph": ph, "pid": part.rank, "tid": calls, "ts": at(t)} for ph, t in zip("be", t))  # noqa: B905 - two of each
    for line in part.waits():
        name = f"{line['what']} {kinds.get(_name(line), 'call')}"
        yield from (span(whom, waits, t, call=_said(line), **late) for whom, t, late in _waits_of(part, line, name))


def _rows_of(part: Part, line: Line) -> Iterator[tuple[str, tuple[int, int], dict[str, object]]]:
    """When a call moved rows: its name, from when to when, and what is known of them."""
    if "sent" not in line:
        return
    num_bytes = [rows * line["row_bytes"] for rows in line["sent"]]
    about = _by_peer("rows to", part, line["sent"])
    seen = max(line["words"].values(), default=0)
    if seen and line.get("signalled", 0) >= seen:  # over nodes outputs are offered before words are seen
        yield f"{line['kind']}: rows to peers", (seen, line["signalled"]), {**about, "bytes": sum(num_bytes)}
    if line.get("arrived") and not line.get("void"):
        got = _by_peer("rows from", part, line["got"])
        name = "sums" if line["kind"] == "combine" else "takes rows"
        yield f"{line['kind']}: {name}", (line["arrived"], line["t"][1]), got


def _by_peer(what: str, part: Part, num_rows: Sequence[int]) -> dict[str, object]:
    return {f"{what} rank {_named(part, peer)}": rows for peer, rows in enumerate(num_rows) if rows}


def _waits_of(part: Part, line: Line, name: str) -> Iterator[tuple[str, tuple[int, int], dict[str, object]]]:
    """For whom and what a wait was, from when to when; the longest first."""
    began, ended = line["t"]
    came = {**dict.fromkeys(line["missing"], ended), **line["came"]}
    if not came:
        yield f"for the device to {line['what']}", (began, ended), {}
    for peer, t in sorted(came.items(), key=lambda item: -item[1]):
        yield f"for rank {_named(part, peer)} to {name}", (began, t), {"came": False} if peer in line["missing"] else {}


def _over_rail(part: Part, line: Line) -> Iterator[tuple[Event, tuple[int, int]]]:
    """From when to when chunks of a call were put into boxes of rail peers, and theirs were seen here."""
    for what, key, by_peer in (("to", "sent", line.get("put", {})), ("from", "got", line.get("landed", {}))):
        for peer, (first, last, *_) in by_peer.items():
            name = f"{line['kind']}: rows {what} rank {_named(part, peer)}"
            about = {
                "name": name,
                "cat": "over the rail",
                "id": f"{part.buffer} {part.rank} {_said(line)} {key} {peer}",
            }
            yield {**about, "args": {"rows": line[key][peer]} if key in line else {}}, (first, last)


def _named(part: Part, peer: int) -> str:
    hop = part.hop_to(peer)
    return str(part.ranks[peer]) if hop is None else f"{part.ranks[peer]} over {hop}"


def _arrows(trace: Trace, tracks: dict[Any, int]) -> Iterator[Event]:
    """From the word or the rows of the rank that came last to the end of each wait."""
    done = {
        (part.buffer, part.rank, _name(line)): (part, line) for part in trace.parts for line in part.of("start", "call")
    }
    numbers = itertools.count(1)
    for part in trace.parts:
        for line in part.waits():
            if not line["came"] or line["missing"] or line["t"][1] - line["t"][0] < _ARROW_NS:
                continue
            last = max(line["came"], key=lambda peer: line["came"][peer])
            late = part.ranks[last]
            other, theirs = done.get((part.buffer, late, _name(line)), (None, {}))
            did = theirs.get("posted" if line["what"] == "begin" else "signalled")
            if line["what"] != "begin" and part.hop_to(last) == SCALE_OUT:
                did = theirs.get("put", {}).get(part.header["rank"], (0, 0))[1]
            if other is None or not did:
                continue
            end = (part.at(line["t"][1]) - trace.first) / 1e3 - _EDGE_US
            start = min((other.at(did) - trace.first) / 1e3, end)
            about = {"name": "was waited for", "cat": "waits", "id": next(numbers)}
            yield {**about, "ph": "s", "pid": late, "tid": tracks[other.path], "ts": start}
            yield {**about, "ph": "f", "bp": "e", "pid": part.rank, "tid": tracks[part.path] + 3, "ts": end}


def _name(line: Line) -> CallName:
    epoch, number = line.get("call", (0, 0))
    return epoch, number


def _said(line: Line) -> str:
    """A call's number for people: of the first epoch just the number.

    >>> _said({"call": [1, 7]}), _said({"call": [2, 0]})
    ('7', '0 of epoch 2')
    """
    epoch, number = line["call"]
    return str(number) if epoch == 1 else f"{number} of epoch {epoch}"


def _error(line: Line) -> Event:
    error = line.get("error")
    return {} if error is None else {"error": f"{error['type']}: {error['text']}"}
