"""The programs in ``benchmarks`` run as they are, on CPUs. Nothing here looks at a time."""

import importlib
import json
import sys

import pytest

from benchmarks import parts, peers
from tests.child import run_child
from tests.house.pages import ROOT

MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")


def test_peers_are_compared_on_one_recipe(tmp_path):
    path = tmp_path / "peers.jsonl"
    small = ["--ranks=2", "--tokens=4", "--hidden=128", "--experts=4", "--topk=2", "--wires=bf16", "--repeats=1"]
    script = [sys.executable, "-m", "benchmarks.peers", "--device=cpu", *small, f"--out={path}"]
    done = run_child([*script, "--layouts=compact", "--peers", "crossdock", "gloo", "nccl"], cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["row"]["op"] for line in lines if line["peer"] == "crossdock"} == {*peers.OPS} - {
        peers.OPS[2],
        peers.OPS[6],
    }
    for line in lines:
        assert not line["row"]["is_wrong"]
        assert line["row"]["why"] == "needs GPUs" if line["peer"] == "nccl" else line["row"]["eager_us"]["median"] > 0


def a_part(name, code, *, limit_s=60.0):
    return parts.Part(name=name, command=(sys.executable, "-c", code), limit_s=limit_s)


def test_parts_that_are_done_are_not_done_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts, "_commit", lambda: "abc")
    both = [a_part("good", "print('here')"), a_part("bad", "import sys; print('why'); sys.exit(3)")]
    assert parts.play(both, tmp_path, until_s=1e9) == ["good: done", "bad: failed (exit status 3)"]
    assert (tmp_path / "good.log").read_text() == "here\n"
    both[0] = a_part("good", "raise RuntimeError")  # not looked at any more
    both[1] = a_part("bad", "print('now')")
    assert parts.play(both, tmp_path, until_s=1e9) == ["good: done before", "bad: done"]
    assert "why" in capsys.readouterr().out
    monkeypatch.setattr(parts, "_commit", lambda: "another")
    assert parts.play([a_part("good", "print('anew')")], tmp_path, until_s=1e9) == ["good: done"]


def test_a_part_ends_in_time_and_what_has_no_time_left_is_not_begun(tmp_path):
    slow = a_part("slow", "import time; print('begun', flush=True); time.sleep(100)", limit_s=5.0)
    assert parts.play([slow], tmp_path, until_s=1e9) == ["slow: ended after 5 s"]
    assert (tmp_path / "slow.log").read_text() == "begun\n"
    assert parts.play([slow], tmp_path, until_s=0) == ["slow: not begun, no time is left"]


def test_all_that_is_to_be_measured_is_a_command_that_exists():
    for num_gpus, num_ranks in ((1, 2), (2, 2), (8, 8)):
        chosen = parts.parts_of(num_gpus, num_ranks, "here")
        assert len({part.name for part in chosen}) == len(chosen) > 10
        for part in chosen:
            assert part.limit_s <= 570
            words = part.command
            if words[1:3] == ("-m", "crossdock"):
                from crossdock.cli import _parser  # noqa: PLC0415 - it is what the command asks

                _parser().parse_args(words[3:])
            elif words[1:3] == ("-m", "benchmarks.peers"):
                peers._parser().parse_args(words[3:])
            else:
                assert (ROOT / words[0]).is_file()
