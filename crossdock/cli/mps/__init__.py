"""One GPU as a cluster: ranks that share it run at once, under NVIDIA's MPS, each on SMs of its own.

``crossdock mps -- COMMAND`` runs any command so; ``one_gpu_cluster`` is the same for a program that starts ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from crossdock.cli.command import exit_code
from crossdock.cli.mps.daemon import check_daemon, mps_daemon
from crossdock.cli.mps.sharing import PIPE_DIRECTORY, Sharing, share_gpus
from crossdock.errors import BackendUnavailable, ConfigError

__all__ = ["Sharing", "add_parser", "in_force", "num_visible_gpus", "one_gpu_cluster", "share_gpus"]


@contextmanager
def one_gpu_cluster(
    num_ranks: int | None, *, num_gpus: int | None = None, percentage: float | None = None
) -> Iterator[dict[str, str]]:
    """Lets ranks share the GPUs of this host while the block runs; gives what each rank's environment needs.

    The variables must be set before a rank initialises CUDA. Where MPS is not there, stderr is told what that means.

    Args:
        num_ranks: to be started; None when nobody knows.
        num_gpus: None: those that torch sees.
        percentage: of a GPU's SMs for each rank; None: an equal share.

    Raises:
        ConfigError: the percentage is not possible, or a daemon is configured and does not answer.
        BackendUnavailable: there is no GPU, or the daemon does not start.

    Example::

        with one_gpu_cluster(num_ranks=8) as variables:
            subprocess.run(command, env=os.environ | variables)
    """
    sharing = share_gpus(
        num_ranks, num_gpus=num_visible_gpus() if num_gpus is None else num_gpus, percentage=percentage
    )
    if sharing.warning:
        print(f"crossdock: {sharing.warning}", file=sys.stderr)
    with in_force(sharing) as variables:
        yield variables


@contextmanager
def in_force(sharing: Sharing) -> Iterator[dict[str, str]]:
    """Makes it so while the block runs; gives what each rank's environment needs.

    Raises:
        ConfigError: a daemon is configured and does not answer.
        BackendUnavailable: the daemon does not start.
    """
    variables = sharing.environment(os.environ)
    if sharing.kind == "joined":
        check_daemon(os.environ[PIPE_DIRECTORY])
    if sharing.kind != "mps":
        yield variables
        return
    with mps_daemon() as found_by:
        yield variables | found_by


def num_visible_gpus() -> int:
    """GPUs that torch sees here.

    Raises:
        BackendUnavailable: none.
    """
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        built = f"torch {torch.__version__} " + ("sees none" if torch.version.cuda else "was built without CUDA")
        raise BackendUnavailable(f"this wants a CUDA GPU, and {built}; run it where there is one, or on CPUs")
    return num_gpus


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``mps`` to the commands."""
    parser = commands.add_parser(
        "mps",
        help="run a command whose processes share a GPU",
        description="Starts NVIDIA's MPS daemon, runs a command whose processes then share the GPUs at the same time "
        "and not in turns, and stops the daemon however the command ends. Gives the command's exit code.",
    )
    parser.add_argument("--ranks", type=int, default=None, help="give each process this part of the SMs; without: all")
    parser.add_argument("--percentage", type=float, default=None, help="of the SMs for each process")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what to run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command and ends with its exit code.

    Raises:
        ConfigError: there is no command, or the arguments do not fit together.
        BackendUnavailable: there is no GPU, or the daemon does not start.
    """
    words = [*args.arguments, *(["--"] if args.arguments and args.behind else []), *args.behind]
    if not words:
        raise ConfigError("there is no command; pass it behind --: crossdock mps -- python train.py")
    with one_gpu_cluster(args.ranks, percentage=args.percentage) as variables:
        code = exit_code(words, os.environ | variables)
    raise SystemExit(code)
