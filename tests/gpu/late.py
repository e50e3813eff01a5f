"""A soak's inputs on CUDA: some come late on the stream, and all are scribbled over as soon as a caller may do that."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

MEAN_CYCLES = 1_000_000
"""Half a millisecond."""


def sleep(rng: np.random.Generator) -> None:
    """The current stream stands still for a while; the host does not."""
    torch.cuda._sleep(int(rng.exponential(MEAN_CYCLES)))


def bring(tensors: tuple[Tensor | None, ...], device: torch.device, rng: np.random.Generator) -> list[Tensor | None]:
    """Copies on the device; a fifth of the time, made on the stream long after the host has gone on."""
    moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
    if rng.random() < 0.2:
        sleep(rng)
        moved = [None if tensor is None else tensor.clone() for tensor in moved]
    return moved


class Call:
    """A call that was started, whose inputs become NaN or -1 once it has been waited for, without another sync."""

    def __init__(self, pending: Any, inputs: list[Tensor | None]) -> None:
        self._pending = pending
        self._inputs = inputs

    def wait(self) -> Any:
        """What the call's own ``wait()`` gives."""
        result = self._pending.wait()
        for tensor in self._inputs:
            if tensor is not None and tensor.numel():
                tensor.reshape(-1).view(torch.uint8).fill_(255)
        self._inputs.clear()
        return result
