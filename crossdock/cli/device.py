"""The devices of a command's ranks: CPUs, or this host's GPUs, which ranks may share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from crossdock.cli.mps import Sharing, in_force, num_visible_gpus, share_gpus


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The GPUs of a world; rank ``r`` uses GPU ``r % num_gpus``."""

    sharing: Sharing
    variables: Mapping[str, str]
    """Environment variables that each rank needs for it."""


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is any")


def choose_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` selects on this machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def gpus_for(device: torch.device, num_ranks: int, *, percentage: float | None = None) -> Iterator[Gpus | None]:
    """The GPUs for ranks started within the block; None on CPUs. Ranks share GPUs if there are fewer.

    Args:
        percentage: of a shared GPU's SMs, what each rank may use; None: the default of ``share_gpus``.

    Raises:
        ConfigError: the percentage is not allowed.
        BackendUnavailable: there is no GPU, or sharing could not be set up.
    """
    if device.type == "cpu":
        yield None
        return
    sharing = share_gpus(num_ranks, num_gpus=num_visible_gpus(), percentage=percentage)
    with in_force(sharing) as variables:
        yield Gpus(sharing=sharing, variables=variables)
