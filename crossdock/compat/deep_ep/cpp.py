"""What programs take from ``deep_ep_cpp``, DeepEP's compiled module, which is none here."""

from __future__ import annotations

import torch

from crossdock.compat.deep_ep import sizes
from crossdock.compat.deep_ep.config import Config
from crossdock.compat.deep_ep.events import EventHandle

__all__ = ["Buffer", "Config", "EventHandle", "get_low_latency_rdma_size_hint", "is_sm90_compiled", "topk_idx_t"]

topk_idx_t = torch.int64


class Buffer:
    """DeepEP's runtime; programs look whether it is there."""


def is_sm90_compiled() -> bool:
    """Whether FP8 and low-latency calls are there, as they are."""
    return True


def get_low_latency_rdma_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Bytes that low-latency calls of such sizes need at each rank."""
    return sizes.low_latency(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)
