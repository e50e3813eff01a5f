"""What commands share of their command lines: the extras that they need, lists of numbers, and files to write."""

from __future__ import annotations

import argparse
import importlib.util
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


def numbers(text: str) -> tuple[int, ...]:
    """Parses comma-separated positive integers, for argparse.

    >>> numbers("2,4,8")
    (2, 4, 8)
    """
    values = tuple(int(part) for part in text.split(","))
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
