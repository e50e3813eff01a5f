"""The demo command, run for real with few steps: what it prints, what it writes, what it refuses. Nothing is timed."""

import json
import os
import re
import signal
import sys
import time
from dataclasses import replace

import pytest

from crossdock.cli import demo, main, options
from crossdock.cli.demo.estimate import STAGES
from tests.child import run_child
from tests.timeline import check_nesting

pytest.importorskip("rich")
pytest.importorskip("plotly")
pytest.importorskip("jinja2")

RANKS, STEPS = 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "made" / "by the demo"


@pytest.fixture(scope="module")
def ran(folder):
    command = [
        sys.executable,
        "-m",
        "crossdock",
        "demo",
        "--device=cpu",
        f"--ranks={RANKS}",
        f"--steps={STEPS}",
        f"--out={folder}",
    ]
    return run_child(command)


def test_says_what_it_did(ran, folder):
    assert ran.returncode == 0, ran.stderr
    assert "2 processes, 3 layers of 32 experts, top-4 from 2 of 2 groups" in ran.stdout
    assert "generated sequences are those of the one process" in ran.stdout
    assert "def main(" in ran.stdout
    for name in ("report.html", "trace.json"):
        assert str(folder / name) in ran.stdout


def test_compares_every_step_that_it_made(ran):
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.e+-]+) *$", ran.stdout, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2, 3]
    for _, ours, plain, difference in rows:
        assert float(ours) == pytest.approx(float(plain), rel=1e-5)
        assert float(difference) <= 1e-5


def test_shows_progress_from_the_first_stage_and_no_noise(ran):
    lines = ran.stderr.splitlines()
    steps = [f"step {step} of {STEPS}" for step in (1, 2, 3)]
    begun = list(STAGES)
    assert [re.split("[:;]", line)[0] for line in lines] == [*begun[:3], *steps, *begun[3:]]
    assert all(re.search(r"; about [0-9 min]+ s left$", line) for line in lines)
    assert sum("tokens/s" in line and "% in dispatch and combine" in line for line in lines) == STEPS


@pytest.mark.usefixtures("ran")
def test_the_page_stands_alone(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    own = re.sub(r"<script>/\*.*?</script>", "", page, flags=re.DOTALL)  # without plotly itself
    assert len(own) < len(page) / 4
    for name in ("loss", "load", "traffic", "time"):
        assert f'<div class="chart" id="{name}"></div>' in own
        assert f'Plotly.newPlot("{name}"' in own
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", own)
    assert not re.search(r"@import|url\(|<link(?! rel=\"icon\" href=\"data:)", own)
    assert 'name="viewport"' in own


@pytest.mark.usefixtures("ran")
def test_the_trace_shows_all_ranks_and_its_spans_nest(folder):
    trace = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    events = trace["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["rank 0", "rank 1"]
    for rank in range(RANKS):
        names = [event["name"] for event in events if event["ph"] == "X" and event["pid"] == rank]
        assert [names.count(name) for name in ("step", "forward", "backward", "all-reduce", "optimizer")] == [STEPS] * 5
        assert names.count("dispatch") == names.count("combine") == STEPS * 3 * 2  # each layer, forward and backward
    check_nesting(events)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks=3"], "ranks=3 does not divide the 32 experts of a block; pass 1, 2, 4, 8, 16 or 32"),
        (["--ranks=0"], "ranks=0 does not divide"),
        (["--steps=0"], "steps=0; pass a positive number"),
        (["--seed=-1"], "seed=-1 is not within"),
        (["--rate=1gbit"], "--rate 1gbit is of hosts; pass --hosts with it"),
    ],
)
def test_says_which_argument_is_not_allowed(tmp_path, capsys, arguments, message):
    assert main(["demo", "--device=cpu", f"--out={tmp_path / 'out'}", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("crossdock demo: error: ")
    assert message in err
    assert not out
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_starts(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(demo, "run_world", None)
    assert main(["demo", "--device=cpu", f"--out={tmp_path / 'file' / 'folder'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_names_the_extra_that_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None if name == "plotly" else name)
    monkeypatch.setattr(demo, "run_world", None)
    assert main(["demo"]) == 1
    assert "the demo needs plotly, not installed here; pip install 'crossdock[cli]'" in capsys.readouterr().err


def die(member, _job):
    if member.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_rank_that_dies_ends_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run_rank", die)
    assert main(["demo", "--device=cpu", "--ranks=2", f"--out={tmp_path}"]) == 1
    assert "the process of rank 1 was killed by SIGKILL" in capsys.readouterr().err


def interrupt_the_command(member, _job):
    if member.rank == 0:
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


def test_ctrl_c_ends_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run_rank", interrupt_the_command)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert main(["demo", "--device=cpu", "--ranks=2", f"--out={tmp_path}"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err


def test_on_gpus_its_calls_are_timed_as_bench_does(capsys):
    config = demo.bench_config(demo.make_shape(2), demo.make_recipe(1, 0), num_ranks=2, device="cpu")
    assert (config.tokens, config.hidden, config.experts, config.topk) == (1024, 128, 32, 4)
    demo.print_bench(replace(config, tokens=16, repeats=2))
    said = capsys.readouterr().out
    assert "as crossdock bench times them" in said
    assert re.search(r"dispatch .*\n(.*\n)*.*combine", said)
