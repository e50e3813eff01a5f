"""NVIDIA's MPS daemon from its start to its certain end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crossdock.cli.mps.sharing import CONTROL, LOG_DIRECTORY, PERCENTAGE, PIPE_DIRECTORY, VISIBLE_DEVICES
from crossdock.cli.signals import ENDS, ends_raised, handled
from crossdock.errors import BackendUnavailable, ConfigError

_ANSWER_S = 30.0
_OF_CLIENTS = (PERCENTAGE, VISIBLE_DEVICES)
"""Variables for the processes alone: a daemon that is told of GPU 1 makes number 0 of it, and then 1 is none."""


@contextmanager
def mps_daemon() -> Iterator[dict[str, str]]:
    """Runs a daemon of our own while the block runs; gives the variables by which processes find it.

    It is stopped however the block ends: by an exception, Ctrl-C, SIGTERM or SIGHUP. Only SIGKILL leaves it behind.

    Raises:
        BackendUnavailable: it does not start; with what it said.
    """
    folder = Path(tempfile.mkdtemp(prefix="crossdock-mps-", dir="/tmp"))  # short: a socket's path has 107 bytes
    pipes, log = folder / "pipe", folder / "log"
    pipes.mkdir()
    log.mkdir()
    variables = {PIPE_DIRECTORY: str(pipes), LOG_DIRECTORY: str(log)}
    environ = {name: value for name, value in os.environ.items() if name not in _OF_CLIENTS} | variables
    with ends_raised():
        try:
            _start(environ, folder / "said")
            yield variables
        finally:
            # So that a second Ctrl-C does not leave the daemon behind.
            with handled((signal.SIGINT, *ENDS), signal.SIG_IGN):
                _stop(environ, pipes)
                shutil.rmtree(folder, ignore_errors=True)


def check_daemon(pipe_directory: str) -> None:
    """Raises ConfigError when no daemon answers in a pipe directory; CUDA would go on without one, and not say so."""
    if shutil.which(CONTROL) is None:  # as in a container that is only a client
        return
    answer = _ask("get_server_list", {**os.environ, PIPE_DIRECTORY: pipe_directory})
    if answer is None or "Cannot find MPS control daemon" in answer:
        raise ConfigError(
            f"{PIPE_DIRECTORY}={pipe_directory}, and no MPS daemon answers there; unset it, and one is started for "
            f"you, or start one: {CONTROL} -d"
        )


def _start(environ: dict[str, str], said: Path) -> None:
    # A file and no pipe: a daemon may keep what it inherits, and a pipe that is open would be read for ever. A session
    # of its own, so that Ctrl-C in a terminal does not reach it before the ranks are gone.
    with said.open("w") as file:
        done = subprocess.run(
            [CONTROL, "-d"],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            timeout=_ANSWER_S,
            check=False,
        )
    if done.returncode:
        words = said.read_text(errors="replace").strip()
        raise BackendUnavailable(
            f"{CONTROL} -d ended with exit code {done.returncode} and said {words!r}; "
            f"see that no other daemon has the GPU to itself (nvidia-smi -q -d COMPUTE), or run ranks with a GPU each"
        )


def _stop(environ: dict[str, str], pipes: Path) -> None:
    """By its own command; where that gets no answer, by its process id."""
    if _ask("quit", environ) is not None:
        return
    try:
        pid = int((pipes / f"{CONTROL}.pid").read_text())
    except (OSError, ValueError):
        return
    print(f"{CONTROL} (process {pid}) does not answer, and is killed", file=sys.stderr)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _ask(command: str, environ: dict[str, str]) -> str | None:
    """What the daemon answers; None when nothing came in time."""
    try:
        done = subprocess.run(
            [CONTROL],
            input=f"{command}\n",
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            timeout=_ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout
