"""What is true of every timeline of ``crossdock trace``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

_ROUNDED_US = 0.01


def check_nesting(events: Sequence[dict[str, Any]]) -> None:
    """Times go on; spans of a track lie within each other or apart; every pair has two halves, in order."""
    named = {event["pid"] for event in events if event["name"] == "process_name"}
    moments = [event for event in events if event["ph"] != "M"]
    assert [event["ts"] for event in moments] == sorted(event["ts"] for event in moments)
    assert {event["pid"] for event in moments} <= named
    open_until: dict[tuple[int, int], list[float]] = defaultdict(list)
    for span in moments:
        if span["ph"] != "X":
            continue
        start, end = span["ts"], span["ts"] + span["dur"]
        around = open_until[span["pid"], span["tid"]]
        while around and around[-1] <= start + _ROUNDED_US:
            around.pop()
        assert span["dur"] >= 0
        assert not around or end <= around[-1] + _ROUNDED_US, span
        around.append(end)
    for first, second in ("be", "sf"):
        halves = [(event["ph"], event["cat"], event["id"]) for event in moments if event["ph"] in (first, second)]
        assert all(num == 1 for num in Counter(halves).values())
        begun = [half[1:] for half in halves if half[0] == first]
        assert sorted(begun) == sorted(half[1:] for half in halves if half[0] == second)
