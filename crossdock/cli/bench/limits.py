"""What a GPU can do at all, measured by all ranks at once: copies, and rows that are read once and written many times.

Both move the GPU's own memory. Where ranks have a GPU each, links are slower than that, and are not measured here.

Letters: D destinations of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

COPIED_BYTES = 256 * 2**20
"""Of a block that is copied: several times the second-level cache, for each rank."""
_ROW_BYTES = 128
"""Rows are taken as whole multiples of this, so that the widest stores fit."""
_PER_SM_AND_WARPS = ((1, 16), (2, 16), (4, 8))
"""Programs per SM, and warps of each: shapes among which the best one differs by the number of SMs."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One way to move ``num_bytes``."""

    how: str
    num_bytes: int
    run: Callable[[], object]


def copies(device: torch.device) -> list[Move]:
    """Ways to copy a block; bytes as read and as written."""
    source = torch.ones(COPIED_BYTES // 8, dtype=torch.int64, device=device)
    destination = torch.empty_like(source)
    by_torch = Move(how="copy_", num_bytes=2 * COPIED_BYTES, run=lambda: destination.copy_(source))
    by_rows = [
        Move(how=move.how, num_bytes=2 * move.num_bytes, run=move.run) for move in writes(device, 8192, destinations=1)
    ]
    return [by_torch, *by_rows]


def writes(device: torch.device, row_bytes: int, *, destinations: int) -> list[Move]:
    """Ways to write rows of about that size to D places each; bytes as written."""
    from crossdock.cli.bench.write_rows import write_rows  # noqa: PLC0415 - it imports triton, which CPUs do without

    words = -(-row_bytes // _ROW_BYTES) * _ROW_BYTES // 8
    num_rows = max(1, COPIED_BYTES // (words * 8 * destinations))
    rows = torch.ones(num_rows, words, dtype=torch.int64, device=device)
    placed = torch.empty(destinations, num_rows, words, dtype=torch.int64, device=device)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    block = 1 << (words - 1).bit_length()

    def runner(num_programs: int, num_warps: int) -> Callable[[], object]:
        return lambda: write_rows[(num_programs,)](
            rows, placed, num_rows, NUM_COPIES=destinations, WORDS=words, BLOCK=block, num_warps=num_warps
        )

    return [
        Move(
            how=f"{per_sm * num_sms} programs of {warps} warps, {destinations} places",
            num_bytes=placed.nbytes,
            run=runner(per_sm * num_sms, warps),
        )
        for per_sm, warps in _PER_SM_AND_WARPS
    ]
