"""``crossdock demo``: trains a small Mixture-of-Experts model among processes of this host, and shows what happened."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from crossdock._env import num_cores
from crossdock.cli.bench.config import Config
from crossdock.cli.bench.config import make_job as make_bench_job
from crossdock.cli.bench.over_hosts import HostsConfig
from crossdock.cli.demo import estimate
from crossdock.cli.demo.generate import prompts_of
from crossdock.cli.demo.model import Shape
from crossdock.cli.demo.outcome import Outcome, Sample
from crossdock.cli.demo.parameters import whole
from crossdock.cli.demo.rank import Job, run_rank
from crossdock.cli.demo.replay import compare_losses, compare_written, replay
from crossdock.cli.demo.text import Text, as_text, standard_library
from crossdock.cli.demo.train import Recipe
from crossdock.cli.demo.watch import steps_to_show
from crossdock.cli.device import add_device_option, choose_device, gpus_for
from crossdock.cli.hosts import parse_grid, run_hosts
from crossdock.cli.machine import this_machine
from crossdock.cli.options import HelpFormatter, check_extras, check_left_out, keep_defaults
from crossdock.cli.trace import write_timeline
from crossdock.cli.trace.parts import read
from crossdock.cli.world import run_world
from crossdock.errors import ConfigError

_EXPERTS = Shape().num_experts
_GROUPS_PER_TOKEN = 2
_REPLAYED = 10
"""Steps that one process repeats."""
_SEEDS = 2**31
_BENCH_REPEATS = 10
_FILES = ("report.html", "trace.json")
"""What is left behind."""
_SEQUENCES = 8
"""Sequences that each rank writes."""
_OPENINGS = (b"def main(argv):\n    ", b"class Reader:\n    def ", b"    raise ValueError(")
_PROMPT_BYTES = 16
_WRITTEN_BYTES = 96
"""Up to there each sequence is completed."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``demo`` to the commands."""
    parser = commands.add_parser(
        "demo",
        help="train a small Mixture-of-Experts model on this machine, and see what happened",
        description="Trains a small byte-level language model on the source of Python's standard library, its experts "
        "spread over processes of this host; repeats the first steps in one process and compares; writes some text; "
        "and leaves a page with the loss, the experts' load, the traffic and where the time went.",
        formatter_class=HelpFormatter,
    )
    add_device_option(parser)
    parser.add_argument("--ranks", type=int, default=4, help="processes to start, a divisor of the experts")
    parser.add_argument(
        "--hosts", default=None, metavar="NxU", help="hosts and ranks on each, such as 2x2: network namespaces of this "
        "machine, in place of --ranks; needs root and iproute2",
    )  # fmt: skip
    parser.add_argument("--rate", default="200mbit", help="of each host's link, each way, as tc writes it")
    parser.add_argument("--steps", type=int, default=220, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
    parser.add_argument("--out", type=Path, default=Path("crossdock-demo"), metavar="FOLDER", help="for the files")
    keep_defaults(parser, run)


def run(args: argparse.Namespace) -> None:
    """Trains, compares, writes the files, and prints what came of it.

    Raises:
        ConfigError: an argument is not allowed, or this Python came without its source.
        BackendUnavailable: rich, plotly or jinja2 is not installed, or there is no GPU.
        CrossdockError: a rank failed, or it came to another result than one process.
    """
    check_extras("the demo")
    from crossdock.cli.demo import page, screen  # noqa: PLC0415 - they import rich, plotly and jinja2, which are extras

    if args.hosts is None:
        check_left_out(args, ("rate",), "is of hosts; pass --hosts with it, such as --hosts 2x2")
    else:
        check_left_out(
            args, ("ranks", "device"), "with --hosts, where it means nothing; leave it out", allowed=("cpu",)
        )
    grid = None if args.hosts is None else parse_grid(args.hosts)
    num_ranks = args.ranks if grid is None else grid[0] * grid[1]
    shape, recipe = make_shape(num_ranks, None if grid is None else grid[0]), make_recipe(args.steps, args.seed)
    num_replayed = min(args.steps, _REPLAYED)
    expected_s = estimate.expected(
        num_ranks=num_ranks, num_steps=args.steps, num_replayed=num_replayed, num_cores=num_cores()
    )
    with screen.progress(estimate.Estimate(expected_s), args.steps) as show:
        show(estimate.READ)
        text = standard_library()
        job = make_job(text, shape, recipe, num_ranks=num_ranks)
        files = {name: open_for_writing(args.out, name) for name in _FILES}
        device = choose_device("cpu" if grid else args.device)
        show(estimate.START)
        gpus = None
        with tempfile.TemporaryDirectory(prefix="crossdock-demo-") as parts:
            job = replace(job, trace=parts)
            if grid is not None:
                runs = run_hosts(run_rank, replace(job, over_hosts=True), grid=grid, rate=args.rate, on_progress=show)
            else:
                with gpus_for(device, num_ranks) as gpus:
                    runs = run_world(run_rank, job, num_ranks=num_ranks, on_progress=show, gpus=gpus)
            spans = steps_to_show([run.spans for run in runs])
            write_timeline(read(Path(parts)), files["trace.json"], between=spans)
        show(estimate.REPEAT)
        compared = compare_losses(runs[0].losses, replay(job, num_replayed, device))
        show(estimate.WRITE_AGAIN)
        values = whole([{name: torch.from_numpy(value) for name, value in rank.values.items()} for rank in runs])
        written = torch.from_numpy(np.concatenate([rank.written for rank in runs]))
        num_written = compare_written(job, values, written, device)
    outcome = Outcome(
        num_ranks=num_ranks,
        hosts=args.hosts,
        shape=shape,
        recipe=recipe,
        machine=this_machine(with_gpu=device.type == "cuda"),
        sharing=None if gpus is None else gpus.sharing,
        num_files=text.num_files,
        text_bytes=len(text.train),
        num_parameters=sum(value.numel() for value in values.values()),
        losses=runs[0].losses,
        held_out_loss=runs[0].held_out_loss,
        compared=compared,
        spans=[rank.spans for rank in runs],
        counts=runs[0].counts,
        samples=samples(written.tolist()),
        num_written=num_written,
        num_sequences=len(written),
        written_per_s=num_written / max(rank.generate_s for rank in runs),
    )
    files["report.html"].write_text(page.render(outcome), encoding="utf-8")
    screen.print_outcome(outcome, [(path.stem, path) for path in files.values()])
    if grid is not None:
        print_bench_over_hosts(shape, recipe, hosts=args.hosts, rate=args.rate)
    elif device.type == "cuda":
        print_bench(bench_config(shape, recipe, num_ranks=num_ranks, device=device.type))


def bench_config(shape: Shape, recipe: Recipe, *, num_ranks: int, device: str) -> Config:
    """What ``crossdock bench`` is asked for calls as large as those of training."""
    return Config(
        ranks=num_ranks,
        tokens=-(-recipe.num_sequences // num_ranks) * shape.context,
        hidden=shape.hidden,
        experts=shape.num_experts,
        topk=shape.num_topk,
        wire="fp32",
        layout="expanded",
        reduce="rank",
        load="uniform",
        seed=recipe.seed,
        repeats=_BENCH_REPEATS,
        baseline="fresh",
        device=device,
    )


def print_bench(config: Config) -> None:
    """What ``crossdock bench`` prints: on a GPU the demo's own times are mostly those of its small kernels."""
    from crossdock.cli.bench import bench, report  # noqa: PLC0415 - it imports rich, which is an extra

    print("\nThe same calls alone, as crossdock bench times them:")
    report.print_outcome(bench(config, make_bench_job(config)))


def print_bench_over_hosts(shape: Shape, recipe: Recipe, *, hosts: str, rate: str) -> None:
    """What ``crossdock bench --hosts`` prints of calls as large as training's, with the gate's groups and without."""
    from crossdock.cli.bench import bench_over_hosts, hosts_report  # noqa: PLC0415 - it imports rich, which is an extra

    nodes, local = parse_grid(hosts)
    config = HostsConfig(
        hosts=hosts,
        rate=rate,
        rail="dist",
        tokens=-(-recipe.num_sequences // (nodes * local)) * shape.context,
        hidden=shape.hidden,
        experts=shape.num_experts,
        topk=shape.num_topk,
        topk_groups=shape.num_topk_groups if shape.num_topk_groups < nodes else None,
        wire="fp32",
        layout="expanded",
        seed=recipe.seed,
        repeats=_BENCH_REPEATS,
    )
    print("\nThe same calls alone, as crossdock bench times them:")
    hosts_report.print_hosts(config, bench_over_hosts(config), this_machine(with_gpu=False))


def make_shape(num_ranks: int, num_hosts: int | None = None) -> Shape:
    """The model, whose experts form a group for each rank, or for each host if there are several.

    Raises:
        ConfigError: ranks would hold different numbers of experts.
    """
    if num_ranks < 1 or _EXPERTS % num_ranks:
        allowed = [str(n) for n in range(1, _EXPERTS + 1) if _EXPERTS % n == 0]
        raise ConfigError(
            f"ranks={num_ranks} does not divide the {_EXPERTS} experts of a block; pass {', '.join(allowed[:-1])} or "
            f"{allowed[-1]}"
        )
    groups = num_hosts or num_ranks
    return Shape(num_groups=groups, num_topk_groups=groups_per_token(groups))


def make_recipe(steps: int, seed: int) -> Recipe:
    """How it is trained.

    Raises:
        ConfigError: an argument is not allowed.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps}; pass a positive number")
    if not 0 <= seed < _SEEDS:
        raise ConfigError(f"seed={seed} is not within 0..{_SEEDS - 1}; pass one that is")
    return Recipe(steps=steps, seed=seed)


def make_job(text: Text, shape: Shape, recipe: Recipe, *, num_ranks: int) -> Job:
    """What the ranks are told."""
    prompts = prompts_of(openings(text, num_ranks * _SEQUENCES), _WRITTEN_BYTES)
    return Job(
        shape=shape,
        recipe=recipe,
        train_text=text.train.numpy(),
        held_out_text=text.held_out.numpy(),
        prompts=prompts.numpy(),
    )


def groups_per_token(num_ranks: int) -> int:
    """How many groups a token may visit: two, or as many as it takes to have enough experts.

    >>> [groups_per_token(num_ranks) for num_ranks in (1, 4, 32)]
    [1, 2, 4]
    """
    needed = -(-Shape().num_topk * num_ranks // _EXPERTS)
    return min(num_ranks, max(_GROUPS_PER_TOKEN, needed))


def openings(text: Text, num: int) -> list[bytes]:
    """Prompts: some that a person would write, then pieces of held-out text, from all over it."""
    num_pieces = num - len(_OPENINGS)
    starts = torch.linspace(0, len(text.held_out) - _PROMPT_BYTES, num_pieces).long().tolist()
    return [*_OPENINGS, *(bytes(text.held_out[start : start + _PROMPT_BYTES].tolist()) for start in starts)]


def samples(written: Sequence[Sequence[int]]) -> list[Sample]:
    """The sequences that have a prompt of ours, as text."""
    lengths = [len(prompt) for prompt in _OPENINGS]
    return [
        Sample(prompt=as_text(row[:length]), continuation=as_text(row[length:]))
        for row, length in zip(written, lengths, strict=False)
    ]


def open_for_writing(folder: Path, name: str) -> Path:
    """The path of a file that can be written; its folder is made.

    Raises:
        ConfigError: it cannot.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigError(
            f"out={folder}: {error.filename} cannot be written ({error.strerror}); pass --out with a folder that can"
        ) from error
    return path
