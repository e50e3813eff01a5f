"""How received rows lie in memory: Compact, Expanded, Padded. Each owns its capacity formula and its segment starts.

Shapes: P ranks, M max_tokens of a rank, K top-k, L local experts, C capacity in rows, A alignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from crossdock.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of laying out received rows: a rank's rows lie in segments, one per block of rows that peers send it.

    Args:
        capacity: rows (Compact, Expanded) or rows per expert (Padded) that a receive slot has room for; None: the
            worst case, so that no routing can overflow.
    """

    per_pick: ClassVar[bool]
    """Whether a row belongs to one (token, expert) pick, and a segment to an expert; else to one (token, rank) pair."""
    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.capacity is not None and self.capacity < 1:
            raise ConfigError(f"capacity={self.capacity} rows; pass a positive number, or None for the worst case")

    def worst_case(self, *, num_ranks: int, max_tokens: int, num_topk: int, num_local_experts: int) -> int:
        """The capacity that no routing can overflow."""
        raise NotImplementedError

    def segment_starts(self, num_rows: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
        """First row of each segment of a rank, and the end: int64 [..., n + 1] from row counts int64 [..., n]."""
        starts = np.zeros((*num_rows.shape[:-1], num_rows.shape[-1] + 1), dtype=np.int64)
        np.cumsum(num_rows, axis=-1, out=starts[..., 1:])
        return starts


@dataclass(frozen=True, kw_only=True)
class Compact(Layout):
    """One row per (token, destination rank), by source rank, then source token: ``[R, H]``, one segment.

    Capacity at most P * M.
    """

    per_pick = False

    def worst_case(self, *, num_ranks: int, max_tokens: int, num_topk: int, num_local_experts: int) -> int:
        return num_ranks * max_tokens


@dataclass(frozen=True, kw_only=True)
class Expanded(Layout):
    """One row per (token, expert), expert-major, each expert's segment starting at a multiple of ``alignment``.

    ``[R, H]`` with ``expert_offsets`` int32 [L + 1]; within a segment by source rank, then source token; the rows that
    alignment leaves between segments are zero on every call. Capacity at most ``P * M * min(K, L) + L * (A - 1)``,
    rounded up to A.
    """

    per_pick = True
    alignment: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment < 1:
            raise ConfigError(f"alignment={self.alignment} rows; pass a positive number, 1 for none")

    def worst_case(self, *, num_ranks: int, max_tokens: int, num_topk: int, num_local_experts: int) -> int:
        num_rows = num_ranks * max_tokens * min(num_topk, num_local_experts)
        return -(-(num_rows + num_local_experts * (self.alignment - 1)) // self.alignment) * self.alignment

    def segment_starts(self, num_rows: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
        return super().segment_starts(-(-num_rows // self.alignment) * self.alignment, capacity)


@dataclass(frozen=True, kw_only=True)
class Padded(Layout):
    """One fixed block of ``capacity`` rows per local expert: ``[L, C, H]``, with counts on the device.

    Within a block by source rank, then source token. Capacity (per expert) at most P * M. Rows behind an expert's
    count are left as they were.
    """

    per_pick = True

    def worst_case(self, *, num_ranks: int, max_tokens: int, num_topk: int, num_local_experts: int) -> int:
        return num_ranks * max_tokens

    def segment_starts(self, num_rows: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
        starts = np.arange(num_rows.shape[-1] + 1, dtype=np.int64) * capacity
        return np.broadcast_to(starts, (*num_rows.shape[:-1], starts.size))
