"""``crossdock bench``: dispatch and combine among processes of this host, beside gloo and beside a plain copy."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from crossdock.cli.bench.figures import Figure, copy_bandwidth, figures
from crossdock.cli.bench.measure import WARM_UPS, Job, measure
from crossdock.cli.machine import Machine, this_machine
from crossdock.cli.world import run_world
from crossdock.errors import BackendUnavailable, ConfigError
from crossdock.layout import Compact, Expanded, Layout, Padded
from crossdock.plan import local_counts
from crossdock.routing import hot_expert_load, recorded_load, uniform_load, zipf_load
from crossdock.spec import Spec, Topology
from crossdock.wire import Bf16, Fp8, Fp16, Fp32, Wire

_WIRES: dict[str, Wire] = {"bf16": Bf16(), "fp16": Fp16(), "fp32": Fp32(), "fp8": Fp8()}
_LAYOUTS: dict[str, Layout] = {"compact": Compact(), "expanded": Expanded(), "padded": Padded()}
_BASELINES = {"fresh": "gloo all_to_all_single", "kept": "gloo all_to_all_single, buffers kept"}
_LOADS = {"uniform": uniform_load, "zipf": zipf_load, "hot": hot_expert_load}


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, as the command line names it; tokens are those of each rank."""

    ranks: int
    tokens: int
    hidden: int
    experts: int
    topk: int
    wire: str
    layout: str
    load: str
    seed: int
    repeats: int
    baseline: str

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks × {self.tokens} tokens, hidden {self.hidden}, top-{self.topk} of {self.experts} "
            f"experts, {self.wire}, {self.layout}, {self.load} load"
        )


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``bench`` to the commands."""
    parser = commands.add_parser(
        "bench",
        help="time dispatch and combine on this machine",
        description="Times dispatch and combine among processes of this host, beside the same exchange on gloo and the "
        "machine's copy bandwidth. Rows are compared with gloo's, bit for bit, before anything is timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=4, help="processes to start")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each rank")
    parser.add_argument("--hidden", type=int, default=7168, help="values per token")
    parser.add_argument("--experts", type=int, default=64, help="experts of all ranks together")
    parser.add_argument("--topk", type=int, default=8, help="experts per token")
    parser.add_argument("--wire", choices=_WIRES, default="bf16", help="format of dispatched rows")
    parser.add_argument("--layout", choices=_LAYOUTS, default="compact", help="layout of received rows")
    parser.add_argument("--load", default="uniform", help="uniform, zipf, hot, or an .npy FILE of recorded picks")
    parser.add_argument("--seed", type=int, default=0, help="of picks and values")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each operation")
    parser.add_argument(
        "--baseline", choices=_BASELINES, default="fresh", help="gloo into new tensors, or into buffers that are kept"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="append one JSON line per operation")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, and writes the lines.

    Raises:
        ConfigError: the arguments do not fit together.
        BackendUnavailable: rich is not installed.
        CrossdockError: a rank failed, or its rows were wrong.
    """
    if importlib.util.find_spec("rich") is None:
        raise BackendUnavailable("the command line needs rich, which is not installed; pip install 'crossdock[cli]'")
    from crossdock.cli.bench import report  # noqa: PLC0415 - it imports rich, which is an extra

    config = Config(**{name: getattr(args, name) for name in Config.__dataclass_fields__})
    job = make_job(config)
    if args.json is not None:
        _open_to_append(args.json).close()
    with report.progress_bar() as show:
        ranks = run_world(measure, job, num_ranks=config.ranks, on_progress=show)
    machine, results = this_machine(), figures(ranks)
    report.print_table(str(config), results, _footer(config, results, copy_bandwidth(ranks), machine))
    if args.json is not None:
        with _open_to_append(args.json) as file:
            file.writelines(json_line(config, figure, machine) + "\n" for figure in results)


def make_job(config: Config) -> Job:
    """What the ranks are told: the picks of all tokens, and the Spec.

    Layouts with a row per pick get room for just these picks, because the worst case of a layout is for picks that
    nobody knows.

    Raises:
        ConfigError: the arguments do not fit together.
    """
    if config.repeats < 1:
        raise ConfigError(f"repeats={config.repeats}; pass a positive number")
    topology = Topology(num_ranks=config.ranks)
    spec = Spec(
        num_experts=config.experts,
        num_topk=config.topk,
        hidden=config.hidden,
        max_tokens=config.tokens,
        wire=_WIRES[config.wire],
        layout=_LAYOUTS[config.layout],
    )
    num_local = spec.num_local_experts(config.ranks)
    topk_idx = draw_load(config)
    if spec.layout.per_pick:
        per_expert = local_counts(spec, topology, topk_idx)[: config.experts].view(-1, num_local)
        needed = per_expert.max() if isinstance(spec.layout, Padded) else per_expert.sum(1).max()
        spec = replace(spec, layout=replace(spec.layout, capacity=max(1, int(needed))))
    spec.capacity(config.ranks)
    return Job(
        spec=spec,
        topk_idx=topk_idx.numpy(),
        seed=config.seed,
        repeats=config.repeats,
        keeps_buffers=config.baseline == "kept",
    )


def draw_load(config: Config) -> Tensor:
    """The picks of all ranks' tokens, int64 [P * T, K]; the same seed gives the same picks."""
    num_tokens = config.ranks * config.tokens
    if draw := _LOADS.get(config.load):
        generator = torch.Generator().manual_seed(config.seed)
        return draw(num_tokens, config.experts, num_topk=config.topk, generator=generator)
    try:
        return recorded_load(config.load, num_tokens, num_experts=config.experts, num_topk=config.topk)
    except OSError as error:
        raise ConfigError(
            f"load={config.load} cannot be opened ({error.strerror}); pass {', '.join(_LOADS)}, or an .npy file that "
            f"crossdock.record_load wrote"
        ) from error


def json_line(config: Config, figure: Figure, machine: Machine) -> str:
    """One line of results: the run, the figure, and what it was measured on."""
    return json.dumps(
        {**asdict(config), **asdict(figure), "baseline": _BASELINES[config.baseline], "machine": asdict(machine)}
    )


def _footer(config: Config, results: Sequence[Figure], bandwidth: float, machine: Machine) -> list[str]:
    return [
        *_about_fp8(results),
        f"Slowest rank's median of {config.repeats} calls after {WARM_UPS} to warm up; rows equal gloo's, bit for bit.",
        f"Limit: each row read once and written once at {bandwidth / 1e9:.1f} GB/s, what {config.ranks} ranks copy.",
        f"Baseline: {_BASELINES[config.baseline]}.",
        str(machine),
    ]


def _about_fp8(results: Sequence[Figure]) -> list[str]:
    """What a narrow wire gains and what casting costs, where both were measured."""
    by_name = {(figure.op, figure.wire): figure.median_us for figure in results}
    if ("dispatch (fused cast)", "fp8") not in by_name:
        return []
    quantised, cast = by_name["dispatch", "fp8"], by_name["dispatch (fused cast)", "fp8"]
    gain = f"Quantised rows travel {by_name['dispatch', 'bf16'] / quantised:.2f} × as fast as bf16"
    return [f"{gain}; the cast on the way costs {cast - quantised:.0f} us ({cast / quantised - 1:+.0%})."]


def _open_to_append(path: Path) -> TextIO:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"json={path} cannot be written ({error.strerror}); pass a file in a folder that exists"
        ) from error
