"""Rows of a dispatch over two hops, on CPUs: packed into chunks, and from there, or from x, into the mates' slots.

Letters: T tokens here, K top-k, H hidden, U ranks of a node, S rows of a receive slot, n rows, c copies of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.base import Batch, Metadata
from crossdock.backends.cpu.arrived import as_bytes, movable, take_metadata, widths_of
from crossdock.backends.cpu.mapped import Mapped
from crossdock.backends.nodes.chunks import ChunkFormat
from crossdock.backends.nodes.places import Ints
from crossdock.backends.nodes.plan import NodePlan
from crossdock.extent import Extent
from crossdock.scales import ScaleLayout, as_integers
from crossdock.transport.nodes import NodesTransport
from crossdock.wire import Fp8, Quantized


class Rows(NamedTuple):
    """What travels of rows, one tensor each, all uint8 [n, bytes]: of tokens, or views of a chunk."""

    data: Tensor
    scale: Tensor
    ids: Tensor
    """int32: source; picks where a row is of a rank; weights of picks, if any were given."""
    extras: Tensor

    def at(self, rows: Tensor) -> list[Tensor]:
        """These rows of each tensor."""
        return [torch.index_select(tensor, 0, rows) for tensor in self]


class NodeRows:
    """What a rank reads and writes of its mates' segments in a dispatch."""

    def __init__(self, arena: Arena, transport: NodesTransport, mapped: Mapped) -> None:
        self._arena = arena
        self._rank = transport.rank
        self.at: Sequence[dict[str, Tensor]] = mapped.at
        """Regions by mate, and name."""
        self._own = self.at[transport.local]
        self._slot_rows = arena.spec.num_slot_rows(arena.topology.num_ranks)

    def of_tokens(self, batch: Batch, topk_idx: Tensor, extent: Extent) -> Rows:
        """What travels of each token: rows cast to the wire's format, and the metadata beside them."""
        spec = self._arena.spec
        x = batch.x
        if isinstance(spec.wire, Fp8) and not isinstance(x, Quantized) and not batch.unquantized:
            x = spec.wire.quantize(x)
        data, scale = x if isinstance(x, Quantized) else (x, None)
        num_tokens = topk_idx.shape[0]
        ids = [self._rank * extent.max_tokens + np.arange(num_tokens, dtype=np.int32)[:, None]]
        if not spec.layout.per_pick:
            ids.append(topk_idx.numpy().astype(np.int32))
        if batch.weights is not None:
            ids.append(batch.weights.contiguous().numpy().view(np.int32))
        extras = [as_bytes(extra) for extra in batch.extras]
        nothing = torch.empty(num_tokens, 0, dtype=torch.uint8, device="cpu")
        return Rows(
            data=_bytes_of(data),
            scale=nothing if scale is None else _bytes_of(scale),
            ids=torch.from_numpy(np.concatenate(ids, axis=1).astype(np.int32).view(np.uint8)),
            extras=torch.from_numpy(np.concatenate(extras, axis=1)) if extras else nothing,
        )

    @staticmethod
    def format_of(rows: Rows, places: npt.NDArray[np.signedinteger] | None) -> ChunkFormat:
        """How these travel: data, scales, ids, extras, and places where the plan is not known yet."""
        return ChunkFormat((*widths_of(rows), 0 if places is None else places.shape[1] * places.itemsize))

    def fan_out(self, batch: Batch, rows: Rows, idx: Ints, finals: Ints, slots: Sequence[int], extent: Extent) -> None:
        """Writes rows into their final places at mates.

        Args:
            idx: [n], which rows these are.
            finals: [n, K], where copies of each end: local rank * S + row; -1: nowhere.
            slots: of each mate, the receive slot that it has named.
        """
        which, pick = np.nonzero(finals >= 0)
        ends = finals[which, pick]
        order = np.argsort(ends, kind="stable")
        which, pick, ends = idx[which[order]], pick[order], ends[order]
        borders = np.searchsorted(ends, np.arange(len(self.at) + 1) * self._slot_rows)
        metadata = self._metadata(batch, rows, which, pick)
        region = self._arena.region_of_rows(unquantized=batch.unquantized)
        for u, (views, slot) in enumerate(zip(self.at, slots, strict=True)):
            mine = slice(borders[u], borders[u + 1])
            there = ends[mine] - u * self._slot_rows
            if there.size:
                from_rows = torch.from_numpy(which[mine])
                _scatter(rows.data, from_rows, views[region][slot], there)
                if rows.scale.shape[1]:
                    _scatter_scales(extent.scales, rows.scale, from_rows, views["scale"][slot], there)
                views["metadata"][slot].numpy()[there] = metadata[mine]

    def take(self, plan: NodePlan, batch: Batch, slot: int, num_rows: int) -> Metadata:
        """The metadata of rows that are in place; zeroes gaps between segments."""
        return take_metadata(self._arena, self._own, plan, batch, rank=self._rank, slot=slot, num_rows=num_rows)

    def _metadata(self, batch: Batch, rows: Rows, which: Ints, pick: Ints) -> npt.NDArray[np.uint8]:
        """[c, metadata_bytes] as they lie in a slot."""
        arena, num_topk = self._arena, self._arena.spec.num_topk
        packed = np.zeros((which.size, arena.metadata_bytes), dtype=np.uint8)
        words, ids = packed.view(np.int32), rows.ids.numpy().view(np.int32)[which]
        words[:, 0] = ids[:, 0]
        if not arena.spec.layout.per_pick:
            words[:, 1 : ids.shape[1]] = ids[:, 1:]
        elif batch.weights is not None:
            words[:, 1] = np.take_along_axis(ids[:, 1 : 1 + num_topk], pick[:, None], axis=1)[:, 0]
        if (num_bytes := rows.extras.shape[1]) > 0:
            packed[:, arena.extras_offset : arena.extras_offset + num_bytes] = rows.extras.numpy()[which]
        return packed


def _scatter_scales(layout: ScaleLayout, scales: Tensor, which: Tensor, slot: Tensor, there: Ints) -> None:
    """Copies the scales of rows to where the layout has those of rows ``there``."""
    if not layout.column_major:
        _scatter(scales, which, slot, there)
        return
    source = scales.view(layout.dtype)
    in_segment = there // layout.segment_rows
    ends = np.flatnonzero((np.diff(there) != 1) | (np.diff(in_segment) != 0)) + 1
    for start, stop in zip((0, *ends.tolist()), (*ends.tolist(), there.size), strict=True):
        block = layout.of_block(slot, slice(int(there[start]), int(there[stop - 1]) + 1))
        as_integers(block).copy_(as_integers(source).index_select(0, which[start:stop]))


def _scatter(source: Tensor, which: Tensor, region: Tensor, there: Ints) -> None:
    """Copies rows of uint8 [n, bytes] into rows of a region; rows there ascend, and are often neighbours."""
    integers = movable(source)
    target = region.view(torch.uint8).view(region.shape[0], -1).view(integers.dtype)
    if there[-1] - there[0] + 1 == there.size:
        torch.index_select(integers, 0, which, out=target[there[0] : there[-1] + 1])
    else:
        target.index_copy_(0, torch.from_numpy(there), integers.index_select(0, which))


def _bytes_of(rows: Tensor) -> Tensor:
    """[n, columns] as uint8 [n, bytes]."""
    if not rows.numel():  # torch calls it contiguous whatever its strides
        return torch.empty(rows.shape[0], rows.shape[1] * rows.element_size(), dtype=torch.uint8, device="cpu")
    return rows.contiguous().view(torch.uint8)
