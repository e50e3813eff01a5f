"""What parts of traces say, without ranks: clocks, runs, lines that were cut off; and that a buffer without is free."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import crossdock
from crossdock import Buffer, Compact, Fp32, Spec, ThreadGroup, Topology, run_local
from crossdock.backends.nodes.consent import NodesConsent
from crossdock.cli import main
from crossdock.cli.trace import timeline
from crossdock.cli.trace.clocks import UNKNOWN, Clock, fits, shifts
from crossdock.cli.trace.figures import ROWS, WORDS_OF_COMBINE, Figures, measure
from crossdock.cli.trace.parts import read
from crossdock.consent import Consent
from crossdock.pending import CallQueue
from crossdock.trace.part import Part
from crossdock.turn import Turn

SPEC = Spec(num_experts=4, num_topk=2, hidden=16, max_tokens=4, layout=Compact(), wire=Fp32())
CALLS_OF_PYTHON = {"dispatch": 147, "combine": 90}
"""Of ours in a warm call of a lone rank, as counted before there were traces."""
HOME = str(Path(crossdock.__file__).parent)
X, TOPK_IDX = torch.ones(4, 16), torch.tensor([[0, 1], [2, 3], [1, 2], [3, -1]])


def calls_of_python(function):
    """Functions of ours that a call calls."""
    calls = Counter()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            calls[f"{frame.f_code.co_filename.removeprefix(HOME)}:{frame.f_code.co_name}"] += 1

    sys.setprofile(note)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return calls, result


def test_off_it_costs_no_call_and_no_allocation(monkeypatch):
    monkeypatch.delenv("CROSSDOCK_TRACE", raising=False)
    with Buffer(ThreadGroup.world(1)[0], SPEC) as buffer:
        parts = (buffer._queue, buffer._queue.turn, buffer._consent)
        assert [type(part) for part in parts] == [CallQueue, Turn, Consent]
        for _ in range(3):
            recv = buffer.dispatch(X, TOPK_IDX)
            buffer.combine(recv.x, recv.plan)
        y, plan = recv.x.clone(), recv.plan
        verbs = {"dispatch": lambda: buffer.dispatch(X, TOPK_IDX), "combine": lambda: buffer.combine(y, plan)}
        for verb, most in CALLS_OF_PYTHON.items():
            calls, _ = calls_of_python(verbs[verb])
            assert not [name for name in calls if "trace" in name or "timed" in name]
            assert calls.total() <= most, calls
        tracemalloc.start()
        try:
            for verb in verbs.values():
                verb()
            snapshot = tracemalloc.take_snapshot()
        finally:
            tracemalloc.stop()
    files = {statistic.traceback[0].filename for statistic in snapshot.statistics("filename")}
    assert not [name for name in files if "/trace/" in name.removeprefix(HOME) and name.startswith(HOME)]


GRID = Topology.grid(nodes=2, local=1)
CALLS_OVER_NODES = {"dispatch": 57, "combine": 29}
"""Of the code that packs, places and sums rows over nodes, in a warm call, as counted before it could be traced.

Without what looks for arrivals (``outbound``): it is called as often as there is to look.
"""
FILES_OVER_NODES = ("rows", "offers", "places", "plan", "tables", "chunks")


def calls_over_nodes(group):
    """The fewest calls of Python of each verb, of those above, and all functions of ours that were called."""
    spec = replace(SPEC, reduce="node")
    with Buffer(group, spec, topology=GRID, rail="inproc", timeout_s=60) as buffer:
        parts = (buffer._queue, buffer._queue.turn, buffer._consent)
        assert [type(part) for part in parts] == [CallQueue, Turn, NodesConsent]
        recv = buffer.dispatch(X, TOPK_IDX)
        y, plan = recv.x.clone(), recv.plan
        verbs = {"dispatch": lambda: buffer.dispatch(X, TOPK_IDX), "combine": lambda: buffer.combine(y, plan)}
        fewest, names = dict.fromkeys(verbs, 1000), set()
        for _ in range(5):
            for verb, make in verbs.items():
                calls, _ = calls_of_python(make)
                names |= set(calls)
                own = sum(n for name, n in calls.items() if Path(name.split(":")[0]).stem in FILES_OVER_NODES)
                fewest[verb] = min(fewest[verb], own)
        group.all_gather(None)
        tracemalloc.start()
        try:
            for make in verbs.values():
                make()
            snapshot = tracemalloc.take_snapshot()
        finally:
            group.all_gather(None)
            tracemalloc.stop()
        return fewest, names, {statistic.traceback[0].filename for statistic in snapshot.statistics("filename")}


def test_off_it_costs_nothing_over_nodes_either(monkeypatch):
    monkeypatch.delenv("CROSSDOCK_TRACE", raising=False)
    for fewest, names, files in run_local(calls_over_nodes, 2):
        assert not [name for name in names if "trace" in name or "timed" in name]
        assert not [name for name in files if name.startswith(HOME) and ("/trace/" in name or "timed" in name)]
        assert all(fewest[verb] <= most for verb, most in CALLS_OVER_NODES.items()), fewest


def test_what_a_trace_keeps_does_not_grow(tmp_path):
    with Buffer(ThreadGroup.world(1)[0], SPEC, trace=tmp_path) as buffer:

        def step():
            recv = buffer.dispatch(X, TOPK_IDX)
            buffer.combine(recv.x, recv.plan)

        for _ in range(20):
            step()
        filters = [tracemalloc.Filter(inclusive=True, filename_pattern=f"{HOME}/trace/*")]
        tracemalloc.start()
        try:
            kept = []
            for _ in range(2):
                for _ in range(100):
                    step()
                snapshot = tracemalloc.take_snapshot().filter_traces(filters)
                kept.append(sum(statistic.size for statistic in snapshot.statistics("filename")))
        finally:
            tracemalloc.stop()
    assert kept[1] <= kept[0] + 2000, kept
    assert kept[1] < 64_000


def test_clocks_of_other_hosts_are_compared_by_their_meetings():
    ahead = 5_000_000_000
    here = Clock("a", "boot a", "1", 0, 0, [(0, 900), (950, 1000), (1001, 1100)])
    there = Clock(
        "b",
        "boot b",
        "1",
        0,
        0,
        [(ahead + 800, ahead + 940), (ahead + 945, ahead + 1002), (ahead + 1003, ahead + 1090)],
    )
    again = there._replace(buffer="2", met=[])
    moved = shifts([here, there, again])
    assert moved[1] == moved[2]
    assert abs(moved[1] + ahead) < 100
    assert shifts([here, there._replace(buffer="3", met=[], unix=7)])[1] == 7  # nothing but the clock on the wall
    same = here._replace(process="c", met=[(10, 905), (953, 1003), (1004, 1102)])
    assert shifts([here, same]) == [0, 0]


def test_clocks_of_other_hosts_are_compared_by_the_words_of_calls():
    ahead, calls = 5_000_000_000, [(1, n) for n in range(3)]
    posted = [1_000, 5_000, 9_000]
    met = [(0, 900_000), (950_000, 1_000_000)]
    there_met = [(came + ahead, left + ahead) for came, left in met]

    def clock(rank, boot, shift, late):
        """Of a rank that sees words so late; it speaks with the rank of its local index on the other node."""
        seen = {call: (t + shift, {rank ^ 2: t + late + shift}) for call, t in zip(calls, posted, strict=True)}
        return Clock(f"p{rank}", boot, "1", 0, 0, there_met if shift else met, rank, seen)

    clocks = [clock(0, "boot a", 0, 30), clock(1, "boot a", 0, 20), clock(2, "boot b", ahead, 50)]
    clocks.append(clock(3, "boot b", ahead, 400))
    found = fits(clocks)
    assert [fit.shift for fit in found[:2]] == [0, 0]
    assert all(abs(fit.shift + ahead) <= fit.within == 40 for fit in found[2:])  # by rank 2 and its rail peer
    assert fits([clocks[0], clocks[2]._replace(buffer="2")])[1].within == UNKNOWN


def write(folder, rank, number, lines=(), *, t=0, pid=None, num_ranks=2, **more):
    clock = {"t": t, "unix": t, "boot": "x"}
    header = {"rank": rank, "pid": pid or 100 * number + rank, "host": "h", "clock": clock, "buffer": str(number)}
    header |= {"ranks": list(range(num_ranks)), "met": [], **more}
    path = folder / f"crossdock-rank{rank}-{number}-0.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    return path


def verb(start, end):
    return {"is": "verb", "name": "dispatch", "t": [start, end]}


def test_a_line_that_was_cut_off_ends_a_part(tmp_path):
    path = write(tmp_path, 0, 1, [verb(1, 2), verb(3, 4)])
    path.write_text(path.read_text()[:-9])
    (tmp_path / "crossdock-rank1-1-0.jsonl").touch()
    (part,) = read(tmp_path).parts
    assert [line["t"] for line in part.lines] == [[1, 2]]


def test_the_last_run_of_a_folder_is_shown(tmp_path):
    for number, t in ((1, 0), (2, 1000)):
        for rank in range(2):
            write(tmp_path, rank, number, [verb(t + 10, t + 20)], t=t)
    write(tmp_path, 0, 3, [verb(2000, 2001)], t=2000, pid=200)  # another buffer of a process of the second run
    trace = read(tmp_path)
    assert [(part.buffer, part.rank) for part in trace.parts] == [("2", 0), ("3", 0), ("2", 1)]
    assert trace.num_others == 2


def test_groups_without_a_common_rank_are_one_run_if_one_process_has_started_them(tmp_path):
    for number, parent in ((1, 7), (2, 7), (3, 8)):
        write(tmp_path, 0, number, [verb(100 * number, 100 * number + 1)], t=100 * number, launched_by=parent)
    assert [part.buffer for part in read(tmp_path).parts] == ["3"]
    write(tmp_path, 0, 3, [verb(50, 51)], t=50, launched_by=8)
    assert [part.buffer for part in read(tmp_path).parts] == ["1", "2"]


def test_an_empty_folder_and_none_are_refused(tmp_path, capsys):
    assert main(["trace", str(tmp_path)]) == 2
    assert "has no part of a trace; make one with Buffer(trace=" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    write(tmp_path, 0, 1)
    for profile, message in (("3=none.json", "cannot be read"), (str(tmp_path / "p.json"), "does not say whose")):
        (tmp_path / "p.json").write_text('{"traceEvents": []}')
        assert main(["trace", str(tmp_path), "--profile", profile]) == 2
        assert message in capsys.readouterr().err
    assert main(["trace", str(tmp_path), "--", "no-such-program"]) == 2
    assert "no-such-program cannot be run" in capsys.readouterr().err
    assert main(["trace", str(tmp_path), "--between", "2", "1"]) == 2
    assert "--between 2 1 is no time; pass FROM, 0 or more, and a larger TO" in capsys.readouterr().err
    (tmp_path / "crossdock-rank7-1-0.jsonl").write_text('{"is": "call"}\n3\n')
    assert main(["trace", str(tmp_path)]) == 2
    assert "its first line does not say whose; take it out of the folder" in capsys.readouterr().err


def test_waits_are_charged_to_the_last(tmp_path):
    call, other = [1, 0], [1, 1]
    start = {"is": "start", "call": call, "kind": "combine", "t": 0, "posted": 0}
    wait = {
        "is": "wait",
        "call": call,
        "what": "begin",
        "came": {"1": 4_000, "2": 9_000},
        "missing": [],
        "t": [0, 9_000],
    }
    rows = {"is": "wait", "call": other, "what": "send its rows of", "came": {}, "missing": [1], "t": [9_000, 10_000]}
    write(tmp_path, 0, 1, [start, wait, rows], num_ranks=3)
    figures = measure(read(tmp_path))
    assert figures.waited_s[WORDS_OF_COMBINE].tolist() == [[0, 0, 9e-6], [0] * 3, [0] * 3]
    assert figures.waited_s[ROWS].tolist() == [[0, 1e-6, 0], [0] * 3, [0] * 3]


def test_waits_of_kernels_are_those_that_the_device_has_counted(tmp_path):
    report = pytest.importorskip("crossdock.cli.trace.report")
    start = {"is": "start", "call": [1, 0], "kind": "dispatch", "t": 0, "posted": 0}
    host = {
        "is": "wait",
        "call": [1, 0],
        "what": "begin this dispatch",
        "came": {},
        "missing": [],
        "t": [5, 900_000_000],
    }
    for rank, wait_s in enumerate(([0, 0.5], [0.001, 0])):
        end = {"is": "end", "t": 1_000_000_000, "unix": 0, "loads": [[4, [rank, 1]]], "wait_s": wait_s}
        write(tmp_path, rank, 1, [start, host, end])
    figures = measure(read(tmp_path))
    assert figures.waits.tolist() == [[0, 0.5], [0.001, 0]]
    assert figures.expert_rows.tolist() == [0, 1, 1, 1]
    said = "\n".join(report.lines(figures))
    assert "Slow rank: 1. Others waited 500.0 ms for it, 100% of all waiting." in said
    assert "Kernels waited" in said
    assert "for the device to begin this dispatch" in [event["name"] for event in timeline.events_of(read(tmp_path))]


def figures_of(**given):
    square = np.zeros((4, 4))
    given = {
        "ranks": range(4),
        "num_calls": 1,
        "lasted_s": np.ones(4),
        "in_calls_s": np.ones(4),
        "waited_s": {ROWS: square},
        "on_device": False,
        "rates": square * np.nan,
        "expert_rows": np.zeros(8, np.int64),
        "rank_rows": np.ones(4),
        "expert_rank": [0, 0, 1, 1, 2, 2, 3, 3],
        "failures": [],
    } | given
    return Figures(**given)


def test_a_slow_link_and_a_hot_expert_are_named():
    report = pytest.importorskip("crossdock.cli.trace.report")
    rates = np.full((4, 4), 2e9)
    np.fill_diagonal(rates, np.nan)
    slow = rates.copy()
    slow[2, 1] = 2e8
    loads = np.array([1, 1, 1, 1, 1, 9, 1, 1])
    figures = figures_of(rates=slow, expert_rows=loads)
    said = "\n".join(report.lines(figures))
    assert "Slow rank: none stands out." in said
    assert "Slow link: from rank 2 to rank 1, 0.20 GB/s; the median link has 2.00 GB/s." in said
    assert "Hot expert: 5, with 56% of all rows, 4.50 times the mean, on rank 2" in said
    even = figures_of(rates=rates, expert_rows=loads * 0 + 1)
    assert "none stands out; the slowest, 0 to 1, has 2.00 GB/s" in "\n".join(report.lines(even))


def test_a_window_cuts_no_pair():
    def event(ph, ts, **more):
        return {"name": "n", "ph": ph, "ts": ts, "pid": 0, "tid": 0, **more}

    pair = [event("s", 5.0, cat="c", id=1), event("f", 15.0, cat="c", id=1)]
    inside = [event("X", 2.0, dur=3.0), event("b", 3.0, cat="c", id=2), event("e", 4.0, cat="c", id=2)]
    assert timeline.within([*pair, *inside, event("X", 8.0, dur=4.0)], [(1.0, 10.0)]) == inside


def test_a_full_disk_ends_the_trace_and_no_call(tmp_path):
    part = Part(tmp_path, 0, {})

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    part._file.close()
    part._file = Full()
    part.add({"is": "verb"})
    part.flush()
    part.add({"is": "verb"})
    with pytest.warns(RuntimeWarning, match="is not complete: No space left on device"):
        part.close()
