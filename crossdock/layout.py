"""Layouts of received rows: Compact, Expanded, Padded. Each has its own capacity formula and segment starts.

Shapes: P ranks, M max_tokens of a rank, K top-k, L local experts, C capacity in rows, A alignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from crossdock.fields import set_flag, set_integer


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a rank's received rows are divided into segments and ordered. Base class of the three layouts.

    Args:
        capacity: rows of a receive slot (Compact, Expanded), or rows per expert (Padded). None: the worst case, which
            no routing can overflow.

    Raises:
        ConfigError: the capacity is no positive integer.
    """

    per_pick: ClassVar[bool]
    """True: a row is one (token, expert) pick, a segment one expert. False: a row is one (token, rank) pair."""
    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.capacity is not None:
            set_integer(self, "capacity", " rows; pass a positive integer, or None for the worst case", least=1)

    def worst_case(self, *, num_ranks: int, max_tokens: int, num_topk: int, num_local_experts: int) -> int:
        """The smallest capacity that no routing can overflow, in rows (Padded: rows per expert)."""
        raise NotImplementedError

    def segment_starts(self, num_rows: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
        """First row of each segment, and the end of the last: int64 [..., n + 1] from row counts int64 [..., n]."""
        starts = np.zeros((*num_rows.shape[:-1], num_rows.shape[-1] + 1), dtype=np.int64)
        np.cumsum(num_rows, axis=-1, out=starts[..., 1:])
        return starts


@dataclass(frozen=True, kw_only=True)
class Compact(Layout):
    """One row per (token, rank), ordered by source rank, then source token: ``[R, H]``, one segment.

    Worst case: P * M rows.
    """

    per_pick = False

    def worst_case(self, *, num_ranks: int, max_tokens: int, num_topk: int, num_local_experts: int) -> int:
        return num_ranks * max_tokens


@dataclass(frozen=True, kw_only=True)
class Expanded(Layout):
    """One row per (token, expert), expert-major: ``[R, H]``, with ``recv.expert_offsets`` int32 [L + 1].

    Each expert's segment starts at a multiple of ``alignment`` and is ordered by source rank, then source token. Every
    dispatch zeroes the padding rows behind a segment. Worst case: ``P * M * min(K, L) + L * (A - 1)`` rows, rounded up
    to a multiple of A.

    With ``staged`` the worst case needs no memory: a token's row arrives once at each rank, in P * M rows of a slot,
    and the receiver copies it for each local expert into a tensor that is its caller's. ``recv.x`` never goes stale,
    has exactly the rows that came, and a dispatch raises no CapacityError for them. Outputs are pushed in a combine,
    from any tensor (``recv.output_rows()`` makes one). A receiver without memory for the tensor fails on all ranks.

    Args:
        capacity: see ``Layout``. With ``staged``: rows of the tensor in a dispatch with ``rows="capacity"``, for which
            the host is not told how many came; those that hold none are 0. None: only ``rows="exact"`` is allowed.
        alignment: A, rows; 1 for no padding.
        staged: rows arrive once per rank, and the receiver expands them; else they arrive expanded in the slot.
    """

    per_pick = True
    alignment: int = 1
    staged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        set_integer(self, "alignment", " rows; pass a positive integer, 1 for none", least=1)
        set_flag(self, "staged")

    def worst_case(self, *, num_ranks: int, max_tokens: int, num_topk: int, num_local_experts: int) -> int:
        num_rows = num_ranks * max_tokens * min(num_topk, num_local_experts)
        return -(-(num_rows + num_local_experts * (self.alignment - 1)) // self.alignment) * self.alignment

    def segment_starts(self, num_rows: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
        return super().segment_starts(-(-num_rows // self.alignment) * self.alignment, capacity)


@dataclass(frozen=True, kw_only=True)
class Padded(Layout):
    """One block of ``capacity`` rows per local expert: ``[L, C, H]``; ``num_tokens_per_expert`` is on the device.

    A block is ordered by source rank, then source token. Rows behind an expert's count are not written. Worst case:
    P * M rows per expert.
    """

    per_pick = True

    def worst_case(self, *, num_ranks: int, max_tokens: int, num_topk: int, num_local_experts: int) -> int:
        return num_ranks * max_tokens

    def segment_starts(self, num_rows: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
        starts = np.arange(num_rows.shape[-1] + 1, dtype=np.int64) * capacity
        return np.broadcast_to(starts, (*num_rows.shape[:-1], starts.size))
