"""The benchmark command: what it writes, what it refuses, and how it ends. Nothing here looks at a time."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from crossdock import record_load, uniform_load
from crossdock.cli import bench, main, options, world
from crossdock.cli.bench import cuda_cases, exchange
from crossdock.cli.bench.figures import figures, limits_of
from crossdock.cli.bench.measure import WrongRows, check_bits, measure
from crossdock.cli.bench.outcome import Outcome
from crossdock.cli.bench.samples import Moved, OnGpu, RankSamples, Sample
from crossdock.cli.machine import Gpu, this_machine
from crossdock.cli.mps import Sharing
from crossdock.cli.world import run_world
from tests.world import context_of_forks

report = pytest.importorskip("crossdock.cli.bench.report")

TINY = ["bench", "--device=cpu", "--ranks=2", "--tokens=6", "--hidden=128", "--experts=4", "--topk=2", "--repeats=2"]
OUT, CACHED, PULL, PUSH = "dispatch", "dispatch (cached plan)", "combine (pull)", "combine (push)"
FIELDS = {
    *("op", "ranks", "tokens", "hidden", "experts", "topk", "wire", "layout", "load", "seed", "repeats", "machine"),
    *("device", "reduce", "alignment", "num_sms", "expand", "mover", "mps_percentage", "sweep_sms", "calls"),
    *("median_us", "p10_us", "p90_us", "bytes", "link_bytes", "limit_us", "floor_us", "baseline", "baseline_us"),
    *("trip_us", "copy_gb_s", "write_gb_s", "store_gb_s", "load_gb_s", "times_dispatch", "gpu", "sharing"),
    *("is_link", "host_us"),
}


@pytest.fixture
def forks(monkeypatch):
    """Ranks of the command are forks, as they are in worlds: each saves the seconds of importing torch."""
    context = context_of_forks()
    monkeypatch.setattr(world.multiprocessing, "get_context", lambda _: context)


with_forks = pytest.mark.usefixtures("forks")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("layout", ["compact", "expanded", "padded"])
def test_writes_a_line_per_operation(tmp_path, capsys, request, layout):
    if layout != "compact":  # that one's ranks are processes as users have them
        request.getfixturevalue("forks")
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
        assert set(line["machine"]) == {"cpu", "cores", "memory_gib", "os", "python", "torch", "crossdock", "gpu"}


@with_forks
def test_fp8_brings_the_unquantized_wire_beside_it(tmp_path):
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


@with_forks
@pytest.mark.parametrize(("wire", "row_bytes"), [("nvfp4", 128 // 2 + 8), ("mxfp8", 128 + 4)])
def test_opaque_rows_travel_as_they_are_and_outputs_come_home_in_their_own_format(tmp_path, wire, row_bytes):
    path = tmp_path / "results.jsonl"
    assert main([*TINY, f"--wire={wire}", "--layout=padded", f"--json={path}"]) == 0
    lines = lines_of(path)
    assert [(line["op"], line["wire"]) for line in lines] == [
        (OUT, wire),
        (CACHED, wire),
        (PULL, "bf16"),
        (PUSH, "bf16"),
    ]
    assert all(line["bytes"] % row_bytes == 0 for line in lines[:2])


@with_forks
def test_counts_bytes_by_hand(tmp_path):
    """Of each rank's two tokens both go to rank 0 and one to rank 1: 4 rows and 2 rows come, half of them from afar."""
    load, path = tmp_path / "load.npy", tmp_path / "results.jsonl"
    record_load(load, torch.tensor([[0, 1], [0, 2]]))
    assert main([*TINY, "--tokens=2", f"--load={load}", f"--json={path}"]) == 0
    row = 128 * 2
    for line in lines_of(path):
        assert (line["bytes"], line["link_bytes"]) in [(4 * row, 2 * row), (2 * row, row)]


@with_forks
@pytest.mark.parametrize("layout", ["compact", "expanded", "padded"])
def test_ranks_that_sum_first_are_compared_too(tmp_path, layout):
    """The baseline makes their sums; each is rounded before it goes home, so others would have other bits."""
    path = tmp_path / "results.jsonl"
    assert main([*TINY, "--experts=16", "--topk=8", "--reduce=rank", f"--layout={layout}", f"--json={path}"]) == 0
    homes = [PULL, PUSH] if layout == "compact" else [PUSH]
    lines = {line["op"]: line for line in lines_of(path)}
    assert list(lines) == [OUT, CACHED, *homes]
    assert (lines[PUSH]["bytes"] < lines[OUT]["bytes"]) == (layout != "compact")  # a sum goes home, not every pick


@with_forks
def test_aligned_segments_are_compared_too(tmp_path):
    path = tmp_path / "results.jsonl"
    assert main([*TINY, "--layout=expanded", "--alignment=16", "--wire=fp8", f"--json={path}"]) == 0
    assert all(line["alignment"] == 16 for line in lines_of(path))


def measure_with_a_wrong_bit(member, job):
    """One bit of one row that the baseline brings to the last rank is flipped."""
    send = exchange.AllToAll.send

    def send_wrong(self, parts, route):
        arrived = send(self, parts, route)
        if member.rank == member.num_ranks - 1:
            arrived.parts[0].view(torch.uint8)[3, 5] ^= 1
        return arrived

    exchange.AllToAll.send = send_wrong
    return measure(member, job)


def measure_with_a_wrong_sum(member, job):
    """The baseline's sums are off on rank 0."""
    combine = exchange.AllToAll.combine
    factor = 2 if member.rank == 0 else 1
    exchange.AllToAll.combine = lambda self, y, route: combine(self, y, route) * factor
    return measure(member, job)


@with_forks
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


@with_forks
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
        (["--alignment=8"], "alignment=8 with layout=compact; only expanded rows are aligned"),
        (["--num-sms=8"], "num_sms=8 is for GPUs, and this runs on CPUs; leave it out"),
        (["--sweep-sms=2,4"], "sweep_sms=(2, 4) is for GPUs"),
        (["--plot=chart.html"], "plot=chart.html shows a sweep; pass --sweep-sms"),
        (["--device=cuda", "--baseline=kept"], "baseline=kept on CUDA"),
        (["--rate=1gbit"], "--rate 1gbit is of hosts; pass --hosts with it"),
    ],
)
def test_says_which_argument_is_not_allowed(capsys, arguments, message):
    assert main([*TINY, *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("crossdock bench: error: ")
    assert message in err
    assert not out


def test_names_the_extra_that_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda _name: None)
    assert main(TINY) == 1
    assert "pip install 'crossdock[cli]'" in capsys.readouterr().err


CONFIG = bench.Config(
    ranks=2,
    tokens=6,
    hidden=128,
    experts=8,
    topk=4,
    wire="bf16",
    layout="compact",
    load="uniform",
    seed=7,
    repeats=1,
    baseline="fresh",
)


def check_cuda_cases(member, jobs):
    """What a rank on a GPU compares before it measures, on CPUs: the operations of each job, and wrong results."""
    operations, wrong = [], []
    for job in jobs:
        with cuda_cases.open_cuda_cases(member, job) as (cases, _, _):
            for case in cases:
                try:
                    check_bits(cuda_cases.result_bits(case.ready()(), case.spec), case.wanted, what=case.op)
                except WrongRows as error:
                    wrong.append((str(job.spec), str(error)))
        operations.append([(case.op, case.wire, case.in_graph) for case in cases])
    return operations, wrong


@with_forks
def test_what_gpus_are_compared_with_is_what_cpus_give():
    configs = [
        replace(CONFIG, reduce=reduce, layout=layout, alignment=alignment, wire=wire)
        for reduce in ("token", "rank")
        for layout, alignment in (("compact", 1), ("expanded", 4), ("padded", 1))
        for wire in ("bf16", "fp8", "nvfp4")
    ]
    jobs = [bench.make_job(config) for config in configs]
    expected = [
        [
            ("dispatch (cached plan, graph)", config.wire, True),
            *[("dispatch (fused cast, graph)", "fp8", True)] * (config.wire == "fp8"),
            *[("dispatch (cached plan, graph)", "bf16", True)] * (config.wire == "fp8"),
            *[("dispatch (from picks, graph)", config.wire, True)] * (config.layout == "padded"),
            ("dispatch (eager)" if config.layout == "padded" else "dispatch (eager, host sync)", config.wire, False),
            *[("combine (pull)", "bf16", True)] * (config.reduce == "token" or config.layout == "compact"),
            ("combine (push)", "bf16", True),
            *[("training step", config.wire, False)] * (config.wire != "nvfp4"),
            *[("combine (pull, weighted)", "bf16", True)] * (config.layout == "padded" and config.reduce == "token"),
        ]
        for config in configs
    ]
    for operations, wrong in run_world(check_cuda_cases, jobs, num_ranks=2, on_progress=lambda *_: None):
        assert not wrong
        assert operations == expected


def outcome_on_gpus(kind="mps"):
    """Of two ranks, one of which is twice as slow; figures are round, and not measured."""

    def sample(op, num_sms, factor, **limited):
        return Sample(
            op=op,
            wire="bf16",
            num_bytes=10**6,
            link_bytes=5 * 10**5,
            ours_s=[1e-6 * factor, 2e-6 * factor, 3e-6 * factor],
            baseline_s=[],
            calls=10,
            num_sms=num_sms,
            **limited,
        )

    def rank(factor):
        dispatch = {"copy_bytes": 0, "write_bytes": 10**6}
        return RankSamples(
            samples=[
                sample(cuda_cases.CACHED, 16, factor, **dispatch),
                sample(cuda_cases.PULL, 16, 2 * factor, copy_bytes=2 * 10**6),
                sample(cuda_cases.STEP, 16, 5 * factor, copy_bytes=4 * 10**6, write_bytes=2 * 10**6),
            ],
            copies=[Moved(num_bytes=10**6, seconds=[1e-6]), Moved(num_bytes=10**6, seconds=[0.5e-6])],
            writes=[Moved(num_bytes=10**6, seconds=[1e-6])],
            sweep=[
                sample(op, num_sms, factor * 16 / num_sms, **limited)
                for num_sms in (8, 16)
                for op, limited in ((cuda_cases.CACHED, dispatch), (cuda_cases.PULL, {"copy_bytes": 2 * 10**6}))
            ],
            trips_s=[1e-6 * factor],
            gpu=OnGpu(visible_sms=66, launch="LaunchConfig(num_sms=16)", destinations=2),
        )

    ranks = [rank(1), rank(2)]
    gpu = Gpu(name="NVIDIA H200", count=1, memory_gib=140.0, driver="580.1", cuda="13.0", triton="3.6.0")
    return Outcome(
        config=replace(CONFIG, device="cuda", sweep_sms=(8, 16)),
        figures=figures([rank.samples for rank in ranks], limits_of(ranks)),
        sweep=figures([rank.sweep for rank in ranks], limits_of(ranks)),
        limits=limits_of(ranks),
        machine=replace(this_machine(), gpu=gpu),
        gpu=ranks[0].gpu,
        sharing=Sharing(kind=kind, num_ranks=2, num_gpus=1, percentage=50 if kind == "mps" else None),
    )


def test_figures_of_gpus_by_hand():
    """Both ranks write 2 MB in all, at 2 TB/s; they copy at 4 TB/s, which is the faster of two ways."""
    lines = [json.loads(line) for line in outcome_on_gpus().json_lines()]
    assert [line["op"] for line in lines] == [cuda_cases.CACHED, cuda_cases.PULL, cuda_cases.STEP, "sweep", "sweep"]
    dispatch, combine, step, *sweep = lines
    assert (dispatch["write_gb_s"], dispatch["copy_gb_s"]) == pytest.approx((2000, 4000))
    assert (dispatch["median_us"], combine["median_us"], step["median_us"]) == pytest.approx((4, 8, 20))
    assert [line["limit_us"] for line in (dispatch, combine, step)] == pytest.approx([1, 1, 4])
    assert [line["floor_us"] for line in (dispatch, combine, step)] == pytest.approx([5, 5, 8])
    assert dispatch["trip_us"] == pytest.approx(2)
    assert [line["times_dispatch"] for line in (dispatch, combine, step)] == [None, None, pytest.approx(5)]
    assert [(line["num_sms"], line["dispatch"]["median_us"]) for line in sweep] == [(8, pytest.approx(8)), (16, 4)]
    assert all(line["baseline"] is line["baseline_us"] is None for line in (dispatch, combine, step))
    assert (step["sharing"]["kind"], step["gpu"]["visible_sms"], step["machine"]["gpu"]["triton"]) == (
        "mps",
        66,
        "3.6.0",
    )


def test_the_limit_between_gpus_is_the_tighter_of_memory_and_link(capsys):
    """Links of 0.25 TB/s each way bring 0.5 MB in 2 us, where memory takes 1; a step's 0.5 MB too, where it takes 4."""
    outcome = outcome_on_gpus()
    slow, fast = ([Moved(num_bytes=10**6, seconds=[seconds])] for seconds in (8e-6, 4e-6))
    ranks = [
        RankSamples(samples=[], copies=slow, writes=slow, stores=slow, loads=fast),
        RankSamples(samples=[], copies=slow, writes=slow, stores=fast, loads=slow),
    ]
    found = limits_of(ranks)
    assert (found.store, found.load, found.link) == pytest.approx((0.125e12, 0.125e12, 0.125e12))
    sample = Sample(
        op=cuda_cases.CACHED, wire="bf16", num_bytes=10**6, link_bytes=5 * 10**5, copy_bytes=0, write_bytes=10**6,
        ours_s=[4e-6], baseline_s=[], num_sms=16, host_s=[3e-6, 2e-6, 1e-6],
    )  # fmt: skip
    limits = replace(outcome.limits, store=0.25e12, load=0.2e12)
    (by_link,) = figures([[sample], [replace(sample, host_s=[9e-6])]], limits)
    (by_memory,) = figures([[replace(sample, link_bytes=10)], [sample]], replace(limits, store=5e12))
    assert (by_link.is_link, by_link.limit_us, by_link.host_us) == (True, pytest.approx(2), pytest.approx(9))
    assert (by_memory.is_link, by_memory.limit_us) == (False, pytest.approx(1))
    report.print_outcome(replace(outcome, figures=[by_link], limits=limits))
    table = capsys.readouterr().out
    assert "50% (link)" in table
    assert "9.0 us" in table
    assert "stores 250 GB/s" in table
    (line, *_) = replace(outcome, figures=[by_link], limits=limits).json_lines()
    assert (json.loads(line)["store_gb_s"], json.loads(line)["load_gb_s"]) == (250, 200)


def test_a_table_with_much_in_it_says_the_wire_of_each_row(capsys):
    outcome = outcome_on_gpus()
    wide = replace(outcome.figures[0], median_us=42.4, p10_us=41.7, p90_us=43.5, floor_us=24.8, bytes=52 * 10**6)
    figures = [replace(wide, op=op) for op in (cuda_cases.CACHED, cuda_cases.WEIGHTED, cuda_cases.FRESH)]
    report.print_outcome(replace(outcome, figures=figures, sweep=[]))
    table = capsys.readouterr().out
    assert all(f"{figure.op} " in table for figure in figures)
    assert table.count(" bf16 ") == 3
    assert table.count("41.7 – 43.5 us") == 3
    assert table.count("1,226.42") == 3


def test_the_table_says_what_a_gpus_figures_stand_on(capsys):
    report.print_outcome(outcome_on_gpus())
    table = capsys.readouterr().out
    assert "SMs" in table
    assert "vs " not in table
    assert "By the number of SMs" in table
    for said in (
        "takes 5.0 × a dispatch on a cached plan",
        "NCCL refuses that",
        "two one-way trips of a word, 2.0 us each",
        "each sees 66 SMs",
        "NVIDIA H200, 140",
    ):
        assert said in table
    assert "NOT A MEASUREMENT" not in table


def test_times_without_mps_are_no_measurement(capsys):
    report.print_outcome(outcome_on_gpus("turns"))
    assert "NOT A MEASUREMENT OF SPEED: MPS is not there" in capsys.readouterr().out


def test_a_sweep_is_drawn():
    page = pytest.importorskip("crossdock.cli.bench.chart").sweep_page(outcome_on_gpus())
    for said in ("dispatch, written", "its limit, 2,000", "combine, read + written", "its limit, 4,000", "NVIDIA H200"):
        assert said in page


def test_the_write_limit_compiles_for_a_gpu():
    triton = pytest.importorskip("triton")
    kernel = pytest.importorskip("crossdock.cli.bench.write_rows").write_rows
    signature = {"rows": "*i64", "copies": "*i64", "num_rows": "i32"}
    constants = {"NUM_COPIES": 5, "WORDS": 1792, "BLOCK": 2048}
    source = triton.compiler.ASTSource(
        kernel,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": 16}).asm["ptx"]
    assert ptx.count("st.global.v2.b64") == 2 * 5  # four values a thread, to five places: the widest stores there are
    assert ptx.count("ld.global.v2.b64") == 2


def test_the_same_seed_gives_the_same_picks():
    job = bench.make_job(replace(CONFIG, experts=4, topk=2, layout="padded"))
    expected = uniform_load(12, 4, num_topk=2, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.from_numpy(job.topk_idx), expected)
    assert job.spec.layout.capacity == expected.flatten().bincount().max()
