"""V1's masks, as far as native ones go: of ranks that are gone, agreed on by all that are left, for good.

Letters: R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.compat.deep_ep import refused
from crossdock.compat.deep_ep.engine import Engine
from crossdock.errors import ConfigError


class Masks:
    """Which ranks are left out."""

    def __init__(self, engine: Engine, *, is_enabled: bool) -> None:
        self._engine = engine
        self._is_enabled = is_enabled

    def update(self, rank: int, *, mask: bool) -> None:
        """Masks a rank that is gone; to take a mask back is not supported."""
        self._check()
        if not 0 <= rank < self._engine.num_ranks:
            raise ConfigError(f"rank_to_mask={rank}; ranks are 0 to {self._engine.num_ranks - 1}")
        if mask and rank not in self._engine.connection.masked:
            self._engine.connection.mask(rank)
        elif not mask and rank in self._engine.connection.masked:
            raise refused.error("low_latency_update_mask_buffer(mask=False)")

    def query(self, status: Tensor) -> None:
        """Fills int32 [R]."""
        self._check()
        num_ranks = self._engine.num_ranks
        if status.dtype != torch.int32 or tuple(status.shape) != (num_ranks,):
            raise ConfigError(f"mask_status is {status.dtype} {list(status.shape)}; pass int32 [{num_ranks}]")
        status.zero_()
        for rank in self._engine.connection.masked:
            status[rank].fill_(1)

    def clean(self) -> None:
        """Nothing, while nobody is masked."""
        self._check()
        if self._engine.connection.masked:
            raise refused.error("low_latency_clean_mask_buffer")

    def _check(self) -> None:
        if not self._is_enabled:
            raise ConfigError("a mask call of a buffer without enable_shrink=True; pass that when it is made")
