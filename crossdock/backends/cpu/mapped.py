"""The segments of ranks that map each other's memory, as the regions of a Spec and as one matrix of rows.

Letters: H hidden.
"""

from __future__ import annotations

from crossdock.arena import Arena
from crossdock.transport.segments import Segments


class Mapped:
    """Regions by rank and name; and all memory as rows of the combine format.

    Args:
        segments: of all ranks, or of those of a node; they are counted from the first.
    """

    def __init__(self, arena: Arena, segments: Segments) -> None:
        self._arena = arena
        side_by_side = segments.side_by_side(arena.row_bytes)
        memory, self._stride = side_by_side
        each = [side_by_side.segment(i, arena.num_bytes) for i in range(segments.num_ranks)]
        self.at = [{name: arena.view(segment, name) for name in arena.regions} for segment in each]
        """By rank, and name."""
        row_bytes = arena.row_bytes
        last_row_end = (segments.num_ranks - 1) * self._stride + arena.num_bytes // row_bytes * row_bytes
        self.all_rows = memory[:last_row_end].view(arena.spec.combine_dtype).view(-1, arena.spec.hidden)
        """[all, H]: outputs and returned rows of every rank are numbers in this matrix."""

    def first_row(self, name: str, rank: int, slot: int) -> int:
        """The number, in the matrix of all rows, of a slot's first row in a region of a rank."""
        region = self._arena[name]
        return (rank * self._stride + region.offset) // self._arena.row_bytes + slot * region.shape[1]
