"""What commands share of their command lines: the extras that they need, lists of numbers, and files to write."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TextIO

from crossdock.errors import BackendUnavailable, ConfigError


def check_extras(needs: str, *names: str) -> None:
    """Raises BackendUnavailable for packages that are not installed.

    Args:
        needs: who needs them, as the message begins.
        names: of ``crossdock[cli]``; by default all of them.
    """
    missing = [name for name in names or ("rich", "plotly", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(
            f"{needs} needs {' and '.join(missing)}, not installed here; pip install 'crossdock[cli]'"
        )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults as one would type them, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, ()) or action.default is False:
            return action.help
        if isinstance(action.default, (tuple, list)):
            separator = "," if isinstance(action.default, tuple) else " "
            return f"{action.help} (default: {separator.join(map(str, action.default))})"
        return super()._get_help_string(action)


def keep_defaults(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    """Says what runs the command, and lets ``check_left_out`` see the options' defaults."""
    parser.set_defaults(run=run, default_of=parser.get_default)


def check_left_out(
    args: argparse.Namespace, names: Iterable[str], why: str, *, allowed: tuple[object, ...] = ()
) -> None:
    """Raises ConfigError for an option that was given and would mean nothing, rather than to leave it unheard.

    Args:
        allowed: values that are what happens in any case.
    """
    for name in names:
        if (value := getattr(args, name)) != args.default_of(name) and value not in allowed:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {value} {why}")


def numbers(text: str) -> tuple[int, ...]:
    """Parses comma-separated positive integers, for argparse.

    >>> numbers("2,4,8")
    (2, 4, 8)
    """
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers; pass such as 2,4,8") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
    return values


def open_to_write(path: Path, option: str, mode: Literal["a", "w"] = "a") -> TextIO:
    """Opens a file to append to, or to write anew.

    Args:
        option: the command line's option, for the error.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        return path.open(mode, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{option}={path} cannot be written ({error.strerror}); pass a file in a folder that exists"
        ) from error
