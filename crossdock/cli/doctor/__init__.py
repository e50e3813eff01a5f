"""``crossdock doctor``: what is on this machine, what of it will be used, and what to do where something is missing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

from crossdock.cli.doctor.facts import Report, check_needs
from crossdock.cli.doctor.gpus import gpus, links_between_gpus
from crossdock.cli.doctor.group import check_together, say
from crossdock.cli.doctor.host import host, variables
from crossdock.cli.doctor.show import print_report
from crossdock.cli.doctor.software import software


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``doctor`` to the commands."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine has, and what is missing",
        description="Says what is on this machine and what each part is for. With --group under torchrun all ranks "
        "send rows to each other in every transport that is there, and measure each pair's link.",
    )
    parser.add_argument(
        "--need",
        action="append",
        default=[],
        metavar="NAME",
        help="exit with status 1 if this is missing; may be repeated",
    )
    parser.add_argument("--group", action="store_true", help="try and measure between the ranks of a torchrun")
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Looks, with ``--group`` also at the other ranks, and prints what it saw; of several ranks only rank 0.

    Raises:
        ConfigError: a need is unknown, or there are no ranks for ``--group``.
        BackendUnavailable: something that was asked for is missing, a round trip failed, or ranks disagree.
    """
    report = examine(together=args.group)
    if not args.group or os.environ["RANK"] == "0":
        if args.json:
            print(json.dumps(dataclasses.asdict(report), indent=1))
        else:
            print_report(report)
    check_needs(report, args.need)


def examine(*, together: bool) -> Report:
    """The report of this machine; with ``together`` of all ranks too, which is collective."""
    ranks, disagreements, trips = check_together(say) if together else ([], [], [])
    links = None if together else links_between_gpus()
    return Report(
        sections=(software(), host(), gpus(), variables(os.environ)),
        links=() if links is None else (links,),
        ranks=tuple(ranks),
        disagreements=tuple(disagreements),
        round_trips=tuple(trips),
    )
