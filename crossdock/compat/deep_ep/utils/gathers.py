"""Gathers over gloo as programs for NCCL call them: outputs of any shape, tensors of any dtype on any device.

DeepEP's test programs gather by ``torch.distributed`` what all ranks have, and several ranks can share a GPU over gloo
alone, which takes host tensors of the numbers of its types, and outputs of one shape.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_as_nccl_does() -> None:
    """From now on ``all_gather`` and ``all_gather_into_tensor`` of this process do; for programs of tests alone."""
    if getattr(dist.all_gather, "is_crossdocks", False):
        return
    dist.all_gather, dist.all_gather_into_tensor = _wrapped(dist.all_gather)


def _wrapped(gather: Any) -> tuple[Any, Any]:
    def all_gather(outputs: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> None:
        """Fills ``outputs``, by rank; done when it returns."""
        raw = _bytes(tensor)
        every = [torch.empty_like(raw) for _ in outputs]
        gather(every, raw, group=group)
        for output, theirs in zip(outputs, every, strict=True):
            output.copy_(theirs.view(tensor.dtype).view(output.shape))

    def all_gather_into_tensor(output: Tensor, tensor: Tensor, group: Any = None, async_op: bool = False) -> None:
        """Fills ``output``, one rank's behind the other's, whatever its shape; done when it returns."""
        num_ranks = dist.get_world_size(group)
        every = [torch.empty_like(tensor) for _ in range(num_ranks)]
        all_gather(every, tensor, group)
        output.copy_(torch.stack(every).view(output.shape))

    all_gather.is_crossdocks = True  # type: ignore[attr-defined]
    return all_gather, all_gather_into_tensor


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
