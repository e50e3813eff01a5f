"""Memory layout of the scales of a receive slot: one formula for the arena, views, gathers and kernels.

Letters: N segments, R rows of a segment, R' rows for which a segment has room, G scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossdock.wire import Quantized

TMA_BYTES = 16
"""NVIDIA's tensor memory accelerator requires every stride but the innermost to be a multiple of these bytes."""


@dataclass(frozen=True, kw_only=True)
class ScaleLayout:
    """The scales of one slot: row-major ``[N * R, G]``, or column-major ``[N, G, R']``.

    In column-major order the scales of one group are adjacent for all rows of a segment, and groups are a multiple of
    ``TMA_BYTES`` apart: R' is rounded up accordingly.

    Args:
        num_segments: N if rows have a leading dimension of segments (Padded); None: one segment.
        segment_rows: R, the capacity of a segment in rows.
        num_scales: G; for packed scales, the number of int32 words.
        dtype: dtype of a scale; for packed scales int32.
        column_major: the order, as in ``Fp8``.
        room_rows: R', where column-major segments have room for more rows than calls use of them; None: R.

    >>> scales = ScaleLayout(num_segments=2, segment_rows=3, num_scales=5, dtype=torch.float32, column_major=True)
    >>> scales.shape, scales.offset(4), scales.group_bytes
    ((2, 5, 4), 84, 16)
    """

    num_segments: int | None
    segment_rows: int
    num_scales: int
    dtype: torch.dtype
    column_major: bool
    room_rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a slot's scales in memory, padding included."""
        num_segments = self.num_segments or 1
        if not self.column_major:
            return num_segments * self.segment_rows, self.num_scales
        of_segment = self.num_scales, self.group_bytes // self.dtype.itemsize
        return of_segment if self.num_segments is None else (num_segments, *of_segment)

    @property
    def row_bytes(self) -> int:
        """Bytes from a scale to the same group's scale of the next row in the segment."""
        return self.dtype.itemsize * (1 if self.column_major else self.num_scales)

    @property
    def group_bytes(self) -> int:
        """Bytes from a scale to the next group's scale of the same row."""
        return _room(self.room_rows or self.segment_rows, self.dtype) if self.column_major else self.dtype.itemsize

    @property
    def segment_bytes(self) -> int:
        """Bytes from a segment to the next one."""
        return self.num_scales * self.group_bytes if self.column_major else self.segment_rows * self.row_bytes

    @property
    def has_jumps(self) -> bool:
        """Whether a row's offset depends on its segment: successive ones may be further than ``row_bytes`` apart."""
        return self.column_major and (self.num_segments or 1) > 1

    def offset(self, row: int) -> int:
        """Bytes from the slot's first byte to the first scale of a row; rows are numbered over all segments."""
        segment, within = divmod(row, self.segment_rows)
        return segment * self.segment_bytes + within * self.row_bytes

    def of_block(self, slot: Tensor, rows: slice) -> Tensor:
        """The scales of n rows of one segment, ``[n, G]``: a view of the slot."""
        strides = self.row_bytes // self.dtype.itemsize, self.group_bytes // self.dtype.itemsize
        first = slot.storage_offset() + self.offset(rows.start) // self.dtype.itemsize
        return slot.as_strided((rows.stop - rows.start, self.num_scales), strides, first)

    def of_rows(self, slot: Tensor, num_rows: int) -> Tensor:
        """The scales of a slot's first rows ``[num_rows, G]``, or of each segment's ``[N, num_rows / N, G]``: a view.

        Args:
            slot: the slot's scales, of any shape.
            num_rows: rows over all segments, a multiple of N.
        """
        if self.num_segments is None:
            return self.of_block(slot, slice(0, num_rows))
        assert num_rows % self.num_segments == 0, "as many of each segment"
        segment, row, group = (
            num_bytes // self.dtype.itemsize for num_bytes in (self.segment_bytes, self.row_bytes, self.group_bytes)
        )
        shape = self.num_segments, num_rows // self.num_segments, self.num_scales
        return slot.as_strided(shape, (segment, row, group), slot.storage_offset())

    def of_own_rows(self, num_rows: int) -> ScaleLayout:
        """The same order for so many rows in memory of their own."""
        return replace(self, segment_rows=max(1, num_rows), room_rows=None)

    def room(self, scale: Tensor) -> Tensor:
        """Memory for scales ``[..., R, G]`` like these, in the same order; column-major with the padding for R rows."""
        if not self.column_major:
            return room_like(scale)
        *lead, num_rows, num_scales = scale.shape
        padded = scale.new_empty(*lead, num_scales, _room(num_rows, self.dtype) // self.dtype.itemsize)
        return padded.transpose(-1, -2)[..., :num_rows, :]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_NUMPY = {torch.uint8: np.uint8, torch.int16: np.int16, torch.int32: np.int32}


def as_integers(scale: Tensor) -> Tensor:
    """A view as integers of the same size, for torch operations that take few dtypes. Any strides."""
    return scale.view(_INTEGERS[scale.dtype.itemsize])


def room_like(rows: Tensor) -> Tensor:
    """Contiguous memory for as many; torch can fill that of few dtypes, as it does in its deterministic mode."""
    return torch.empty(rows.shape, dtype=integers_of(rows.dtype), device=rows.device).view(rows.dtype)


def parts_of(rows: Tensor | Quantized, out: Tensor | Quantized) -> list[tuple[Tensor, Tensor]]:
    """The tensors of rows, each with where it goes, as integers of the same size."""
    if isinstance(rows, Quantized) and isinstance(out, Quantized):
        return [(as_integers(each), as_integers(target)) for each, target in zip(rows, out, strict=True)]
    assert isinstance(rows, Tensor)
    assert isinstance(out, Tensor), "checked before"
    return [(as_integers(rows), as_integers(out))]


def integers_of(dtype: torch.dtype) -> torch.dtype:
    """Integers of the same size."""
    return _INTEGERS[dtype.itemsize]


def no_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Integers on the CPU, contents undefined.

    numpy asks for huge pages where it takes more than 4 MiB from the system. To write 59 MB of rows into such memory
    took 10 ms, into torch's 39: its pages of 4 KiB are each given when they are first written to.
    """
    if torch.are_deterministic_algorithms_enabled():  # torch fills what it gives, if it was told to
        return torch.empty(shape, dtype=dtype, device="cpu")
    return of_numpy(np.empty(shape, dtype=_NUMPY[dtype]))


def of_numpy(array: npt.NDArray[Any]) -> Tensor:
    """A dense array as a tensor, with strides as torch makes them.

    NumPy, since 2.4, says 0 where there are no elements. Kernels refuse that, and it is not what an op's fake has.
    """
    tensor = torch.from_numpy(array)
    return tensor if array.size else torch.empty(array.shape, dtype=tensor.dtype, device="cpu")


def _room(num_rows: int, dtype: torch.dtype) -> int:
    """Bytes of one group's scales for ``num_rows`` rows (at least one), with padding."""
    return -(-max(1, num_rows) * dtype.itemsize // TMA_BYTES) * TMA_BYTES
