"""Commands of others that a command of ours runs: ``crossdock mps -- python train.py``."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Sequence
from typing import Any

from crossdock.cli import signals
from crossdock.errors import ConfigError

_EXIT_S = 20.0


class CommandParser(argparse.ArgumentParser):
    """Takes what follows the first ``--`` for a command to be run: ``args.behind``, empty without one.

    Left to argparse, the command's options would be taken for ours.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """See ArgumentParser."""
        words: Sequence[str] = list(args or ())
        at = words.index("--") if "--" in words else len(words)
        known, unknown = super().parse_known_args(words[:at], namespace)
        known.behind = list(words[at + 1 :])
        return known, unknown


def exit_code(words: list[str], variables: dict[str, str]) -> int:
    """Runs a command and gives its exit code, as a shell would; when this process is to end, the command ends first.

    Raises:
        ConfigError: it cannot be run.
    """
    process: subprocess.Popen[bytes] | None = None
    try:
        with signals.deferred():
            process = subprocess.Popen(words, env=variables)
        code = process.wait()
        return code if code >= 0 else 128 - code
    except BaseException as error:
        if process is None:
            if isinstance(error, OSError):
                raise ConfigError(f"{words[0]} cannot be run ({error.strerror}); pass a command that can") from error
            raise
        if not isinstance(error, KeyboardInterrupt):  # which the terminal has sent to the command as well
            process.terminate()
        try:
            process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
