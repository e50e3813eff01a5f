"""What clients write to as if it were the buffer: memory of their own, so that they overwrite nothing of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from crossdock.errors import ConfigError


class Scratch:
    """Two areas, of the bytes that a buffer was made with; each is made when it is first asked for."""

    def __init__(self, device: torch.device, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self._device = device
        self._num_bytes = {False: num_nvl_bytes, True: num_rdma_bytes}
        self._areas: dict[bool, Tensor] = {}

    def view(self, dtype: torch.dtype, size: Sequence[int] | None, offset: int, *, is_rdma: bool) -> Tensor:
        """The area from an element on: all of it, or so much that it has that size."""
        if is_rdma not in self._areas:
            with torch.inference_mode(mode=False):
                self._areas[is_rdma] = torch.zeros(self._num_bytes[is_rdma], dtype=torch.uint8, device=self._device)
        area = self._areas[is_rdma]
        whole = area[: area.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if size is None:
            return whole[offset:]
        num_elements = math.prod(size)
        if offset + num_elements > whole.numel():
            raise ConfigError(
                f"size={list(size)} from element {offset} on; the area has {whole.numel()} elements of {dtype}: make "
                f"the buffer with more bytes"
            )
        return whole[offset : offset + num_elements].view(*size)
