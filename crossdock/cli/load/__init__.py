"""``crossdock load``: what a recorded routing means for ranks and links, and what another placement would gain."""

from __future__ import annotations

import argparse
from pathlib import Path

from crossdock.cli.load.figures import make_spec, measure
from crossdock.cli.load.recording import read
from crossdock.cli.options import HelpFormatter, check_extras
from crossdock.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``load`` to the commands."""
    parser = commands.add_parser(
        "load",
        help="say what a recorded routing means for ranks and links",
        description="Reads recorded picks, an .npy array of integers [tokens, picks] or [steps, tokens, picks], -1 for "
        "no pick. A step has the tokens of all ranks, one rank's after the other's. Prints loads, imbalance, bytes per "
        "link and what replicated experts would gain.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE.npy", help="the picks")
    parser.add_argument("--ranks", type=int, default=8, help="that the experts are spread over")
    parser.add_argument("--experts", type=int, default=None, help="of the model; by default what the picks need")
    parser.add_argument("--hidden", type=int, default=7168, help="values of a row")
    parser.add_argument("--wire", choices=("bf16", "fp8", "fp32"), default="bf16", help="format of a row")
    parser.add_argument(
        "--replicas",
        type=int,
        nargs="*",
        default=[0, 1, 2],
        help="physical experts that each rank has more, to try",
    )
    parser.add_argument("--page", type=Path, default=None, metavar="FILE.html", help="write a page, too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Reads, measures, prints, and writes the page if one was asked for.

    Raises:
        ConfigError: the file holds no picks, or an argument is not allowed.
        BackendUnavailable: rich, plotly or jinja2 is not installed.
    """
    check_extras("load")
    from crossdock.cli.load import report  # noqa: PLC0415 - it imports rich, plotly and jinja2, which are extras

    if min(args.replicas, default=0) < 0:
        raise ConfigError(f"replicas={args.replicas}; pass numbers that are 0 or more")
    recording = read(args.file, num_experts=args.experts, num_ranks=args.ranks)
    figures = measure(recording, make_spec(recording, hidden=args.hidden, wire=args.wire), replicas=args.replicas)
    if args.page is not None:
        try:
            args.page.write_text(report.render(figures, args.file.name), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"page={args.page} cannot be written ({error.strerror}); pass one that can") from error
    report.print_figures(figures, args.page)
