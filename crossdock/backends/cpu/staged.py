"""Staged rows on CPUs: what they are expanded into, one copy for each pick of their token here.

Letters: R rows received, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from crossdock.backends.cpu.arrived import Segmented
from crossdock.scales import as_integers
from crossdock.wire import Quantized

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def expand_rows(
    own: Mapping[str, Tensor], plan: Segmented, rows: Tensor | Quantized, *, region: str, slot: int, num_pairs: int
) -> None:
    """Fills ``rows`` (of ``RowMaker``) from the staged rows of a slot; 0 where none belongs.

    Args:
        own: the regions of this rank's segment.
        region: where these are.
        num_pairs: so many, one for each (token, rank) pair.
    """
    came = own["partial_rows"][slot, :num_pairs].numpy()
    pairs, picks = np.nonzero(came >= 0)
    pair_of_row = np.zeros(plan.num_rows, dtype=np.int64)
    pair_of_row[came[pairs, picks]] = pairs
    idx = torch.from_numpy(pair_of_row)
    parts = (
        [(own[region], rows)] if isinstance(rows, Tensor) else [(own["data"], rows.data), (own["scale"], rows.scale)]
    )
    for source, out in parts:
        _expand(source[slot, :num_pairs], out, idx, list(_blocks(plan, out.shape[0])))


def _blocks(plan: Segmented, num_rows: int) -> Iterator[tuple[int, int, int]]:
    """Rows that follow each other without a gap: the first, and the ends of them and of the gap behind them."""
    starts, lengths = plan.segment_starts.tolist(), plan.segment_rows.tolist()
    first = 0
    for start, length, end in zip(starts, lengths, [*starts[1:-1], num_rows], strict=False):
        if start + length < end or end == num_rows:
            yield first, start + length, end
            first = end


def _expand(staged: Tensor, out: Tensor, idx: Tensor, blocks: list[tuple[int, int, int]]) -> None:
    """Row ``idx[r]`` of the staged ones becomes row r of ``out``, and gaps become 0."""
    if out.stride(1) == 1:
        staged, out = _as_words(staged, out)
        for first, last, end in blocks:
            torch.index_select(staged, 0, idx[first:last], out=out[first:last])
            out[last:end].zero_()
        return
    staged, out = as_integers(staged), as_integers(out)  # column-major scales
    for first, last, end in blocks:
        out[first:last] = staged.index_select(0, idx[first:last])
        out[last:end] = 0


def _as_words(*rows: Tensor) -> list[Tensor]:
    """Rows [n, bytes] as the widest integers that divide them all."""
    raw = [each.view(torch.uint8) for each in rows]
    size = math.gcd(8, *(n for each in raw for n in (each.shape[1], each.stride(0), each.storage_offset())))
    return [each.view(_WORDS[size]) for each in raw]
