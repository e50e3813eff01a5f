"""Compares Crossdock with its peers on one recipe: ``python -m benchmarks.peers``; see README.md in this folder."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.cases import OPENERS, OPS
from benchmarks.measure import Figure, Row, Work, measure
from crossdock.cli.bench.config import Config, make_job
from crossdock.cli.device import Gpus, add_device_option, choose_device, gpus_for
from crossdock.cli.machine import this_machine
from crossdock.cli.mps import num_visible_gpus, share_gpus
from crossdock.cli.mps.sharing import PERCENTAGE
from crossdock.cli.options import open_to_write
from crossdock.cli.signals import handled
from crossdock.cli.world import run_world
from crossdock.errors import ConfigError, CrossdockError

_PACKAGES = {
    "flashinfer": ("flashinfer", "flashinfer-python"),
    "deepep-v1": ("deep_ep", "deep_ep"),
    "deepep-v2": ("deep_ep", "deep_ep"),
}
"""By peer: the module that it needs, and the distribution whose version is reported."""
_FEW_PICKS = 4096
"""Picks per rank up to which Padded is measured too, unless ``--layouts`` is given."""
_WIDTH = 130
"""Columns of the output if it is no terminal."""
_HEADINGS = ("op", "peer", "eager", "graph", "host", "")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row with its peer and configuration; written as a JSON line with the machine's fingerprint."""

    peer: str
    version: str
    config: Config
    row: Row


def main() -> int:
    """Measures and prints. Returns 0, 1 if a result was wrong or Crossdock failed, or 2 for invalid arguments."""
    try:
        lines = list(_lines(_parser().parse_args()))
    except CrossdockError as error:
        sys.stderr.write(f"benchmarks.peers: error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    for title, rows in _tables(lines).items():
        _show(title, rows)
    failed = [line for line in lines if line.row.is_wrong or (line.peer == "crossdock" and line.row.eager_us is None)]
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Runs one recipe of picks through Crossdock and its peers, checks every result, and prints eager, "
        "CUDA-graph and host time: the slowest rank's median.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_device_option(parser)
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes to start; they share GPUs where there are fewer")
    add("--percentage", type=float, help="of a shared GPU's SMs for each rank; without: an equal share, at most 25")
    add("--tokens", type=int, default=4096, help="tokens of each rank")
    add("--hidden", type=int, default=7168, help="values per token")
    add("--experts", type=int, default=256, help="experts of all ranks together")
    add("--topk", type=int, default=8, help="experts per token")
    add("--wires", nargs="+", choices=("bf16", "fp8"), default=["bf16", "fp8"], help="formats of rows")
    add("--layouts", nargs="+", choices=("compact", "padded"), help="without: compact; of few tokens padded, too")
    add("--peers", nargs="+", choices=tuple(OPENERS), default=list(OPENERS), help="whom to measure")
    add("--load", default="uniform", help="uniform, zipf, hot, or an .npy FILE of recorded picks")
    add("--seed", type=int, default=0, help="of picks and values")
    add("--repeats", type=int, default=20, help="samples of each figure")
    add("--num-sms", type=int, help="SMs that Crossdock's calls use, on CUDA")
    add("--limit-s", type=float, default=400, help="seconds after which a peer counts as failed")
    add("--out", type=Path, metavar="FILE", help="append one JSON line per row")
    return parser


def _lines(args: argparse.Namespace) -> Iterator[Line]:
    """The lines of each peer, appended to ``--out`` once the peer is done."""
    device = choose_device(args.device)
    configs = [_config(args, device.type, layout, wire) for layout in _layouts(args) for wire in args.wires]
    jobs = [make_job(config) for config in configs]
    percentage = _percentage(args) if device.type == "cuda" else None
    with gpus_for(device, args.ranks, percentage=percentage) as gpus:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a context here would take turns with the ranks'
            machine = asdict(pool.apply(this_machine, kwds={"with_gpu": gpus is not None}))
        about = {"machine": machine, "sharing": None if gpus is None else str(gpus.sharing)}
        if gpus is not None:
            sys.stderr.write(f"{gpus.sharing.warning or gpus.sharing}\n")
        for peer in args.peers:
            rows = _play(Work(peer=peer, jobs=jobs), gpus, args)
            lines = [Line(peer=peer, version=_version(peer), config=configs[n], row=row) for n, row in rows]
            if args.out is not None:
                with open_to_write(args.out, "out") as file:
                    file.writelines(json.dumps({**asdict(line), **about}) + "\n" for line in lines)
            yield from lines


def _play(work: Work, gpus: Gpus | None, args: argparse.Namespace) -> list[tuple[int, Row]]:
    """A peer's rows, from processes of its own; if it is missing, fails or hangs, the last row gives the reason."""
    rows: list[tuple[int, Row]] = []
    why = _missing(work.peer, gpus)
    if why is None:
        sys.stderr.write(f"{work.peer} ...\n")
        try:
            with _limit(args.limit_s):
                run_world(measure, work, num_ranks=args.ranks, on_progress=lambda *row: rows.append(row), gpus=gpus)
        except (CrossdockError, TimeoutError) as error:
            sys.stderr.write(f"{error}\n")
            why = f"failed: {_cause(str(error))}"
    return rows if why is None else [*rows, (rows[-1][0] if rows else 0, Row(op="", why=why))]


def _cause(text: str) -> str:
    r"""The line of an error's text that names the error: the one behind the last traceback, if there is one.

    >>> _cause("rank 1 failed:\nTraceback (most recent call last):\n  File ...\nRuntimeError: no nvcc\nsee above")
    'RuntimeError: no nvcc'
    """
    _, traceback, last = text.rpartition("Traceback")
    lines = last.splitlines()[1:] if traceback else last.splitlines()
    return next((line for line in lines if line and not line.startswith(" ")), text)


def _missing(peer: str, gpus: Gpus | None) -> str | None:
    """The reason why a peer cannot run here; None if it can."""
    if peer in {"crossdock", "facade-v1", "facade-v2", "gloo"}:
        return None
    if gpus is None:
        return "needs GPUs"
    if peer == "nccl":
        return None if gpus.sharing.kind == "own" else "NCCL refuses ranks that share a GPU"
    module, _ = _PACKAGES[peer]
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def _version(peer: str) -> str:
    if peer not in _PACKAGES:
        return f"torch {torch.__version__}" if peer in {"nccl", "gloo"} else ""
    try:
        return importlib.metadata.version(_PACKAGES[peer][1])
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError if the block takes longer than ``seconds``."""

    def end(*_: object) -> NoReturn:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    with handled((signal.SIGALRM,), end):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _layouts(args: argparse.Namespace) -> list[str]:
    if args.layouts:
        return list(args.layouts)
    return ["compact", "padded"] if args.tokens * args.topk <= _FEW_PICKS else ["compact"]


def _config(args: argparse.Namespace, device: str, layout: str, wire: str) -> Config:
    names = ("ranks", "tokens", "hidden", "experts", "topk", "load", "seed", "repeats", "num_sms")
    given: dict[str, Any] = {name: getattr(args, name) for name in names}
    reduce = "rank" if layout == "compact" else "token"
    return Config(**given, wire=wire, layout=layout, reduce=reduce, baseline="fresh", device=device)


def _percentage(args: argparse.Namespace) -> float | None:
    """Percentage of a shared GPU's SMs per rank: ``--percentage``, else 25 or an equal share, whichever is less.

    None if no GPU is shared, or the environment sets the percentage already.
    """
    if args.percentage is not None:
        return float(args.percentage)
    num_gpus = num_visible_gpus()
    kind = share_gpus(args.ranks, num_gpus=num_gpus).kind
    if kind not in {"mps", "joined"} or PERCENTAGE in os.environ:
        return None
    return float(min(25, 100 / math.ceil(args.ranks / num_gpus)))


def _tables(lines: Sequence[Line]) -> dict[str, list[list[str]]]:
    """Table rows by title, one operation's peers next to each other; microseconds, ``+`` if host time has a wait."""
    tables: dict[str, list[list[str]]] = {}
    for line in sorted(lines, key=lambda line: OPS.index(line.row.op) if line.row.op else len(OPS)):
        row = line.row
        note = row.why if not row.is_wrong else f"WRONG: {row.why}"
        if row.times_cached is not None:
            note = f"{row.times_cached:.1f} × a cached bf16 dispatch"
        host = _time(row.host_us) + ("+" if row.waits and row.host_us else "")
        cells = [row.op, line.peer, _time(row.eager_us), _time(row.graph_us), host, note]
        tables.setdefault(f"{line.config}; us, + with a wait", []).append(cells)
    return tables


def _time(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{figure.median:,.1f}" if figure.median < 1000 else f"{figure.median:,.0f}"


def _show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Prints one table with rich, or separated by tabs if rich is not installed."""
    if importlib.util.find_spec("rich") is None:
        sys.stdout.write("\n".join([title, *("\t".join(row) for row in (_HEADINGS, *rows)), "", ""]))
        return
    from rich import box  # noqa: PLC0415 - it is an extra
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in _HEADINGS:
        table.add_column(name, justify="right" if name in {"eager", "graph", "host"} else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDTH)
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
