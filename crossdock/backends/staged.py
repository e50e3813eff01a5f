"""Memory that staged rows are expanded into: a tensor of the caller's, and of narrow rows their scales.

Letters: R rows received.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.errors import TransportError
from crossdock.scales import integers_of
from crossdock.wire import Quantized


class RowMaker:
    """Makes memory for expanded rows, of exactly as many as are asked for.

    Args:
        empty: makes integers of a shape and dtype, contents undefined: of all dtypes there is memory, but torch cannot
            fill that of some.
    """

    def __init__(self, arena: Arena, empty: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> None:
        regions = [arena[arena.region_of_rows(unquantized=unquantized)] for unquantized in (False, True)]
        self._rows = [(region.shape[-1], region.dtype, integers_of(region.dtype)) for region in regions]
        """Columns and dtype of rows in the wire's format, and of unquantized ones."""
        self._row_bytes = arena.spec.row_bytes(), arena.row_bytes
        self._scales, self._num_scales = arena.scales, arena.scales.num_scales
        self._scale_type = self._scales.dtype, integers_of(self._scales.dtype)
        self._is_row_major = not self._scales.column_major
        self._empty = empty

    def rows(self, num_rows: int, *, unquantized: bool) -> Tensor | Quantized:
        """Rows ``[R, columns]`` and their scales ``[R, G]``, contents undefined.

        Raises:
            TransportError: there is not so much memory.
        """
        try:
            columns, dtype, integers = self._rows[unquantized]
            data = self._empty((num_rows, columns), integers).view(dtype)
            if unquantized or not self._num_scales:
                return data
            dtype, integers = self._scale_type
            if self._is_row_major:
                return Quantized(data, self._empty((num_rows, self._num_scales), integers).view(dtype))
            scales = self._scales.of_own_rows(num_rows)
            return Quantized(data, scales.of_rows(self._empty(scales.shape, integers).view(dtype), num_rows))
        except (RuntimeError, MemoryError) as error:
            num_bytes = num_rows * self._row_bytes[unquantized]
            raise TransportError(
                f"no memory for the {num_rows} rows that come here, {num_bytes / 2**30:.2f} GiB ({error}); this call "
                f"moves none: free some, route less, or split the batch"
            ) from error
