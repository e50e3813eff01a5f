"""How ranks share GPUs: what a process does before CUDA is initialised, and a thread before its program begins."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


def take_share(rank: int, num_ranks: int, num_devices: int) -> torch.device:
    """The device of a process that is one rank, made the current one; under MPS with this rank's share of the SMs.

    Args:
        num_devices: GPUs, asked by the process that starts the ranks: to ask may initialise CUDA.
    """
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        neighbours = -(-num_ranks // num_devices)
        os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{100 / neighbours:g}"
    device = torch.device("cuda", rank % num_devices)
    torch.cuda.set_device(device)
    return device


def take_all() -> torch.device:
    """The device of a process whose threads are all ranks of a world."""
    # Kernels of one rank wait for those of another, so no two streams may share a hardware queue, and no kernel may be
    # loaded lazily: loading one waits for those that run.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream of this thread's own, whose work is done when the block ends."""
    torch.cuda.set_device(device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()
