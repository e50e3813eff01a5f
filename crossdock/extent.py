"""How much of a receive slot the calls of one ``max_tokens`` use: rows, segments, places of scales.

A Spec's M is the most that a call can have. A call may agree on fewer (``dispatch(max_tokens=)``): its rows then lie as
those of a Spec with that M, at the beginning of the same receive slot.

Letters: P ranks, M max_tokens, C capacity in rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from crossdock.layout import Padded
from crossdock.scales import ScaleLayout
from crossdock.spec import Spec

RowCount = Literal["exact", "capacity"]
"""Whether a dispatch gives as many rows as came, or as many as there is room for."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Extent:
    """What a call's M makes of a receive slot. Made by ``of``."""

    spec: Spec
    """The Spec of the slot with the call's M."""
    max_tokens: int
    """M, the most tokens of a rank; sources of rows are numbered ``rank * M + token``."""
    capacity: int
    """C, rows for which there is room (Padded: of each expert)."""
    slot_rows: int
    """Rows of all segments together."""
    most_rows: int
    """Rows that a call may bring: ``slot_rows``, or where they are staged any routing's."""
    may_overflow: bool
    """Whether some routing sends more rows than there is room for."""
    scales: ScaleLayout
    """Where scales of these rows lie in the slot; ``num_scales`` is 0 for an unquantized wire."""

    def room(self, row_count: RowCount) -> int:
        """Rows for which a dispatch has room (Padded: of each expert): C, or what may come of staged ones."""
        return self.most_rows if self.spec.is_staged and row_count == "exact" else self.capacity

    @staticmethod
    def of(spec: Spec, num_ranks: int, *, max_tokens: int | None = None) -> Extent:
        """Of calls of at most so many tokens of a rank, in the slots of a Spec; None: of the Spec's own M.

        Raises:
            ConfigError: the Spec's worst case is too much for a default (``Spec.capacity``).

        >>> from crossdock.layout import Padded
        >>> spec = Spec(num_experts=8, num_topk=2, hidden=64, max_tokens=16, layout=Padded())
        >>> extent = Extent.of(spec, num_ranks=4, max_tokens=2)
        >>> extent.capacity, extent.slot_rows, Extent.of(spec, num_ranks=4).slot_rows
        (8, 16, 128)
        """
        whole = spec.capacity(num_ranks)
        of_call = spec if max_tokens is None else replace(spec, max_tokens=max_tokens)
        is_padded, num_local = isinstance(spec.layout, Padded), spec.num_local_experts(num_ranks)
        capacity = of_call.capacity(num_ranks)
        worst = spec.layout.worst_case(
            num_ranks=num_ranks,
            max_tokens=of_call.max_tokens,
            num_topk=spec.num_topk,
            num_local_experts=num_local,
        )
        return Extent(
            spec=of_call,
            max_tokens=of_call.max_tokens,
            capacity=capacity,
            slot_rows=of_call.num_slot_rows(num_ranks),
            most_rows=of_call.most_rows(num_ranks),
            may_overflow=capacity < worst,
            scales=ScaleLayout(
                num_segments=num_local if is_padded else None,
                segment_rows=capacity if is_padded else whole,
                num_scales=spec.wire.num_scales(spec.hidden),
                dtype=spec.wire.scale_dtype,
                column_major=spec.wire.column_major,
                room_rows=whole,
            ),
        )
