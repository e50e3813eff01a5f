"""DeepEP's ``comm``: what programs ask of the ranks. Crossdock uses no NCCL communicator.

Letters: R ranks.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist

from crossdock.compat.deep_ep import refused
from crossdock.compat.deep_ep.refused import NCCLCommHandle

__all__ = [
    "NCCLCommHandle",
    "barrier",
    "destroy_all_managed_nccl_comm",
    "get_comm_stream",
    "get_logical_domain_size",
    "get_nccl_comm_handle",
    "get_physical_domain_size",
]


def size_of(group: Any) -> int:
    """R, of a process group or of any group of Crossdock's."""
    size = getattr(group, "size", None)
    if group is None:
        return dist.get_world_size()
    return int(size() if callable(size) else size)  # type: ignore[arg-type]


def barrier(buffer: Any, **options: Any) -> None:
    """``buffer.barrier(**options)``."""
    buffer.barrier(**options)


def get_comm_stream(buffer: Any) -> torch.cuda.Stream | None:
    """``buffer.get_comm_stream()``."""
    stream: torch.cuda.Stream | None = buffer.get_comm_stream()
    return stream


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """(ranks over RDMA, ranks over NVLink): (1, R), as all ranks reach each other's memory."""
    return 1, size_of(group)


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """(scale-out ranks, scale-up ranks): (1, R), with or without ``allow_hybrid_mode``."""
    return 1, size_of(group)


def get_nccl_comm_handle(*_: Any, **__: Any) -> NoReturn:
    """Not supported: there is none."""
    raise refused.error("get_nccl_comm_handle")


def destroy_all_managed_nccl_comm() -> None:
    """Nothing: there are none."""
