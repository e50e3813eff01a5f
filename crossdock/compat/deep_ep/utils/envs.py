"""How DeepEP's test programs begin: ranks, devices, seeds. They import it from ``deep_ep.utils.envs``."""

from __future__ import annotations

import os
import random
from typing import Any

import torch
import torch.distributed as dist

from crossdock.compat.deep_ep.comm import get_logical_domain_size, get_physical_domain_size
from crossdock.compat.deep_ep.utils.gathers import gather_as_nccl_does

__all__ = [
    "dist_print",
    "get_global_seed",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "get_rdma_gbs",
    "init_dist",
    "init_seed",
]

_seeds: list[int] = []
"""The last that ``init_seed`` was given: a program's, which asks for it later."""


def init_dist(
    local_rank: int, num_local_ranks: int, seed: int | None = None, **_: Any
) -> tuple[int, int, dist.ProcessGroup]:
    """Makes the default group, of the ranks of one host, and sets the program's default dtype and device.

    Gloo where several ranks share a GPU, which NCCL refuses, and where there is none; else NCCL and gloo. The address
    is that of ``MASTER_ADDR`` and ``MASTER_PORT``, by default a port of this host.

    Returns:
        Rank, number of ranks, and a group of all of them.
    """
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shares = num_devices < num_local_ranks
    address = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "8361")
    num_nodes, node = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if shares or not num_devices:
        gather_as_nccl_does()
    if num_devices:
        torch.cuda.set_device(local_rank % num_devices)
    dist.init_process_group(
        "gloo" if shares or not num_devices else "cpu:gloo,cuda:nccl",
        init_method=f"tcp://{address[0]}:{address[1]}",
        world_size=num_nodes * num_local_ranks,
        rank=node * num_local_ranks + local_rank,
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda" if num_devices else "cpu")
    if seed is not None:
        init_seed(seed)
    group = dist.new_group(list(range(num_nodes * num_local_ranks)))
    assert isinstance(group, dist.ProcessGroup), "a member of it"
    return dist.get_rank(), dist.get_world_size(), group


def init_seed(seed: int | None = None, **_: Any) -> int:
    """Seeds Python and torch, each rank's the same way, and gives the seed."""
    seed = 0 if seed is None else seed
    _seeds[:] = [seed]
    random.seed(seed + _rank())
    torch.manual_seed(seed + _rank())
    return seed


def get_global_seed() -> int:
    """The last seed."""
    return _seeds[0] if _seeds else 0


def dist_print(*values: Any, once_in_node: bool = False, **options: Any) -> None:
    """Prints, one rank after the other; or the first one alone."""
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if once_in_node:
        if _rank() == 0:
            print(*values, **options, flush=True)  # noqa: T201 - what it is for
        num_ranks = 0
    for rank in range(num_ranks):
        if rank == _rank():
            print(*values, **options, flush=True)  # noqa: T201 - what it is for
        if dist.is_initialized():
            dist.barrier()
    if once_in_node and dist.is_initialized():
        dist.barrier()


def get_rdma_gbs(*_: Any) -> float:
    """GB/s of the network cards that rows go over: none, as the ranks of one host need none."""
    return 0.0


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
