"""One table: the regions of a rank's segment, with offsets, bytes and views. Everything peers may touch is in it.

Letters: P ranks, M max_tokens, K top-k, H hidden, G scale groups, E experts, W counts, C rows of a receive slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crossdock.layout import Padded
from crossdock.masks import num_words
from crossdock.scales import ScaleLayout
from crossdock.spec import Spec, Topology
from crossdock.wire import Fp8

PAGE = 4096
_LINE = 64
REASON_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class Region:
    """One row of the table: an array at a fixed offset of every rank's segment."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    writer: str
    """Who writes it, for the memory map."""

    @property
    def num_bytes(self) -> int:
        """Bytes from the region's first to its last element."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Arena:
    """The memory map of one rank's segment, from Spec and Topology alone; ``print(arena)`` shows it.

    >>> arena = Arena(Spec(num_experts=8, num_topk=2, hidden=64, max_tokens=16), Topology(num_ranks=4))
    >>> arena["data"].shape, arena["data"].num_bytes
    ((2, 64, 64), 16384)
    """

    spec: Spec
    topology: Topology

    @property
    def ring(self) -> int:
        """Words kept per peer: a power of two, and twice the ``num_slots`` calls that a rank may have in flight."""
        return 1 << (2 * self.spec.num_slots - 1).bit_length()

    @property
    def pick_bytes(self) -> int:
        """Bytes of the expert ids and weights in a row's metadata: all of the token's, or one weight."""
        return 4 if self.spec.layout.per_pick else 8 * self.spec.num_topk

    @property
    def extras_offset(self) -> int:
        """Where a row's opaque extras begin in its metadata: behind source index, ids and weights."""
        return 4 + self.pick_bytes

    @property
    def metadata_bytes(self) -> int:
        """Bytes of the metadata that travels with each row."""
        return _round_up(self.extras_offset + self.spec.extra_bytes, 8)

    @property
    def return_bytes(self) -> int:
        """Bytes of extras that a combine can carry back with each row: a gradient per weight, and ``extra_bytes``."""
        return _round_up(4 * self.spec.num_topk + self.spec.extra_bytes, 8)

    @property
    def num_returned_rows(self) -> int:
        """Rows that can come home to one rank in one combine."""
        spec = self.spec
        by_pick = spec.layout.per_pick and spec.reduce == "token"
        return spec.max_tokens * (spec.num_topk if by_pick else min(spec.num_topk, self.topology.num_ranks))

    @cached_property
    def scales(self) -> ScaleLayout:
        """How scales lie in a slot of their region; of a unquantized wire there are none."""
        spec, num_ranks = self.spec, self.topology.num_ranks
        return ScaleLayout(
            num_segments=spec.num_local_experts(num_ranks) if isinstance(spec.layout, Padded) else None,
            segment_rows=spec.capacity(num_ranks),
            num_scales=spec.wire.num_scales(spec.hidden),
            dtype=spec.wire.scale_dtype,
            column_major=isinstance(spec.wire, Fp8) and spec.wire.column_major,
        )

    @cached_property
    def regions(self) -> dict[str, Region]:
        """The table, in order of offsets."""
        spec, num_ranks = self.spec, self.topology.num_ranks
        slots, rows, hidden, ring = spec.num_slots, spec.num_slot_rows(num_ranks), spec.hidden, self.ring
        num_sent = spec.max_tokens * (spec.num_topk if spec.layout.per_pick else min(spec.num_topk, num_ranks))
        out = spec.combine_dtype
        whole_rows = math.lcm(_LINE, hidden * out.itemsize)
        table: dict[str, Region] = {}
        end = 0

        def add(name: str, shape: tuple[int, ...], dtype: torch.dtype, writer: str, align: int = _LINE) -> None:
            nonlocal end
            table[name] = Region(name=name, offset=_round_up(end, align), shape=shape, dtype=dtype, writer=writer)
            end = table[name].offset + table[name].num_bytes

        add("words", (ring, num_ranks), torch.int64, "peers: begin words")
        add("arrived", (ring, num_ranks), torch.int64, "peers: my rows are in place")
        add("aborts", (num_ranks,), torch.int64, "peers: I gave up")
        add("closed", (num_ranks,), torch.int64, "peers: I have left")
        add("masks", (2 + num_words(num_ranks), num_ranks), torch.int64, "peers: whom I want masked")
        add("restarts", (2, num_ranks), torch.int64, "peers: where to begin again")
        add("reasons", (num_ranks, REASON_BYTES), torch.uint8, "peers: why")
        add("counts", (ring, num_ranks, spec.num_counts(self.topology)), torch.int64, "peers: rows to come")
        add("data", (slots, rows, hidden), spec.wire.dtype, "peers: dispatched rows", PAGE)
        if self.scales.num_scales:
            add("scale", (slots, *self.scales.shape), spec.wire.scale_dtype, "peers: their scales", PAGE)
        add("metadata", (slots, rows, self.metadata_bytes), torch.uint8, "peers: source, ids, weights, extras", PAGE)
        if spec.layout.per_pick:
            shape = (slots, num_ranks * spec.max_tokens, spec.num_topk)
            add("partial_rows", shape, torch.int32, "peers: which rows are one token's", PAGE)
        has_guests = self.region_of_rows(unquantized=True) == "outputs"
        writer = "this rank: experts' outputs" + ("; peers: unquantized rows" if has_guests else "")
        add("outputs", (slots, rows, hidden), out, writer, whole_rows)
        add("returned", (slots, self.num_returned_rows, hidden), out, "peers: rows come home", whole_rows)
        add("returned_extras", (slots, num_sent, self.return_bytes), torch.uint8, "peers: extras come home", PAGE)
        return table

    def region_of_rows(self, *, unquantized: bool) -> str:
        """The region of dispatched rows: ``outputs`` for unquantized ones in another format than the wire's."""
        return "outputs" if unquantized and self.spec.combine_dtype != self.spec.wire.dtype else "data"

    @property
    def num_bytes(self) -> int:
        """Bytes of one rank's segment, in whole pages."""
        last = list(self.regions.values())[-1]
        return _round_up(last.offset + last.num_bytes, PAGE)

    @property
    def stride(self) -> int:
        """Bytes between neighbouring ranks' segments where they are mapped side by side: whole pages and whole rows.

        So the outputs and returned rows of all ranks can be numbered as rows of one matrix.
        """
        return _round_up(self.num_bytes, math.lcm(PAGE, self.spec.hidden * self.spec.combine_dtype.itemsize))

    def __getitem__(self, name: str) -> Region:
        return self.regions[name]

    def view(self, segment: Tensor, name: str) -> Tensor:
        """The region as a tensor over a segment's bytes (uint8, at least ``num_bytes``); no copy."""
        region = self.regions[name]
        raw = segment[region.offset : region.offset + region.num_bytes]
        return raw.view(region.dtype).view(region.shape)

    def forget_senders(self, segment: Tensor, ranks: Sequence[int]) -> None:
        """Zeroes what these ranks have said in a segment that lasts: their flags, and rows to come in any call."""
        for rank in ranks:
            self.view(segment, "aborts")[rank] = 0
            self.view(segment, "counts")[:, rank] = 0

    def __str__(self) -> str:
        lines = [f"{'offset':>14} {'bytes':>14}  {'region':<15} {'shape':<20} {'dtype':<14} written by"]
        for r in self.regions.values():
            dtype = str(r.dtype).removeprefix("torch.")
            shape = " x ".join(map(str, r.shape))
            lines.append(f"{r.offset:>14,} {r.num_bytes:>14,}  {r.name:<15} {shape:<20} {dtype:<14} {r.writer}")
        lines.append(f"{'':>14} {self.num_bytes:>14,}  bytes in each of {self.topology.num_ranks} ranks' segments")
        return "\n".join(lines)


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to
