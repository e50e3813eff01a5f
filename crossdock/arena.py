"""The table of a segment's regions: offsets, bytes, views. Peers access nothing else of a rank.

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
    """Who writes the region, for the memory map."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the region, without padding."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Arena:
    """The memory map of a rank's segment, a function of Spec and Topology alone; ``print(arena)`` shows it.

    Raises:
        ConfigError: when ``regions`` is first used: the worst case exceeds ``MAX_DEFAULT_BYTES`` (``Spec.capacity``).

    >>> arena = Arena(Spec(num_experts=8, num_topk=2, hidden=64, max_tokens=16), Topology(num_ranks=4))
    >>> arena["data"].shape, arena["data"].num_bytes
    ((2, 64, 64), 16384)
    """

    spec: Spec
    topology: Topology

    @property
    def ring(self) -> int:
        """Words kept per peer: at least twice the ``num_slots`` calls in flight, rounded up to a power of two."""
        return 1 << (2 * self.spec.num_slots - 1).bit_length()

    @property
    def pick_bytes(self) -> int:
        """Bytes of expert ids and weights in a row's metadata: K of each, or one weight where a row is one pick."""
        return 4 if self.spec.layout.per_pick else 8 * self.spec.num_topk

    @property
    def extras_offset(self) -> int:
        """Byte offset of the extras in a row's metadata: behind source index, ids and weights."""
        return 4 + self.pick_bytes

    @property
    def metadata_bytes(self) -> int:
        """Bytes of a row's metadata, a multiple of 8."""
        return _round_up(self.extras_offset + self.spec.extra_bytes, 8)

    @property
    def return_bytes(self) -> int:
        """Bytes for the extras that a combine returns per row: K float32 gradients, ``extra_bytes``, padding to 8."""
        return _round_up(4 * self.spec.num_topk + self.spec.extra_bytes, 8)

    @property
    def num_returned_rows(self) -> int:
        """Most rows that one combine returns to a rank: M * K if each pick's row returns, else M * min(K, P)."""
        spec = self.spec
        by_pick = spec.layout.per_pick and spec.reduce == "token"
        return spec.max_tokens * (spec.num_topk if by_pick else min(spec.num_topk, self.topology.num_ranks))

    @cached_property
    def scales(self) -> ScaleLayout:
        """Layout of the scales of one slot; ``num_scales`` is 0 for an unquantized wire."""
        spec, num_ranks = self.spec, self.topology.num_ranks
        return ScaleLayout(
            num_segments=spec.num_local_experts(num_ranks) if isinstance(spec.layout, Padded) else None,
            segment_rows=spec.capacity(num_ranks),
            num_scales=spec.wire.num_scales(spec.hidden),
            dtype=spec.wire.scale_dtype,
            column_major=spec.wire.column_major,
        )

    @cached_property
    def regions(self) -> dict[str, Region]:
        """The regions by name, in the order of offsets."""
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
        add("data", (slots, rows, spec.wire.num_columns(hidden)), spec.wire.dtype, "peers: dispatched rows", PAGE)
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
        """The region where dispatched rows arrive: ``data``, or ``outputs`` if their format is not the wire's."""
        wire = self.spec.wire
        is_the_wires = wire.is_unquantized and self.spec.combine_dtype == wire.dtype
        return "outputs" if unquantized and not is_the_wires else "data"

    @property
    def num_bytes(self) -> int:
        """Bytes of one rank's segment, a multiple of the page size."""
        last = list(self.regions.values())[-1]
        return _round_up(last.offset + last.num_bytes, PAGE)

    @property
    def stride(self) -> int:
        """Bytes from one rank's segment to the next where all are mapped side by side.

        A multiple of pages and of output rows: the outputs, and the returned rows, of all ranks are rows of one matrix.
        """
        return _round_up(self.num_bytes, math.lcm(PAGE, self.spec.hidden * self.spec.combine_dtype.itemsize))

    def __getitem__(self, name: str) -> Region:
        return self.regions[name]

    def view(self, segment: Tensor, name: str) -> Tensor:
        """The region as a view of a segment (uint8, at least ``num_bytes`` elements)."""
        region = self.regions[name]
        raw = segment[region.offset : region.offset + region.num_bytes]
        return raw.view(region.dtype).view(region.shape)

    def forget_senders(self, segment: Tensor, ranks: Sequence[int]) -> None:
        """Zeroes the abort flags and counts that these ranks wrote into a segment."""
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
