"""Limits of a GPU's memory, measured on all ranks at once: copies, and rows read once and written several times.

Both stay within the GPU's own memory. Links between GPUs are slower, and are not measured here.

Letters: D destinations of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

COPIED_BYTES = 256 * 2**20
"""Bytes that each rank copies: several times the L2 cache."""
_ROW_BYTES = 128
"""Row sizes are rounded up to a multiple of this, for the widest stores."""
_PER_SM_AND_WARPS = ((1, 16), (2, 16), (4, 8))
"""Programs per SM, and warps per program; which is fastest depends on the number of SMs."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One way to move ``num_bytes`` bytes."""

    how: str
    num_bytes: int
    run: Callable[[], object]


def copies(device: torch.device) -> list[Move]:
    """Ways to copy a block; ``num_bytes`` counts bytes read and bytes written."""
    source = torch.ones(COPIED_BYTES // 8, dtype=torch.int64, device=device)
    destination = torch.empty_like(source)
    by_torch = Move(how="copy_", num_bytes=2 * COPIED_BYTES, run=lambda: destination.copy_(source))
    by_rows = [
        Move(how=move.how, num_bytes=2 * move.num_bytes, run=move.run) for move in writes(device, 8192, destinations=1)
    ]
    return [by_torch, *by_rows]


def writes(device: torch.device, row_bytes: int, *, destinations: int) -> list[Move]:
    """Ways to write rows of about ``row_bytes`` to D destinations each; ``num_bytes`` counts bytes written."""
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
