"""``crossdock trace``: the ranks' traces as one timeline, and a table of who waited for whom."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from crossdock._env import TRACE
from crossdock.cli.command import exit_code
from crossdock.cli.options import check_extras
from crossdock.cli.trace import profiles, timeline
from crossdock.cli.trace.figures import measure
from crossdock.cli.trace.parts import Trace, read
from crossdock.errors import ConfigError
from crossdock.trace import open_problem
from crossdock.trace.part import parts_in

_FOLDER = Path("crossdock-trace")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``trace`` to the commands."""
    parser = commands.add_parser(
        "trace",
        help="show what all ranks did when, and who waited for whom",
        usage="crossdock trace [-h] [--between FROM TO] [--profile [RANK=]FILE.json] [FOLDER] [-- COMMAND ...]",
        description="Puts the parts that ranks have written (Buffer(trace=FOLDER), or CROSSDOCK_TRACE=FOLDER in the "
        "environment) on one time axis: writes trace.json, for ui.perfetto.dev, and trace.html beside them, and prints "
        "who waited for whom. Runs a command first, if there is one, all its buffers traced, and gives its exit code.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=_FOLDER, metavar="FOLDER", help=f"default: {_FOLDER}")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="[RANK=]FILE.json",
        help="a trace of torch's profiler of one rank, to be shown in its process; may be given several times",
    )
    parser.add_argument(
        "--between",
        type=float,
        nargs=2,
        default=None,
        metavar=("FROM", "TO"),
        help="seconds from the beginning; of a long run, what the timeline shows",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command if there is one, reads the parts, prints, and writes timeline and page.

    Raises:
        ConfigError: there is no part, a file cannot be read or written, or the command cannot be run.
        BackendUnavailable: rich, plotly or jinja2 is not installed.
    """
    check_extras("trace")
    from crossdock.cli.trace import report  # noqa: PLC0415 - it imports rich, plotly and jinja2, which are extras

    if args.between is not None and not 0 <= args.between[0] < args.between[1]:
        raise ConfigError("--between {:g} {:g} is no time; pass FROM, 0 or more, and a larger TO".format(*args.between))
    folder, command = args.folder, args.behind
    code = _run_traced(folder, command) if command else 0
    try:
        trace = read(folder)
    except ConfigError:
        if code:
            raise SystemExit(code) from None
        raise
    figures = measure(trace)
    files = [("trace", folder / "trace.json"), ("page", folder / "trace.html")]
    try:
        first = trace.first / 1e9
        between = [(first + args.between[0], first + args.between[1])] if args.between else []
        write_timeline(trace, files[0][1], args.profile, between=between)
        files[1][1].write_text(report.render(figures, f"{folder}/"), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written ({error.strerror}); copy the parts elsewhere") from error
    report.print_figures(figures, files)
    if trace.num_others:
        print(f"Left out: {trace.num_others} parts of earlier runs.", file=sys.stderr)
    if code:
        raise SystemExit(code)


def write_timeline(
    trace: Trace, path: Path, profile_names: Sequence[str] = (), *, between: Sequence[tuple[float, float]] = ()
) -> None:
    """The Chrome trace, an event a line.

    Args:
        between: times of the first part's clock in seconds; the rest is left out. Without any, nothing is.

    Raises:
        ConfigError: a profile cannot be read, or is of another run.
    """
    more = [event for name in profile_names for event in profiles.events_of(profiles.read_profile(name), trace)]
    events = timeline.events_of(trace, more)
    if between:
        events = timeline.within(
            events, [(s * 1e6 - trace.first / 1e3, e * 1e6 - trace.first / 1e3) for s, e in between]
        )
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        file.writelines(json.dumps(event) + (",\n" if i < len(events) else "\n") for i, event in enumerate(events, 1))
        file.write("]}\n")


def _run_traced(folder: Path, command: list[str]) -> int:
    """Runs a command all of whose buffers are traced into the folder; parts of earlier runs are removed."""
    if (problem := open_problem(folder)) is not None:
        raise ConfigError(problem.replace("trace=", "folder ", 1))
    for path in parts_in(folder):
        path.unlink()
    return exit_code(command, os.environ | {TRACE: str(folder.resolve())})
