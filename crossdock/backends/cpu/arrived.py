"""Rows on CPUs that have arrived in a receive slot: gaps between them, the metadata beside them, copies of them.

Letters: T tokens, K top-k, R rows received.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.base import Batch, Metadata
from crossdock.layout import Expanded, Padded
from crossdock.scales import as_integers, of_numpy, parts_of
from crossdock.wire import Quantized

Bytes = npt.NDArray[np.uint8]


class _Numbers(Protocol):
    def tolist(self) -> list[int]: ...


class Segmented(Protocol):
    """A plan, as far as it says where rows lie in a slot."""

    @property
    def num_rows(self) -> int:
        """R."""

    @property
    def segment_starts(self) -> Tensor:
        """First row of each segment, and the end of the last."""

    @property
    def segment_rows(self) -> _Numbers:
        """Rows of each segment, without padding."""


def take_metadata(
    arena: Arena, own: Mapping[str, Tensor], plan: Segmented, batch: Batch, *, rank: int, slot: int, num_rows: int
) -> Metadata:
    """The metadata of rows that are in place; zeroes gaps between segments of a slot.

    Args:
        own: the regions of this rank's segment.
        num_rows: rows to look at.
    """
    region = arena.region_of_rows(unquantized=batch.unquantized)
    data, metadata = own[region][slot, :num_rows], own["metadata"][slot, :num_rows].numpy()
    scale = own["scale"][slot] if "scale" in own and region == "data" else None
    starts, lengths = plan.segment_starts.tolist(), plan.segment_rows.tolist()
    is_real = np.zeros(num_rows, dtype=np.bool_)
    for start, end, length in zip(starts[:-1], starts[1:], lengths, strict=True):
        is_real[start : start + length] = True
        if isinstance(arena.spec.layout, Expanded) and start + length < end and not arena.spec.is_staged:
            as_integers(data[start + length : end]).zero_()
            if scale is not None:
                as_integers(arena.scales.of_block(scale, slice(start + length, end))).zero_()
    return _unpacked(arena, metadata, is_real, batch, rank=rank)


def copy_rows(arena: Arena, plan: Segmented, rows: Tensor | Quantized, out: Tensor | Quantized) -> None:
    """Copies rows ``[R, ...]`` or ``[L, C, ...]`` of a slot, as far as they came."""
    starts, ends = [0], [plan.num_rows]
    if isinstance(arena.spec.layout, Padded):
        starts = plan.segment_starts.tolist()[:-1]
        ends = [start + length for start, length in zip(starts, plan.segment_rows.tolist(), strict=True)]
    for each, target in parts_of(rows, out):
        if not each.is_contiguous():  # scales that arrive column-major
            target.copy_(each)
            continue
        to_rows, from_rows = (part.view(-1, part.shape[-1]) for part in (target, each))
        for start, end in zip(starts, ends, strict=True):
            to_rows[start:end].copy_(from_rows[start:end])


def _unpacked(arena: Arena, metadata: Bytes, is_real: npt.NDArray[np.bool_], batch: Batch, *, rank: int) -> Metadata:
    """The small things out of [R, metadata_bytes]; -1 and 0 where no row is."""
    spec, num_rows = arena.spec, metadata.shape[0]
    words, num_topk = metadata.view(np.int32), spec.num_topk
    src_idx = np.where(is_real, words[:, 0], -1)
    topk_idx = None
    if not spec.layout.per_pick:
        num_local = spec.num_local_experts(arena.topology.num_ranks)
        local = words[:, 1 : 1 + num_topk] - rank * num_local
        topk_idx = np.where((local >= 0) & (local < num_local) & is_real[:, None], local, -1)
    weights = None
    if batch.weights is not None:
        if topk_idx is None:
            weights = np.where(is_real, words[:, 1], 0).view(np.float32)
        else:
            weights = np.where(topk_idx < 0, 0, words[:, 1 + num_topk : 1 + 2 * num_topk]).view(np.float32)
    extras, at = [], arena.extras_offset
    for extra in batch.extras:
        num_bytes = math.prod(extra.shape[1:]) * extra.element_size()
        raw = np.where(is_real[:, None], metadata[:, at : at + num_bytes], np.uint8(0))
        extras.append(of_numpy(raw).view(-1).view(extra.dtype).view(num_rows, *extra.shape[1:]))
        at += num_bytes
    return Metadata(
        src_idx=of_numpy(src_idx),
        topk_idx=None if topk_idx is None else of_numpy(topk_idx),
        weights=None if weights is None else of_numpy(weights),
        extras=tuple(extras),
    )


def movable(rows: Tensor) -> Tensor:
    """Rows as a type that gathers know how to move: integers, wider ones where there is a choice."""
    if rows.dtype.itemsize > 1:
        return as_integers(rows)
    rows = rows.contiguous()
    return rows.view(torch.int16 if rows.shape[1] % 2 == 0 and rows.storage_offset() % 2 == 0 else torch.uint8)


def apart(values: Tensor, extras: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What came home of extras [R, ...] side by side, float32 [..., n], as a tensor of each."""
    widths = [num_bytes // values.element_size() for num_bytes in widths_of(extras)]
    return tuple(
        part.reshape(*values.shape[:-1], *extra.shape[1:]).contiguous()
        for part, extra in zip(torch.split(values, widths, dim=-1), extras, strict=True)
    )


def widths_of(rows: Sequence[Tensor]) -> tuple[int, ...]:
    """Bytes of a row in each of these tensors [n, ...]."""
    return tuple(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in rows)


def as_bytes(extra: Tensor) -> Bytes:
    """[n, ...] of any type as [n, bytes]."""
    if extra.numel() == 0:  # torch calls it contiguous whatever its strides
        return np.zeros((extra.shape[0], math.prod(extra.shape[1:]) * extra.element_size()), dtype=np.uint8)
    return extra.contiguous().view(extra.shape[0], math.prod(extra.shape[1:])).view(torch.uint8).numpy()
