"""What came beside rows, read when somebody asks for it.

Letters: K top-k, R rows received.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crossdock.backends.base import Batch, Metadata
from crossdock.backends.cuda.config import power_of_two, src_rows_at_once
from crossdock.backends.cuda.kernels import metadata as kernels
from crossdock.backends.cuda.launch import Launch, Launcher
from crossdock.backends.cuda.plan import DevicePlan


class MetadataReader:
    """Takes what came with the rows of a slot out of it, into tensors of its own."""

    def __init__(self, launcher: Launcher) -> None:
        self._on = launcher.state
        self._spec = launcher.state.arena.spec
        spec, on = self._spec, self._on
        num_blocks = on.num_ranks * (on.num_local if spec.layout.per_pick else 1)
        at_once = max(1, 2048 // power_of_two(1 if spec.layout.per_pick else spec.num_topk))
        at_once = min(at_once, src_rows_at_once(num_blocks))
        self._launches: dict[bool, Launch] = {
            has_weights: launcher.bind(
                kernels.unpack_metadata,
                lambda num_rows: -(-num_rows // at_once),
                on.own,
                on.arrivals("data"),
                METADATA_WORDS=on.arena.metadata_bytes // 4,
                HAS_WEIGHTS=has_weights,
                ROWS=at_once,
                num_warps=4,
            )
            for has_weights in (False, True)
        }

    def read(self, plan: DevicePlan, batch: Batch, slot: int, num_rows: int, stream: int) -> Metadata:
        """Of the first rows of a slot, on a stream behind their arrival."""
        spec, empty = self._spec, self._on.empty
        per_row = () if spec.layout.per_pick else (spec.num_topk,)
        src_idx = empty(num_rows, dtype=torch.int32)
        local_idx = empty(num_rows, spec.num_topk, dtype=torch.int32) if per_row else None
        weights = None if batch.weights is None else empty(num_rows, *per_row, dtype=torch.float32)
        extras = tuple(empty(num_rows, *extra.shape[1:], dtype=extra.dtype) for extra in batch.extras)
        if num_rows and (plan.src_idx is None or weights is not None or extras):  # else nothing has travelled
            self._launches[weights is not None](
                num_rows,
                stream,
                plan.memory,
                plan.num_tokens,
                slot,
                src_idx,
                src_idx if local_idx is None else local_idx,
                src_idx if weights is None else weights.view(torch.int32),
                num_rows,
                self._on.rank,
            )
        at, beside = self._on.arena.extras_offset, self._on.view("metadata", slot)[:num_rows]
        for extra in extras:
            raw = extra.view(num_rows, math.prod(extra.shape[1:])).view(torch.uint8)
            raw.copy_(beside[:, at : at + raw.shape[1]].masked_fill(src_idx[:, None] < 0, 0))
            at += raw.shape[1]
        if plan.src_idx is not None:  # nothing travelled that the plan knows
            src_idx, local_idx = up_to(plan.src_idx, num_rows), None
            local_idx = None if plan.local_idx is None else up_to(plan.local_idx, num_rows)
        return Metadata(src_idx=src_idx, topk_idx=local_idx, weights=weights, extras=extras)


def up_to(rows: Tensor, num_rows: int) -> Tensor:
    """As many rows as are asked for; where a plan knows of fewer, the rest are none."""
    if rows.shape[0] >= num_rows:
        return rows[:num_rows]
    return torch.cat([rows, rows.new_full((num_rows - rows.shape[0], *rows.shape[1:]), -1)])
