"""What programs take from ``deep_ep_cpp``, DeepEP's compiled module, which is none here."""

from __future__ import annotations

import torch

from crossdock.compat.deep_ep import sizes
from crossdock.compat.deep_ep.config import Config
from crossdock.compat.deep_ep.engine import Engine
from crossdock.compat.deep_ep.events import EventHandle

__all__ = ["Buffer", "Config", "EventHandle", "get_low_latency_rdma_size_hint", "is_sm90_compiled", "topk_idx_t"]

topk_idx_t = torch.int64


class Buffer:
    """DeepEP's runtime (``buffer.runtime``), as far as programs ask it where a buffer is."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def is_available(self) -> bool:
        """Whether calls can be made: until ``destroy()``."""
        return not self._engine.is_closed

    def get_num_rdma_ranks(self) -> int:
        """Ranks that are reached over a network card: 1, as all ranks reach each other's memory."""
        return 1

    def get_rdma_rank(self) -> int:
        """Which of them this is: 0."""
        return 0

    def get_local_device_id(self) -> int:
        """The number of the rank's GPU; -1 on CPUs."""
        device = self._engine.device
        return device.index if device.type == "cuda" else -1

    def get_comm_stream(self) -> torch.cuda.Stream | None:
        """Where asynchronous calls run; None on CPUs."""
        return self._engine.comm_stream


def is_sm90_compiled() -> bool:
    """Whether FP8 and low-latency calls are there, as they are."""
    return True


def get_low_latency_rdma_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Bytes that low-latency calls of such sizes need at each rank."""
    return sizes.low_latency(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)
