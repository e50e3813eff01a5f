"""The benchmark command: what it writes, what it refuses, and how it ends. Nothing here looks at a time."""

import json
import os
import signal
import time

import pytest
import torch

from crossdock import record_load, uniform_load
from crossdock.cli import bench, main
from crossdock.cli.bench import exchange
from crossdock.cli.bench.measure import measure

pytest.importorskip("rich")

TINY = ["bench", "--ranks=2", "--tokens=6", "--hidden=128", "--experts=4", "--topk=2", "--repeats=2"]
OUT, CACHED, PULL, PUSH = "dispatch", "dispatch (cached plan)", "combine (pull)", "combine (push)"
FIELDS = {
    *("op", "ranks", "tokens", "hidden", "experts", "topk", "wire", "layout", "load", "seed", "repeats", "machine"),
    *("median_us", "p10_us", "p90_us", "bytes", "link_bytes", "limit_us", "baseline", "baseline_us"),
}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("layout", ["compact", "expanded", "padded"])
def test_writes_a_line_per_operation(tmp_path, capsys, layout):
    path = tmp_path / "results.jsonl"
    assert main([*TINY, f"--layout={layout}", "--load=zipf", f"--json={path}"]) == 0
    lines, table = lines_of(path), capsys.readouterr().out
    assert [line["op"] for line in lines] == [OUT, CACHED, PULL, PUSH]
    assert all(op in table for op in (OUT, CACHED, PULL, PUSH))
    for line in lines:
        assert set(line) == FIELDS
        assert (line["ranks"], line["tokens"], line["hidden"], line["layout"]) == (2, 6, 128, layout)
        assert 0 < line["p10_us"] <= line["median_us"] <= line["p90_us"]
        assert 0 < line["link_bytes"] < line["bytes"]
        assert set(line["machine"]) == {"cpu", "cores", "memory_gib", "os", "python", "torch", "crossdock"}


def test_fp8_brings_the_wide_wire_beside_it(tmp_path):
    path = tmp_path / "results.jsonl"
    assert main([*TINY, "--wire=fp8", "--baseline=kept", f"--json={path}"]) == 0
    assert [(line["op"], line["wire"]) for line in lines_of(path)] == [
        (OUT, "fp8"),
        ("dispatch (fused cast)", "fp8"),
        (OUT, "bf16"),
        (CACHED, "fp8"),
        (PULL, "bf16"),
        (PUSH, "bf16"),
    ]


def test_counts_bytes_by_hand(tmp_path):
    """Of each rank's two tokens both go to rank 0 and one to rank 1: 4 rows and 2 rows come, half of them from afar."""
    load, path = tmp_path / "load.npy", tmp_path / "results.jsonl"
    record_load(load, torch.tensor([[0, 1], [0, 2]]))
    assert main([*TINY, "--tokens=2", f"--load={load}", f"--json={path}"]) == 0
    row = 128 * 2
    for line in lines_of(path):
        assert (line["bytes"], line["link_bytes"]) in [(4 * row, 2 * row), (2 * row, row)]


def measure_with_a_wrong_bit(member, job):
    """One bit of one row that the baseline brings to the last rank is flipped."""
    send = exchange.GlooExchange.send

    def send_wrong(self, parts, route):
        arrived = send(self, parts, route)
        if member.rank == member.num_ranks - 1:
            arrived.parts[0].view(torch.uint8)[3, 5] ^= 1
        return arrived

    exchange.GlooExchange.send = send_wrong
    return measure(member, job)


def measure_with_a_wrong_sum(member, job):
    """The baseline's sums are off on rank 0."""
    combine = exchange.GlooExchange.combine
    factor = 2 if member.rank == 0 else 1
    exchange.GlooExchange.combine = lambda self, y, route: combine(self, y, route) * factor
    return measure(member, job)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (measure_with_a_wrong_bit, "dispatch, bf16, rank 1: row 3 of "),
        (measure_with_a_wrong_sum, "combine (pull), bf16, rank 0: row 0 of 6 is not the baseline's"),
    ],
)
def test_prints_no_figure_of_a_wrong_row(tmp_path, capsys, monkeypatch, program, message):
    monkeypatch.setattr(bench, "measure", program)
    path = tmp_path / "results.jsonl"
    assert main([*TINY, f"--json={path}"]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert not out
    assert not path.read_text()


def die(member, _job):
    if member.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_rank_that_dies_ends_the_run(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", die)
    assert main(TINY) == 1
    assert "the process of rank 1 was killed by SIGKILL" in capsys.readouterr().err


def interrupt_the_command(member, _job):
    if member.rank == 0:
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


def test_ctrl_c_ends_the_run(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", interrupt_the_command)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert main(TINY) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks=3"], "num_experts=4 is not divisible by num_ranks=3; pass a multiple of 3"),
        (["--topk=5"], "num_topk=5 picks of num_experts=4"),
        (["--hidden=100", "--wire=fp8"], "hidden=100 is not divisible by the scale block 128"),
        (["--repeats=0"], "repeats=0; pass a positive number"),
        (["--load=nowhere.npy"], "load=nowhere.npy cannot be opened"),
        (["--json=nowhere/at/all"], "json=nowhere/at/all cannot be written"),
    ],
)
def test_says_which_argument_is_not_allowed(capsys, arguments, message):
    assert main([*TINY, *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("crossdock bench: error: ")
    assert message in err
    assert not out


def test_names_the_extra_that_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _name: None)
    assert main(TINY) == 1
    assert "pip install 'crossdock[cli]'" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_picks():
    job = bench.make_job(
        bench.Config(
            ranks=2,
            tokens=6,
            hidden=128,
            experts=4,
            topk=2,
            wire="bf16",
            layout="padded",
            load="uniform",
            seed=7,
            repeats=1,
            baseline="fresh",
        )
    )
    expected = uniform_load(12, 4, num_topk=2, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.from_numpy(job.topk_idx), expected)
    assert job.spec.layout.capacity == expected.flatten().bincount().max()
