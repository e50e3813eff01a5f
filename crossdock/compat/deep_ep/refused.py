"""What DeepEP's interfaces have and Crossdock has not, and what to use instead: one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from crossdock.errors import NotSupported

Class = TypeVar("Class")

_NO_ENGRAM = "embedding tables are no expert parallelism: use torch.distributed, or a library for embeddings"
_NO_PIPELINE = "pipeline stages are no expert parallelism: use torch.distributed.pipelining, or send and recv"
_NO_GATHER = "all-gather is no expert parallelism: use torch.distributed.all_gather_into_tensor"
_NO_BALANCE = (
    "experts' weights are moved by their owner: replicate popular experts with crossdock.nn.Placement, and bring their "
    "gradients together with crossdock.nn.sum_replica_gradients"
)
_ONE_VERB = "it is DeepEP's own; call dispatch and combine, which choose the way by themselves"

INSTEAD = {
    "engram_write": _NO_ENGRAM,
    "engram_fetch": _NO_ENGRAM,
    "get_engram_storage_size_hint": _NO_ENGRAM,
    "EngramBuffer": _NO_ENGRAM,
    "pp_set_config": _NO_PIPELINE,
    "pp_send": _NO_PIPELINE,
    "pp_recv": _NO_PIPELINE,
    "get_pp_buffer_size_hint": _NO_PIPELINE,
    "PPBuffer": _NO_PIPELINE,
    "all_gather": _NO_GATHER,
    "get_agrs_buffer_size_hint": _NO_GATHER,
    "agrs_set_config": _NO_GATHER,
    "create_agrs_session": _NO_GATHER,
    "destroy_agrs_session": _NO_GATHER,
    "agrs_new_session": _NO_GATHER,
    "agrs_get_inplace_tensor": _NO_GATHER,
    "BucketBuffer": _NO_GATHER,
    "BucketSession": _NO_GATHER,
    "lb_get_theoretical_num_sms": _NO_BALANCE,
    "lb_prefetch_weights": _NO_BALANCE,
    "lb_reduce_grads": _NO_BALANCE,
    "BufferAllocator": _NO_BALANCE,
    "lb_allocation_plan_or_num_bytes": _NO_BALANCE,
    "internode_dispatch": _ONE_VERB,
    "internode_combine": _ONE_VERB,
    "use_logfmt": (
        "outputs go home in bfloat16, so that sums lose nothing but their last cast; leave it False, or save bytes on "
        "the way there with use_fp8=True"
    ),
    "allow_nvlink_for_low_latency_mode=False": (
        "the ranks of one host reach each other's memory over NVLink or PCIe alone; leave it True"
    ),
    "low_latency_update_mask_buffer(mask=False)": (
        "a mask is agreed on by all ranks that are left, and is for good, because a rank that has gone may have lost "
        "count; make a new buffer with all ranks, or leave it masked"
    ),
    "low_latency_clean_mask_buffer": ("some rank is masked, and a mask is for good: make a new buffer with all ranks"),
    "do_handle_copy=True": (
        "handle.topk_idx is the caller's tensor from version 2.5 on; pass a clone of it, or do_handle_copy=False"
    ),
    "get_nccl_comm_handle": "Crossdock uses no NCCL communicator: leave it out, or make one by torch.distributed",
    "NCCLCommHandle": "Crossdock uses no NCCL communicator: leave it out, or make one by torch.distributed",
}
"""By the name that a program uses."""


def error(name: str) -> NotSupported:
    """What to raise where a program uses such a name."""
    return NotSupported(f"{name} is not supported: {INSTEAD[name]}")


class _Refused:
    """A class that is there to be found, and cannot be made."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise error(type(self).__name__)


class EngramBuffer(_Refused):
    """See ``INSTEAD``."""


class PPBuffer(_Refused):
    """See ``INSTEAD``."""


class BucketBuffer(_Refused):
    """See ``INSTEAD``."""


class BucketSession(_Refused):
    """See ``INSTEAD``."""


class BufferAllocator(_Refused):
    """See ``INSTEAD``."""


class NCCLCommHandle(_Refused):
    """See ``INSTEAD``."""


def refusing(*names: str) -> Callable[[type[Class]], type[Class]]:
    """Gives a class methods of these names, which say what to use instead when they are called."""

    def with_methods(cls: type[Class]) -> type[Class]:
        for name in names:
            setattr(cls, name, _method(name))
        return cls

    return with_methods


def _method(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise error(name)

    refuse.__name__ = name
    refuse.__doc__ = f"Not supported: {INSTEAD[name]}."
    return refuse
