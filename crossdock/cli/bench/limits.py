"""Limits of a GPU's memory and of its link, measured on all ranks at once.

Of memory: copies, and rows read once and written several times, both within the GPU's own. Of the link, where each rank
has a GPU of its own: copies to the next rank's memory, and from it, so that every link is busy in both directions.

Letters: D destinations of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COPIED_BYTES = 256 * 2**20
"""Bytes that each rank copies: several times the L2 cache."""
_LINK_ROW_BYTES = 16384
"""Bytes of a row that is copied over a link."""
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


def stores(here: Tensor, there: Tensor) -> list[Move]:
    """Ways to copy ``here``, uint8 ``[n]`` of this GPU's memory, into a peer's memory ``there``, uint8 ``[n]``."""
    return _over_link(here, there)


def loads(here: Tensor, there: Tensor) -> list[Move]:
    """Ways to copy ``there``, uint8 ``[n]`` of a peer's memory, into this GPU's memory ``here``, uint8 ``[n]``."""
    return _over_link(there, here)


def _over_link(source: Tensor, destination: Tensor) -> list[Move]:
    num_rows = source.numel() // _LINK_ROW_BYTES
    rows, placed = (t[: num_rows * _LINK_ROW_BYTES].view(torch.int64).view(num_rows, -1) for t in (source, destination))
    by_engine = Move(how="copy engine", num_bytes=placed.nbytes, run=lambda: placed.copy_(rows))
    return [by_engine, *_by_programs(rows, placed[None])]


def writes(device: torch.device, row_bytes: int, *, destinations: int) -> list[Move]:
    """Ways to write rows of about ``row_bytes`` to D destinations each; ``num_bytes`` counts bytes written."""
    words = -(-row_bytes // _ROW_BYTES) * _ROW_BYTES // 8
    num_rows = max(1, COPIED_BYTES // (words * 8 * destinations))
    rows = torch.ones(num_rows, words, dtype=torch.int64, device=device)
    return _by_programs(rows, torch.empty(destinations, num_rows, words, dtype=torch.int64, device=device))


def _by_programs(rows: Tensor, placed: Tensor) -> list[Move]:
    """Ways to write rows, int64 ``[n, words]``, to ``placed [D, n, words]`` by programs."""
    from crossdock.cli.bench.write_rows import write_rows  # noqa: PLC0415 - it imports triton, which CPUs do without

    destinations, num_rows, words = placed.shape
    num_sms = torch.cuda.get_device_properties(rows.device).multi_processor_count
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
