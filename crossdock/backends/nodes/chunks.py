"""How rows lie in a chunk: one array after the other, so that one message carries them and a gather takes each.

Letters: n rows of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from crossdock.arena import Arena
from crossdock.errors import ConfigError
from crossdock.spec import Spec
from crossdock.transport.lanes import HEADER_BYTES
from crossdock.transport.rail import Box

_ALIGN = 64


class ChunkFormat(NamedTuple):
    """The arrays of a chunk, by the bytes that a row has in each; the same at both ends, as words agree on it."""

    widths: tuple[int, ...]

    def most_rows(self, box: Box) -> int:
        """Rows of a full chunk.

        Raises:
            ConfigError: not one row fits.
        """
        room = box.chunk_bytes - HEADER_BYTES - len(self.widths) * _ALIGN
        row = sum(self.widths)
        if row > room:
            raise ConfigError(
                f"a row of {row:,} bytes does not fit a chunk of {box.chunk_bytes:,} bytes, {room:,} of them for rows; "
                f"pass a rail whose chunks are larger, such as crossdock.transport.rails.dist.DistEngine(box=Box("
                f"chunk_bytes={-(-(row + box.chunk_bytes - room) // 4096) * 4096}))"
            )
        return max(1, room // max(1, row))

    def num_bytes(self, num_rows: int) -> int:
        """Bytes of so many rows, behind the header."""
        return sum(_room(width * num_rows) for width in self.widths)

    def arrays(self, memory: Tensor, num_rows: int) -> list[Tensor]:
        """uint8 [n, width] each: views of a chunk's memory."""
        views, at = [], 0
        for width in self.widths:
            views.append(memory[at : at + width * num_rows].view(num_rows, width))
            at += _room(width * num_rows)
        return views


def check_row(spec: Spec, arena: Arena, box: Box) -> None:
    """Raises ConfigError where a row of a Spec, with all that may travel beside it, does not fit a chunk."""
    num_scales = spec.wire.num_scales(spec.hidden) * spec.wire.scale_dtype.itemsize
    ids = 4 * (1 + 2 * spec.num_topk)
    ChunkFormat((spec.wire.data_bytes(spec.hidden), num_scales, ids, spec.extra_bytes, 8 * spec.num_topk)).most_rows(
        box
    )
    of_picks = arena.return_bytes * (spec.num_topk if spec.layout.per_pick else 1)
    ChunkFormat((arena.row_bytes, of_picks)).most_rows(box)


def _room(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN
