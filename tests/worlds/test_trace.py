"""Traces of real calls of threads and processes: what is in their timeline, and whom the table names."""

import contextlib
import json
import os
import re
import signal
import sys
import time

import pytest
import torch

import crossdock as cd
from crossdock import PeerFailed, PeerTimeout
from crossdock.cli import main
from crossdock.cli.trace.figures import measure
from crossdock.cli.trace.parts import read
from crossdock.transport.rail import Box
from crossdock.transport.rails.dist import DistEngine
from crossdock.transport.rails.inproc import InprocEngine
from tests.child import run_child
from tests.timeline import check_nesting
from tests.world import WorkerLost, meet, open_buffer

pytest.importorskip("rich")
pytest.importorskip("plotly")
pytest.importorskip("jinja2")

STEPS, SLOW, LATE_S = 3, 1, 0.2
WORLDS = pytest.mark.worlds("inproc-4", "processes-4")


def spec_of(num_ranks, **options):
    made = {"num_experts": 2 * num_ranks, "num_topk": 2, "hidden": 32, "max_tokens": 8, "wire": cd.Fp32()}
    return cd.Spec(**made | {"layout": cd.Expanded()} | options)


def inputs_of(spec, rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(6, spec.hidden, generator=generator), cd.uniform_load(
        6, spec.num_experts, num_topk=spec.num_topk, generator=generator
    )


def steps(group, trace, late="dispatch", rank_late=SLOW):
    """Steps in which one rank is late to one of the two verbs; their results."""
    spec = spec_of(group.size if hasattr(group, "all_gather") else torch.distributed.get_world_size(group))
    results = []
    with open_buffer(group, spec, trace=trace) as buffer:
        x, topk_idx = inputs_of(spec, buffer.rank)
        for _ in range(STEPS):
            for verb in ("dispatch", "combine"):
                if verb == late and buffer.rank == rank_late:
                    time.sleep(LATE_S)
                if verb == "dispatch":
                    recv = buffer.dispatch(x, topk_idx)
                else:
                    results.append(buffer.combine(recv.x * 2, recv.plan))
        pending = [buffer.dispatch_start(x, recv.plan) for _ in range(2)]
        results += [one.wait().x.clone() for one in pending]
        meet(group)
    return results


def shown(folder, capsys):
    """What the command prints, and the events of the timeline that it writes."""
    assert main(["trace", str(folder)]) == 0
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    check_nesting(events)
    return capsys.readouterr().out, events


def named(events, name, rank):
    return [event for event in events if event["name"] == name and event["pid"] == rank]


@WORLDS
@pytest.mark.parametrize(("late", "why"), [("dispatch", "late to dispatches"), ("combine", "late to combines")])
def test_the_table_names_the_slow_rank_and_the_timeline_shows_it(world, tmp_path, capsys, late, why):
    for attempt in range(4):  # other programs of the machine may slow down other ranks
        folder = tmp_path / str(attempt)
        world.run(steps, str(folder), late)
        said, events = shown(folder, capsys)
        if f"Slow rank: {SLOW}. Others waited" in said:
            break
    assert f"Slow rank: {SLOW}. Others waited" in said, said
    assert why in " ".join(said.split())
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [f"rank {r}" for r in range(4)]
    for rank in range(world.num_ranks):
        verbs = [len(named(events, verb, rank)) for verb in ("dispatch", "combine", "dispatch_start", "wait", "close")]
        assert verbs == [STEPS, STEPS, 2, 2, 1]
        assert len(named(events, "cached dispatch in flight", rank)) == 4
        words = [len(named(events, f"word of rank {peer}", rank)) for peer in range(world.num_ranks)]
        assert words == [2 * STEPS + 2] * world.num_ranks
        if rank != SLOW:
            waits = named(events, f"for rank {SLOW} to begin {late}", rank)
            assert sum(wait["dur"] for wait in waits) > STEPS * LATE_S * 0.5e6
    arrows = [event for event in events if event["ph"] == "s" and event["pid"] == SLOW]
    assert len(arrows) >= STEPS
    figures = measure(read(folder))
    assert figures.num_calls == 2 * STEPS + 2
    topk_idx = torch.cat([inputs_of(spec_of(4), rank)[1] for rank in range(4)])
    assert figures.expert_rows.tolist() == ((STEPS + 2) * topk_idx.flatten().bincount(minlength=8)).tolist()
    assert all(any(line.get("move_ns", [0])) for part in read(folder).parts for line in part.of("call"))


@pytest.mark.worlds("inproc-2", "processes-2")
def test_a_trace_changes_no_bit(world, tmp_path):
    assert all(
        torch.equal(traced, plain)
        for of_traced, of_plain in zip(world.run(steps, str(tmp_path)), world.run(steps, None), strict=True)
        for traced, plain in zip(of_traced, of_plain, strict=True)
    )


def time_out(group, trace):
    spec = spec_of(2)
    with open_buffer(group, spec, trace=trace, timeout_s=1.5) as buffer:
        x, topk_idx = inputs_of(spec, buffer.rank)
        if buffer.rank == 0:
            with pytest.raises(PeerTimeout):
                buffer.dispatch(x, topk_idx)
        meet(group)
        if buffer.rank == 1:
            with pytest.raises(PeerTimeout):
                buffer.dispatch(x, topk_idx)
        buffer.dispatch(x, topk_idx)
        if buffer.rank == 0:
            with pytest.raises(cd.ConfigError):
                buffer.dispatch(x.double(), topk_idx)
        else:
            with pytest.raises(PeerFailed):
                buffer.dispatch(x, topk_idx)
        meet(group)


@pytest.mark.worlds("inproc-2", "processes-2")
def test_failures_are_in_it_with_whom(world, tmp_path, capsys):
    world.run(time_out, str(tmp_path))
    said, events = shown(tmp_path, capsys)
    errors = {
        (event["pid"], event["args"]["error"].split(":")[0]) for event in events if "error" in event.get("args", {})
    }
    assert {(0, "PeerTimeout"), (1, "PeerTimeout"), (0, "ConfigError"), (1, "PeerFailed")} <= errors
    assert "Rank 0 gave up after" in said, said
    assert "rank 1 did not begin this dispatch within timeout_s=1.5" in " ".join(said.split())
    (wait,) = [event for event in events if event.get("args", {}).get("came") is False and event["pid"] == 0]
    assert wait["name"] == "for rank 1 to begin dispatch"
    assert wait["dur"] >= 1.5e6


def die(group, trace):
    spec = spec_of(2)
    buffer = open_buffer(group, spec, trace=trace, timeout_s=20)
    x, topk_idx = inputs_of(spec, buffer.rank)
    recv = buffer.dispatch(x, topk_idx)
    if buffer.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerTimeout, match="is gone"):
        buffer.combine(recv.x, recv.plan)
    buffer.mask(1)
    buffer.dispatch(x, topk_idx)
    buffer.close()


@pytest.mark.worlds("processes-2")
def test_a_rank_that_is_killed_leaves_its_part(world, tmp_path, capsys):
    outcomes = world.outcomes(die, str(tmp_path))
    assert outcomes[0] is None
    assert isinstance(outcomes[1], WorkerLost)
    said, events = shown(tmp_path, capsys)
    assert [len(named(events, "dispatch", rank)) for rank in (0, 1)] == [2, 1]
    assert len(named(events, "mask", 0)) == 1
    assert "and is gone" in " ".join(said.split())


def killed_while_it_waits(group, trace):
    spec = spec_of(2)
    buffer = open_buffer(group, spec, trace=trace)
    if buffer.rank == 1:
        time.sleep(2.5)
        os._exit(0)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    buffer.dispatch(*inputs_of(spec, 0))


@pytest.mark.worlds("processes-2")
def test_a_rank_that_is_killed_while_it_waits_says_so(world, tmp_path, capsys):
    world.outcomes(killed_while_it_waits, str(tmp_path))
    _, events = shown(tmp_path, capsys)
    (wait,) = named(events, "for rank 1 to begin dispatch", 0)
    assert 0.9e6 < wait["dur"] < 2e6


def train(group, trace):
    spec = spec_of(2, reduce="rank")
    with open_buffer(group, spec, trace=trace) as buffer:
        x, topk_idx = inputs_of(spec, buffer.rank)
        x.requires_grad_()
        recv = cd.autograd.dispatch(buffer, x, topk_idx)
        cd.autograd.combine(buffer, recv.x * 3, recv.plan).sum().backward()
        buffer.restart()
    return x.grad


@pytest.mark.worlds("inproc-2", "processes-2")
def test_training_and_restarts_are_in_it(world, tmp_path, capsys):
    grads = world.run(train, str(tmp_path))
    assert [grad.unique().tolist() for grad in grads] == [[6.0], [6.0]]
    _, events = shown(tmp_path, capsys)
    for rank in range(2):
        assert [len(named(events, verb, rank)) for verb in ("dispatch", "combine", "restart")] == [2, 2, 1]


def few_calls(group, trace):
    spec = spec_of(2, hidden=16)
    with open_buffer(group, spec, trace=trace) as buffer:
        x, topk_idx = inputs_of(spec, buffer.rank)
        recv = buffer.dispatch(x, topk_idx)
        if buffer.rank == SLOW:
            time.sleep(1)
        buffer.combine(recv.x, recv.plan)
        buffer.dispatch_start(x, recv.plan).wait()


@pytest.mark.worlds("interpreted-2")
def test_on_the_cuda_backend_calls_are_in_it_and_rows_of_experts(world, tmp_path, capsys):
    world.run(few_calls, str(tmp_path))
    said, events = shown(tmp_path, capsys)
    for rank in range(2):
        verbs = [len(named(events, verb, rank)) for verb in ("dispatch", "combine", "dispatch_start", "wait")]
        assert verbs == [1, 1, 1, 1]
    figures = measure(read(tmp_path))  # without waits of kernels: the interpreter has no clock
    assert figures.expert_rows.sum() == 2 * 2 * 6 * 2
    took_us = [named(events, "combine", rank)[0]["dur"] for rank in range(2)]
    assert took_us[0] > took_us[SLOW]
    assert "Slow link: not known" in said, said


def two_specs(group, trace):
    prefill, decode = spec_of(2), spec_of(2, num_experts=6, max_tokens=6, layout=cd.Padded(), num_slots=2)
    with cd.Connection(group, num_bytes=1 << 20, trace=trace) as connection:
        with cd.Buffer(connection, prefill) as buffer:
            recv = buffer.dispatch(*inputs_of(prefill, connection.rank))
            buffer.combine(recv.x, recv.plan)
        del buffer, recv
        buffer = cd.Buffer(connection, decode)
        pending = [buffer.dispatch_start(*inputs_of(decode, connection.rank)) for _ in range(2)]
        for one in pending:
            recv = one.wait()
            buffer.combine(recv.x, recv.plan)
        late = buffer.dispatch_start(*inputs_of(decode, connection.rank))
        meet(group)
    with pytest.raises(cd.ConfigError, match="is closed"):
        buffer.dispatch(*inputs_of(decode, connection.rank))
    with contextlib.suppress(cd.CrossdockError):  # whatever it gives, the trace is no reason
        late.wait()


@pytest.mark.worlds("inproc-2", "processes-2")
def test_calls_of_several_specs_are_one_sequence_and_a_closed_connection_writes_no_more(world, tmp_path, capsys):
    world.run(two_specs, str(tmp_path))
    _, events = shown(tmp_path, capsys)
    for rank in range(2):
        verbs = [len(named(events, verb, rank)) for verb in ("Buffer", "dispatch", "combine", "dispatch_start", "wait")]
        assert verbs == [2, 1, 3, 3, 2]
    figures = measure(read(tmp_path))
    assert figures.num_calls == 7
    assert len(figures.expert_rows) == 6
    assert figures.expert_rank == [0, 0, 0, 1, 1, 1]
    assert figures.rank_rows.sum() == 2


def of_two_groups(_group, trace):
    groups = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    rank = torch.distributed.get_rank()
    for num_experts in (4, 6):  # one buffer after the other
        spec = spec_of(2, num_experts=num_experts)
        with open_buffer(groups[rank // 2], spec, trace=trace) as buffer:
            for _ in range(2):
                if rank == 3:
                    time.sleep(LATE_S)
                buffer.dispatch(*inputs_of(spec, rank))


@pytest.mark.worlds("processes-4")
def test_ranks_of_several_groups_have_their_numbers_among_all(world, tmp_path, capsys):
    world.run(of_two_groups, str(tmp_path))
    said, events = shown(tmp_path, capsys)
    assert "Slow rank: 3." in said
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [f"rank {r}" for r in range(4)]
    assert len(named(events, "dispatch", 2)) == 4
    tracks = {event["args"]["name"] for event in named(events, "thread_name", 2)}
    assert {"calls", "waits", "calls of buffer 2", "waits of buffer 2"} <= tracks
    waits = named(events, "for rank 3 to begin dispatch", 2)
    assert sum(wait["dur"] for wait in waits) > 4 * LATE_S * 0.5e6
    figures = measure(read(tmp_path))
    assert figures.expert_rank == [None] * len(figures.expert_rows)
    assert figures.waits[:2, 2:].sum() == 0


def profiled(group, trace):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        steps(group, trace)
    profiler.export_chrome_trace(f"{trace}/profile-{torch.distributed.get_rank()}.json")


@pytest.mark.worlds("processes-2")
def test_a_profile_is_in_its_ranks_process_at_its_time(world, tmp_path, capsys):
    world.run(profiled, str(tmp_path))
    profiles = [f"--profile={rank}={tmp_path}/profile-{rank}.json" for rank in range(2)]
    assert main(["trace", str(tmp_path), *profiles]) == 0
    capsys.readouterr()
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    for rank in range(2):
        sums = named(events, "combine: sums", rank)
        gathers = named(events, "aten::index_select", rank)
        rows = [event for event in events if event["pid"] == rank and event["name"].endswith("rows to peers")]
        assert len(sums) == STEPS
        assert gathers
        for gather in gathers[:5]:
            middle = gather["ts"] + gather["dur"] / 2
            around = [e for e in [*rows, *sums] if e["ts"] - 500 <= middle <= e["ts"] + e["dur"] + 500]
            assert around, gather


PROGRAM = """
import os, sys, time
import torch
import crossdock as cd

def program(group):
    spec = cd.Spec(num_experts=4, num_topk=1, hidden=8, max_tokens=2, wire=cd.Fp32())
    with cd.Buffer(group, spec) as buffer:
        for step in range(3):
            if group.rank == 3:
                time.sleep(0.05)
            buffer.dispatch(torch.ones(2, 8), torch.tensor([[0], [3]]))

cd.run_local(program, num_ranks=4)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_program_that_knows_nothing_of_traces_is_traced(tmp_path, code):
    (tmp_path / "program.py").write_text(PROGRAM)
    folder = tmp_path / "made" / "here"
    command = [sys.executable, "-m", "crossdock", "trace", str(folder), "--", sys.executable]
    for _ in range(2):  # parts of the first time are gone
        done = run_child([*command, str(tmp_path / "program.py"), str(code)])
        assert done.returncode == code, done.stderr
    assert "Slow rank: 3." in done.stdout
    assert len(list(folder.glob("*.jsonl"))) == 4
    page = (folder / "trace.html").read_text(encoding="utf-8")
    own = re.sub(r"<script>/\*.*?</script>", "", page, flags=re.DOTALL)
    assert 'Plotly.newPlot("waits"' in own
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", own)


def cannot_write(group, trace):
    with pytest.raises(cd.ConfigError, match=r"rank 1: trace='.*' cannot be made \(.*\); pass a folder that can"):
        open_buffer(group, spec_of(2), trace=trace[group.rank])
    with open_buffer(group, spec_of(2), trace=trace[0] if group.rank == 0 else None) as buffer:
        buffer.dispatch(*inputs_of(spec_of(2), group.rank))


@pytest.mark.worlds("inproc-2")
def test_a_folder_that_cannot_be_is_told_to_all_and_ranks_may_trace_alone(world, tmp_path, capsys):
    (tmp_path / "file").touch()
    world.run(cannot_write, [str(tmp_path / "ok"), str(tmp_path / "file" / "folder")])
    _, events = shown(tmp_path / "ok", capsys)
    assert {event["pid"] for event in events} == {0}


def steps_over_nodes(group, trace):
    """Steps in which the last rank is late to dispatches, and a failure; results."""
    num_ranks = 4
    spec = spec_of(num_ranks, reduce="node", hidden=256, max_tokens=256)
    results = []
    with open_buffer(group, spec, trace=trace, timeout_s=60) as buffer:
        x, topk_idx = torch.ones(256, 256), inputs_of(spec, buffer.rank)[1].repeat(43, 1)[:256]
        for _ in range(STEPS):
            if buffer.rank == num_ranks - 1:
                time.sleep(2 * LATE_S)
            recv = buffer.dispatch(x + buffer.rank, topk_idx)
            results.append(buffer.combine(recv.x * 2, recv.plan))
        pending = [buffer.dispatch_start(x, recv.plan) for _ in range(2)]
        results += [one.wait().x.clone() for one in pending]
        meet(group)
    return results


def rows_over_nodes(per_node=4):
    """[P, P]: rows that each rank hands to each of its peers in a dispatch of ``steps_over_nodes``, from its picks."""
    spec, want = spec_of(4, hidden=256), torch.zeros(4, 4, dtype=torch.int64)
    for source in range(4):
        node, local = divmod(source, 2)
        for picks in inputs_of(spec, source)[1].repeat(43, 1)[:256].tolist():
            other = 1 - node
            want[source, 2 * other + local] += any(e // per_node == other for e in picks)
            for e in picks:  # by the rank of this local index on the node of the expert
                want[2 * (e // per_node) + local, e // 2] += 1
    return want


@pytest.mark.worlds("grid-2x2", "dist-2x2")
def test_over_nodes_waits_are_charged_to_the_end_of_their_chain_and_hops_are_named(world, tmp_path, capsys):
    box = Box(chunk_bytes=64 * 1024, num_chunks=4)
    rail = InprocEngine(lambda: 0.001, box=box) if world.kind == "inproc" else DistEngine(box=box)
    world = world.opening(rail=rail)
    plain = world.run(steps_over_nodes, None)
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        traced = world.run(steps_over_nodes, str(folder))
        said, events = shown(folder, capsys)
        if "Slow rank: 3. Others waited" in said:
            break
    assert all(
        torch.equal(a, b) for mine, other in zip(traced, plain, strict=True) for a, b in zip(mine, other, strict=True)
    )
    text = " ".join(said.split())
    assert "Slow rank: 3. Others waited" in text, said
    assert "late to dispatches" in text
    assert re.search(r"Its peers missed it \S+ \w+ over scale_up and \S+ \w+ over scale_out", text), said
    assert re.search(r"waits over scale_up +most for +waits over scale_out +most for", said), said
    # Rank 1 may never have to wait for its mate: all that it waits for is behind rank 3.
    assert re.search(r"^ 1 +(\S+ \w+ +rank \d|0) +\S+ \w+ +rank 3 *$", said, re.MULTILINE), said
    assert re.search(r"Slow link over scale_up: .* GB/s", text), said
    assert "Slow link over scale_out: " in text
    figures = measure(read(folder))
    assert figures.waits[0, 3] > 0.5 * STEPS * 2 * LATE_S  # rank 0 does not reach rank 3, and waits for those that do
    assert figures.hops["scale_out"].waited_s[:2, :2].sum() == figures.hops["scale_up"].waited_s[:2, 2:].sum() == 0
    for rank, mate, across in ((0, 1, 2), (1, 0, 3), (2, 3, 0), (3, 2, 1)):
        words = [len(named(events, f"word of rank {peer}", rank)) for peer in (mate, across, 3 - rank)]
        assert words == [2 * STEPS + 2, 2 * STEPS + 2, 0]
        for what in (f"dispatch: rows from rank {across}", f"combine: rows to rank {across}"):
            assert len([e for e in named(events, f"{what} over scale_out", rank) if e["ph"] == "b"]) == STEPS
    waits = named(events, "for rank 3 over scale_out to begin dispatch", 1)
    assert sum(wait["dur"] for wait in waits) > 0.5 * STEPS * 2 * LATE_S * 1e6
    want, parts = rows_over_nodes(), read(folder).parts
    for part in parts:
        first = next(line for line in part.of("call"))
        back = next(line for line in part.of("call") if line["kind"] == "combine")
        assert first["sent"] == back["got"] == want[part.rank].tolist()
        assert first["got"] == back["sent"] == want[:, part.rank].tolist()
        assert any(first["move_ns"])
