"""How scales are shared out among programs, and where they lie, as kernels take it.

Letters: T tokens here, G scales of a row (words, where they are packed).
"""

from __future__ import annotations

import torch

from crossdock.backends.cuda.config import power_of_two
from crossdock.backends.cuda.kernels.groups import WORDS, ScalePlaces, ScalesCopied
from crossdock.scales import ScaleLayout, as_integers
from crossdock.wire import Quantized

_AT_ONCE = 1024
"""Words that a program moves at a time, at most."""
_OF_WARP = 256
NO_SCALES = ScalesCopied(SCALES=0, WORD=WORDS[1], SIZE=1, PIECE=1, TOKENS=1)


def places_of(layout: ScaleLayout, *, word_bytes: int | None = None) -> ScalePlaces:
    """A layout as kernels take it; see ``kernels.scales``. Only column-major does a slot's capacity show in it.

    Args:
        word_bytes: of the words as which scales without gaps are moved, however wide they are.
    """
    return ScalePlaces(
        SEGMENT_BYTES=layout.segment_bytes if layout.has_jumps else 0,
        ROW_BYTES=layout.row_bytes,
        GROUP_BYTES=word_bytes or layout.group_bytes,
    )


def shared_out(num_scales: int, word_bytes: int, num_warps: int) -> ScalesCopied:
    """So many words of a row, and how many of them, and of rows, a program moves at a time."""
    at_once = min(_AT_ONCE, _OF_WARP * num_warps)
    piece = min(power_of_two(num_scales), at_once)
    return ScalesCopied(
        SCALES=num_scales, WORD=WORDS[word_bytes], SIZE=word_bytes, PIECE=piece, TOKENS=at_once // piece
    )


def dtype_of(num_bytes: int) -> torch.dtype:
    """Whole numbers of so many bytes."""
    return {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[num_bytes]


def as_kernels_take(x: Quantized) -> Quantized:
    """Quantised rows and their scales as integers: of dtypes that every target knows."""
    return Quantized(as_integers(x.data), as_integers(x.scale))
