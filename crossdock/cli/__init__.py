"""The command line: ``crossdock demo``, ``bench``, ``doctor``, ``load``, ``size``, ``trace``, ``mps``; packages."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from crossdock.cli.bench import add_parser as add_bench
from crossdock.cli.command import CommandParser
from crossdock.cli.demo import add_parser as add_demo
from crossdock.cli.doctor import add_parser as add_doctor
from crossdock.cli.load import add_parser as add_load
from crossdock.cli.mps import add_parser as add_mps
from crossdock.cli.size import add_parser as add_size
from crossdock.cli.trace import add_parser as add_trace
from crossdock.errors import ConfigError, CrossdockError
from crossdock.version import __version__

_COMMANDS = (add_demo, add_bench, add_doctor, add_load, add_size, add_trace, add_mps)
_FAILED, _USAGE, _INTERRUPTED, _NOBODY_READS = 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    0, 1 for a failure, 2 for invalid arguments, 130 for Ctrl-C, 141 where nobody reads the output any more.

    Errors of the library are printed to stderr without a traceback; a traceback is a bug.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that a terminal has no character for is no error
            stream.reconfigure(errors="replace")
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or what is left would be written when the process ends
        return _NOBODY_READS
    except (OSError, MemoryError) as error:
        what = "there is not enough memory; pass smaller numbers" if isinstance(error, MemoryError) else str(error)
        print(f"crossdock {args.command}: error: {what}", file=sys.stderr)
        return _FAILED
    except CrossdockError as error:
        print(f"crossdock {args.command}: error: {error}", file=sys.stderr)
        return _USAGE if isinstance(error, ConfigError) else _FAILED
    except KeyboardInterrupt:
        print(f"crossdock {args.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="crossdock", description="Expert-parallel dispatch and combine.")
    parser.add_argument("--version", action="version", version=f"crossdock {__version__}")
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    for add_command in _COMMANDS:
        add_command(commands)
    return parser
