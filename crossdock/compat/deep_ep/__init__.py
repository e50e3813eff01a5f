"""DeepEP's interfaces over Crossdock: ``Buffer`` (V1), ``ElasticBuffer`` (V2), ``EPBuffer`` (V2.5)."""

from crossdock.compat.deep_ep import buffers, comm, utils
from crossdock.compat.deep_ep import cpp as _C  # noqa: F401, N812 - what it has been called since DeepEP 2.0
from crossdock.compat.deep_ep.base import BufferBase
from crossdock.compat.deep_ep.comm import (
    destroy_all_managed_nccl_comm,
    get_logical_domain_size,
    get_physical_domain_size,
)
from crossdock.compat.deep_ep.config import Config
from crossdock.compat.deep_ep.cpp import topk_idx_t
from crossdock.compat.deep_ep.elastic import ElasticBuffer
from crossdock.compat.deep_ep.ep import NUM_ALLOCATION_ALIGNMENT, EPBuffer
from crossdock.compat.deep_ep.ep_handle import EPHandle
from crossdock.compat.deep_ep.events import EventHandle, EventOverlap
from crossdock.compat.deep_ep.refused import BucketBuffer, BucketSession, BufferAllocator, EngramBuffer, PPBuffer
from crossdock.compat.deep_ep.v1 import Buffer

__version__ = "2.5.0"
"""The interface that this is, the newest of three; ``crossdock.__version__`` is the library's."""

__all__ = [
    "BucketBuffer",
    "BucketSession",
    "Buffer",
    "BufferAllocator",
    "BufferBase",
    "Config",
    "EPBuffer",
    "EPHandle",
    "ElasticBuffer",
    "EngramBuffer",
    "EventHandle",
    "EventOverlap",
    "PPBuffer",
    "__version__",
    "buffers",
    "comm",
    "destroy_all_managed_nccl_comm",
    "get_logical_domain_size",
    "get_num_allocation_alignment",
    "get_num_rdma_alignment",
    "get_num_tma_alignment",
    "get_physical_domain_size",
    "topk_idx_t",
    "utils",
]


def get_num_allocation_alignment() -> int:
    """Bytes of which ``EPBuffer``'s ``num_bytes`` is a multiple: 2 MiB."""
    return NUM_ALLOCATION_ALIGNMENT


def get_num_rdma_alignment() -> int:
    """64 bytes, of links between hosts."""
    return 64


def get_num_tma_alignment() -> int:
    """32 bytes."""
    return 32
