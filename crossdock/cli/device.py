"""Where the ranks of a command run: on CPUs, or on this host's GPUs, which they may have to share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from crossdock.cli.mps import Sharing, in_force, num_visible_gpus, share_gpus


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The GPUs of a world; rank ``r`` has number ``r % num_gpus``."""

    sharing: Sharing
    variables: Mapping[str, str]
    """What each rank's environment needs for that."""


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is any")


def choose_device(name: str) -> torch.device:
    """What ``auto``, ``cpu`` or ``cuda`` means here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def gpus_for(device: torch.device, num_ranks: int, *, percentage: float | None = None) -> Iterator[Gpus | None]:
    """The GPUs that ranks are started on within the block, shared if there are fewer of them; None for CPUs.

    Raises:
        ConfigError: the percentage of SMs is not possible.
        BackendUnavailable: there is no GPU, or no way to share it began.
    """
    if device.type == "cpu":
        yield None
        return
    sharing = share_gpus(num_ranks, num_gpus=num_visible_gpus(), percentage=percentage)
    with in_force(sharing) as variables:
        yield Gpus(sharing=sharing, variables=variables)
