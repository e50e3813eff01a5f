"""The size command: what it prints, what it writes, what it refuses."""

import errno
import json
import os
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from crossdock import Arena, Spec, Topology, zipf_load
from crossdock.cli import main
from crossdock.cli.size.figures import memory_bytes
from crossdock.cost import uniform_rows
from crossdock.layout import Compact

pytest.importorskip("rich")
pytest.importorskip("plotly")
pytest.importorskip("jinja2")


def test_prints_writes_lines_and_leaves_a_page(tmp_path, capsys):
    np.save(tmp_path / "picks.npy", zipf_load(256, 256, num_topk=8, generator=torch.Generator().manual_seed(0)).numpy())
    files = [f"--json={tmp_path / 'sizes.json'}", f"--page={tmp_path / 'size.html'}"]
    command = ["size", "--ranks=8,64", "--topk-groups=4", f"--load={tmp_path / 'picks.npy'}", *files]
    assert main(command) == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "sizes.json").read_text().splitlines()]
    assert [(line["ranks"], line["picks"]) for line in lines] == [
        (8, "uniform"), (8, "recorded"), (64, "uniform"), (64, "4 of 8 groups"), (64, "recorded"),
    ]  # fmt: skip
    uniform, limited = lines[2:4]
    assert limited["dispatch"]["us"] < 0.8 * uniform["dispatch"]["us"]  # what a group-limited gate is for
    assert lines[4]["skew_up"] > 1.2
    for line in lines:
        assert line["dispatch"]["bottleneck"] == ("NIC" if line["nodes"] > 1 else "NVLink")
        assert f"{line['dispatch']['us']:,.0f} us {line['dispatch']['bottleneck']}" in said
    page = (tmp_path / "size.html").read_text(encoding="utf-8")
    own = re.sub(r"<script>/\*.*?</script>", "", page, flags=re.DOTALL)
    assert all(f'Plotly.newPlot("{name}"' in own for name in ("time", "hops"))
    assert "4 of 8 groups" in own
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", own)


def test_memory_is_that_of_the_arena():
    spec, topology = Spec(num_experts=8, num_topk=2, hidden=64, max_tokens=16), Topology(num_ranks=4)
    rows = uniform_rows(spec, topology)
    capacity = round(2 * 16 * rows.ranks)
    held = Spec(num_experts=8, num_topk=2, hidden=64, max_tokens=16, layout=Compact(capacity=capacity))
    assert memory_bytes(spec, topology, rows, room=2) == Arena(held, topology).num_bytes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ranks=48"], "num_experts=256 is not divisible by num_ranks=48"),
        (["--ranks=12"], "num_ranks=12 is not divisible by scale_up=8"),
        (["--groups=8"], "groups=8 limits nothing alone; pass --topk-groups"),
        (["--room=0.5"], "room for the mean load at least"),
        (["--ranks=16", "--topk-groups=1", "--topk=8", "--experts=16", "--groups=4"], "num_topk=8"),
        (["--nic=0"], "nic_bandwidth=0"),
        (["--room=nan"], "room for the mean load at least"),
        (["--link=inf"], "link_bandwidth=inf bytes per second; pass a positive, finite number"),
        (["--json=/nowhere/x"], "json=/nowhere/x cannot be written"),
    ],
)
def test_what_cannot_be_is_refused(capsys, args, message):
    assert main(["size", *args]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_list_of_numbers_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["size", "--ranks=8,"])
    assert "'8,' is no list of numbers; pass such as 2,4,8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (MemoryError(), "there is not enough memory; pass smaller numbers"),
    ],
)
def test_what_the_machine_lacks_is_a_line_and_no_traceback(capsys, monkeypatch, error, says):
    monkeypatch.setattr("crossdock.cli.size.answer", mock.Mock(side_effect=error))
    assert main(["size"]) == 1
    assert capsys.readouterr().err.startswith("crossdock size: error: ")
    assert main(["size"]) == 1
    assert says in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", "crossdock", "size"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_narrow_terminal_cuts_no_figure(monkeypatch, capsys):
    monkeypatch.setattr("crossdock.cli.size.report._WIDTH", 40)
    assert main(["size", "--ranks=16"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 40
    assert re.search(r"^dispatch +720 us NIC$", said, re.MULTILINE)
    assert "…" not in said
