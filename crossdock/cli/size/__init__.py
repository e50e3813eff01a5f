"""``crossdock size``: what dispatch and combine would take on machines of any size, by the cost model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from crossdock.cli.bench.config import WIRES
from crossdock.cli.options import HelpFormatter, check_extras, numbers, open_to_write
from crossdock.cli.size.figures import LAYOUTS, Question, answer, as_values
from crossdock.cost import METHODS


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``size`` to the commands."""
    parser = commands.add_parser(
        "size",
        help="say what dispatch and combine would take on machines of any size",
        description="Predicts, by the cost model, what a dispatch and a combine take over nodes of GPUs: bytes and "
        "time of each hop, what bounds it, the SMs it wants, and memory of each rank. Nothing runs. docs/model.md has "
        "the model beside figures that were measured, and says where it is wrong.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--ranks", type=numbers, default=(16, 64, 256, 2048), metavar="N,N,...", help="to compare")
    parser.add_argument("--node-size", type=int, default=8, help="GPUs of a node; fewer ranks are one node")
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank in a call")
    parser.add_argument("--hidden", type=int, default=7168, help="values of a row")
    parser.add_argument("--experts", type=int, default=None, help="by default 256, or one on each rank if that is more")
    parser.add_argument("--topk", type=int, default=8, help="experts per token")
    parser.add_argument("--wire", choices=WIRES, default="fp8", help="format of dispatched rows; sums are bf16 then")
    parser.add_argument("--layout", choices=LAYOUTS, default=None, help="by default compact; padded for low-latency")
    parser.add_argument(
        "--topk-groups", type=int, default=None, help="also predict a gate that picks from so many groups of experts"
    )
    parser.add_argument("--groups", type=int, default=None, help="that the experts form; by default one for each node")
    parser.add_argument("--load", type=Path, default=None, metavar="FILE.npy", help="also predict recorded picks")
    parser.add_argument("--method", choices=METHODS, default="two-hops", help="what moves rows")
    parser.add_argument("--link", type=float, default=450.0, help="GB/s of a GPU's scale-up links, each way")
    parser.add_argument("--nic", type=float, default=50.0, help="GB/s of a GPU's part of the NICs, each way")
    parser.add_argument("--memory", type=float, default=4100.0, help="GB/s of a GPU's memory, read and written")
    parser.add_argument("--num-sms", type=int, default=None, help="that a call may use; by default what it wants")
    parser.add_argument("--room", type=float, default=4.0, help="rows that a slot holds, over a rank's mean load")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write one JSON line for each row, too")
    parser.add_argument("--page", type=Path, default=None, metavar="FILE.html", help="write a page with a plot, too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Predicts, prints, and writes what was asked for.

    Raises:
        ConfigError: sizes do not fit together, or a file cannot be read or written.
        BackendUnavailable: rich, plotly or jinja2 is not installed.
    """
    check_extras("size")
    from crossdock.cli.size import report  # noqa: PLC0415 - it imports rich, plotly and jinja2, which are extras

    question = Question(**{name: getattr(args, name) for name in Question.__dataclass_fields__})
    sizes = answer(question)
    if args.json is not None:
        with open_to_write(args.json, "json", "w") as file:
            file.writelines(json.dumps(as_values(question, size)) + "\n" for size in sizes)
    if args.page is not None:
        with open_to_write(args.page, "page", "w") as file:
            file.write(report.render(question, sizes))
    report.print_sizes(question, sizes, args.page)
