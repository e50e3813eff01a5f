"""bench and demo over hosts that are network namespaces: bytes on the link, the gate's groups, what is refused."""

import json
import re

import pytest
import torch

from crossdock import Compact, Expanded, Fp8, Spec, Topology
from crossdock.cli import hosts, main
from crossdock.cli.bench.over_hosts import rail_row_bytes, rail_rows
from crossdock.cli.hosts import network
from tests.timeline import check_nesting

pytest.importorskip("rich")
pytest.importorskip("plotly")
pytest.importorskip("jinja2")
_PROBLEM = hosts.problem()
needs_hosts = pytest.mark.skipif(_PROBLEM is not None, reason=str(_PROBLEM))


@needs_hosts
def test_bench_sends_the_least_bytes_and_fewer_with_groups(tmp_path, capsys):
    """Rows and sums are compared with gloo's first; a wrong one would end the command."""
    command = ["bench", "--hosts=2x2", "--tokens=64", "--hidden=1024", "--experts=16", "--topk=4", "--topk-groups=1"]
    assert main([*command, "--wire=nvfp4", "--repeats=1", f"--json={tmp_path / 'lines'}"]) == 0
    said = capsys.readouterr().out
    assert "2x2 ranks at 200mbit, 64 tokens each" in said
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    kinds = [(line["picks"], line["op"]) for line in lines]
    assert kinds == [(picks, op) for picks in ("uniform", "1 of 2 groups") for op in ("dispatch", "combine")]
    for line in lines:
        # Ethernet, IP and TCP have 66 of 1514 bytes; notes, acknowledgements and gloo's words are small.
        assert line["bound_bytes"] < line["link_bytes"] < 1.12 * line["bound_bytes"] + 3000
        assert min(line["tcp_ms"], line["flat_ms"], line["median_ms"], line["predicted_ms"]) > 0
    assert lines[2]["link_bytes"] < 0.75 * lines[0]["link_bytes"]  # half of the rows stay on a host, for a group


@needs_hosts
def test_demo_trains_over_hosts(tmp_path, capsys):
    """Its losses and its text are compared with one process's; a difference would end the command."""
    assert main(["demo", "--hosts=2x1", "--rate=1gbit", "--steps=2", f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "2 processes on hosts 2x1, 3 layers of 32 experts, top-4 from 2 of 2 groups" in said
    assert "generated sequences are those of the one process" in said
    assert re.search(r"2x1 ranks at 1gbit, 1024 tokens each", said)
    assert "on hosts 2x1" in (tmp_path / "report.html").read_text(encoding="utf-8")
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    check_nesting(events)
    for rank in range(2):
        names = [event["name"] for event in events if event["pid"] == rank]
        assert names.count("step") == 2
        assert f"word of rank {1 - rank}" in names
        assert any(name.startswith(f"dispatch: rows to rank {1 - rank} over scale_out") for name in names)


@pytest.mark.parametrize(("layout", "going"), [(Compact(), 8 + 4 + 20 + 16), (Expanded(), 8 + 4 + 4 + 16)], ids=repr)
def test_rows_over_the_rail_are_counted_once_per_host(layout, going):
    """Values and a scale of FP8, source, picks if a row has several, and places."""
    spec = Spec(
        num_experts=8, num_topk=4, hidden=8, max_tokens=2, layout=layout, wire=Fp8(block=8), reduce="node"
    )  # fmt: skip
    grid = Topology.grid(nodes=2, local=2)
    picks = torch.tensor([[[0, 1, 4, 5], [0, 1, 2, 3]], [[4, 5, 6, 7], [-1, -1, -1, 7]], [[0, 4, -1, 2], [4, 5, 6, 7]],
                          [[-1, -1, -1, -1], [3, 2, 1, 0]]])  # fmt: skip
    assert rail_rows(picks, spec, grid).tolist() == [[0, 1], [0, 2], [1, 0], [1, 0]]
    assert rail_row_bytes(spec, grid) == (going, 16)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hosts=1x4"], "one host has no network; pass two at least"),
        (["--hosts=two"], "hosts='two'; pass hosts (1 to 64) and ranks on each, such as 2x4"),
        (["--hosts=2x2", "--rate=fast"], "rate='fast'; pass a number with kbit, mbit or gbit"),
        (["--hosts=2x2", "--experts=6"], "num_experts=6 is not divisible by num_ranks=4"),
        (["--hosts=2x2", "--repeats=0"], "repeats=0; pass a positive number"),
        (["--hosts=2x2", "--ranks=3"], "--ranks 3 with --hosts, where it means nothing; leave it out"),
        (["--hosts=2x2", "--device=cuda"], "--device cuda with --hosts, where it means nothing; leave it out"),
    ],
)
def test_what_cannot_be_is_refused(capsys, args, message):
    assert main(["bench", *args, "--topk=2"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["bench", "--topk=2"], ["demo", "--steps=1"]])
def test_says_what_hosts_are_missing(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(network.shutil, "which", lambda name: None if name == "tc" else f"/sbin/{name}")
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--hosts=2x2"]) == 1
    assert "tc cannot be found; apt-get install iproute2" in capsys.readouterr().err
