"""Where the scales of a receive slot's rows lie: one formula, for the arena, the views, the gathers and the kernels.

Letters: N segments, R rows of a segment, R' as many with padding, G scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TMA_BYTES = 16
"""NVIDIA's tensor memory accelerator wants strides, but the innermost, that are multiples of it."""


@dataclass(frozen=True, kw_only=True)
class ScaleLayout:
    """The scales of one slot: rows one behind the other ``[N * R, G]``, or column-major ``[N, G, R']``.

    Column-major, the scales of one group lie side by side for all rows of a segment, and groups are a multiple of
    ``TMA_BYTES`` apart: R' is R rounded up to that.

    Args:
        num_segments: N, where rows have a leading dimension of segments (Padded); None: all rows are in one.
        segment_rows: R, the rows that a segment has room for.
        num_scales: G; of packed scales, words.
        dtype: of a scale; of packed ones, of a word.

    >>> scales = ScaleLayout(num_segments=2, segment_rows=3, num_scales=5, dtype=torch.float32, column_major=True)
    >>> scales.shape, scales.offset(4), scales.group_bytes
    ((2, 5, 4), 84, 16)
    """

    num_segments: int | None
    segment_rows: int
    num_scales: int
    dtype: torch.dtype
    column_major: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a slot in memory, without gaps."""
        num_segments = self.num_segments or 1
        if not self.column_major:
            return num_segments * self.segment_rows, self.num_scales
        of_segment = self.num_scales, self.group_bytes // self.dtype.itemsize
        return of_segment if self.num_segments is None else (num_segments, *of_segment)

    @property
    def row_bytes(self) -> int:
        """Bytes from a row's scales to those of the next row in its segment."""
        return self.dtype.itemsize * (1 if self.column_major else self.num_scales)

    @property
    def group_bytes(self) -> int:
        """Bytes from a scale of a row to the next of that row."""
        return _room(self.segment_rows, self.dtype) if self.column_major else self.dtype.itemsize

    @property
    def segment_bytes(self) -> int:
        """Bytes from a segment to the next."""
        return self.num_scales * self.group_bytes if self.column_major else self.segment_rows * self.row_bytes

    @property
    def has_jumps(self) -> bool:
        """Whether the first row of a segment is not ``row_bytes`` behind the last of the one before."""
        return self.segment_bytes != self.segment_rows * self.row_bytes and (self.num_segments or 1) > 1

    def offset(self, row: int) -> int:
        """Bytes from a slot's first byte to the first scale of a row, counted over all segments."""
        segment, within = divmod(row, self.segment_rows)
        return segment * self.segment_bytes + within * self.row_bytes

    def of_block(self, slot: Tensor, rows: slice) -> Tensor:
        """``[n, G]``, the scales of some rows of one segment, over the slot's memory."""
        strides = self.row_bytes // self.dtype.itemsize, self.group_bytes // self.dtype.itemsize
        first = slot.storage_offset() + self.offset(rows.start) // self.dtype.itemsize
        return slot.as_strided((rows.stop - rows.start, self.num_scales), strides, first)

    def of_rows(self, slot: Tensor, num_rows: int) -> Tensor:
        """The scales of a slot's first rows, or of the first of each segment, over the slot's memory.

        ``[num_rows, G]``, or ``[N, num_rows / N, G]``.
        """
        if self.num_segments is None:
            return self.of_block(slot, slice(0, num_rows))
        assert num_rows % self.num_segments == 0, "as many of each segment"
        segment, row, group = (
            num_bytes // self.dtype.itemsize for num_bytes in (self.segment_bytes, self.row_bytes, self.group_bytes)
        )
        shape = self.num_segments, num_rows // self.num_segments, self.num_scales
        return slot.as_strided(shape, (segment, row, group), slot.storage_offset())

    def copied(self, scale: Tensor) -> Tensor:
        """The same scales ``[..., R, G]`` in memory of their own, column-major with the padding that R rows need."""
        if not self.column_major:
            return scale.clone()
        *lead, num_rows, num_scales = scale.shape
        padded = scale.new_empty(*lead, num_scales, _room(num_rows, self.dtype) // self.dtype.itemsize)
        own = padded.transpose(-1, -2)[..., :num_rows, :]
        as_integers(own).copy_(as_integers(scale))
        return own


def as_integers(scale: Tensor) -> Tensor:
    """Scales as integers of their size, which all of torch can move and zero; the same memory, whatever its strides."""
    return scale.view(torch.int32 if scale.dtype.itemsize == 4 else torch.uint8)


def _room(num_rows: int, dtype: torch.dtype) -> int:
    """Bytes of one group's scales for as many rows, padded; of no row, for one."""
    return -(-max(1, num_rows) * dtype.itemsize // TMA_BYTES) * TMA_BYTES
