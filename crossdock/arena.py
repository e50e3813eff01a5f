"""The tables of a segment's regions: offsets, bytes, views. Peers access nothing else of a rank.

A segment begins with a connection's control words, which depend on the connection alone. Behind them lie the regions of
the Specs that are laid over it, each from where its ``Arena`` says; they share bytes unless one is laid apart.

Letters: P ranks, M max_tokens, K top-k, H hidden, G scale groups, E experts, W counts, C rows of a receive slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from crossdock.extent import Extent
from crossdock.masks import num_words
from crossdock.scales import ScaleLayout
from crossdock.spec import Spec, Topology

PAGE = 4096
_LINE = 64
_WORD = 16
"""The most bytes that a rank moves at a time: staged rows, and scales in them, begin at multiples of it."""
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
    pitch: int | None = None
    """Bytes from a row, the last axis, to the next, where other regions lie between them; None: rows are dense."""

    @property
    def row_bytes(self) -> int:
        """Bytes from a row to the next."""
        return self.pitch or self.shape[-1] * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes from a slot, the first axis, to the next."""
        return math.prod(self.shape[1:-1]) * self.row_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the region, without padding; with what lies between its rows, but for the last."""
        num_rows = math.prod(self.shape[:-1])
        return num_rows and (num_rows - 1) * self.row_bytes + self.shape[-1] * self.dtype.itemsize

    def view(self, segment: Tensor) -> Tensor:
        """It as a view of a segment (uint8, which ends behind the region)."""
        raw = segment[self.offset : self.offset + self.num_bytes]
        if self.pitch is None:
            return raw.view(self.dtype).view(self.shape)
        strides = [self.pitch * math.prod(self.shape[i + 1 : -1]) for i in range(len(self.shape) - 1)]
        row_bytes = self.shape[-1] * self.dtype.itemsize
        return raw.as_strided((*self.shape[:-1], row_bytes), (*strides, 1)).view(self.dtype)


class _Table:
    """Regions by name, and views of them."""

    @property
    def regions(self) -> dict[str, Region]:
        """The regions by name, in the order of offsets."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Region:
        return self.regions[name]

    def view(self, segment: Tensor, name: str) -> Tensor:
        """The region as a view of a segment (uint8, at least ``num_bytes`` elements)."""
        return self.regions[name].view(segment)


@dataclass(frozen=True, kw_only=True)
class Control(_Table):
    """The control words at the beginning of a segment: boxes that one peer each writes to.

    Args:
        max_experts: of all ranks, of any Spec that is laid over the connection.
        max_in_flight: calls that may be started and not yet waited for.
        over_rail: only the ranks of a node map each other's memory; others are reached by messages.
    """

    topology: Topology
    max_experts: int
    max_in_flight: int
    over_rail: bool = False

    @property
    def ring(self) -> int:
        """Words kept per peer: at least twice the calls in flight, rounded up to a power of two."""
        return 1 << (2 * self.max_in_flight - 1).bit_length()

    @property
    def num_counts(self) -> int:
        """Counts for which a row has room: E per expert, P per rank, and the tokens of a rank that brings too many.

        Over a rail, those that a node is told.
        """
        if self.over_rail:
            return -(-self.max_experts // self.topology.num_nodes) + self.topology.node_size + 1
        return self.max_experts + self.topology.num_ranks + 1

    @cached_property
    def regions(self) -> dict[str, Region]:
        """The boxes by name, in the order of offsets."""
        num_ranks, ring = self.topology.num_ranks, self.ring
        table = _Regions()
        table.add("words", (ring, num_ranks), torch.int64, "peers: begin words")
        table.add("arrived", (ring, num_ranks), torch.int64, "peers: my rows are in place")
        table.add("aborts", (num_ranks,), torch.int64, "peers: I gave up")
        table.add("closed", (num_ranks,), torch.int64, "peers: I have left")
        table.add("masks", (2 + num_words(num_ranks), num_ranks), torch.int64, "peers: whom I want masked")
        table.add("restarts", (2, num_ranks), torch.int64, "peers: where to begin again")
        if self.over_rail:
            table.add("told", (ring, num_ranks), torch.int64, "mates: your table has my counts")
            table.add("needs", (ring, num_ranks), torch.int64, "rail: rows that my node needs room for")
            table.add("about", (1, num_ranks), torch.int64, "peers: whom I wait for")
        table.add("reasons", (num_ranks, REASON_BYTES), torch.uint8, "peers: why")
        table.add("counts", (ring, num_ranks, self.num_counts), torch.int64, "peers: rows to come")
        return table

    @property
    def num_bytes(self) -> int:
        """Bytes of the words, a multiple of the page size."""
        return _round_up(self["counts"].offset + self["counts"].num_bytes, PAGE)

    def forget_senders(self, segment: Tensor, ranks: Sequence[int]) -> None:
        """Zeroes the abort flags and counts that these ranks wrote into a segment."""
        for rank in ranks:
            self.view(segment, "aborts")[rank] = 0
            self.view(segment, "counts")[:, rank] = 0


@dataclass(frozen=True)
class Arena(_Table):
    """The memory map of a rank's segment with one Spec; ``print(arena)`` shows it.

    Args:
        control: the words that it begins with; None: as many as this Spec needs.
        first: where the Spec's regions begin, in bytes, a multiple of the page size; None: behind the words.

    Raises:
        ConfigError: when ``regions`` is first used: the worst case exceeds ``MAX_DEFAULT_BYTES`` (``Spec.capacity``).

    >>> arena = Arena(Spec(num_experts=8, num_topk=2, hidden=64, max_tokens=16), Topology(num_ranks=4))
    >>> arena["data"].shape, arena["data"].num_bytes
    ((2, 64, 64), 16384)
    """

    spec: Spec
    topology: Topology
    control: Control | None = None
    first: int | None = None

    @cached_property
    def control_words(self) -> Control:
        """The words that the segment begins with."""
        return self.control or Control(
            topology=self.topology, max_experts=self.spec.num_experts, max_in_flight=self.spec.num_slots
        )

    @property
    def num_counts(self) -> int:
        """W, the counts that a plan has of each rank."""
        spec, is_over_rail = self.spec, self.control_words.over_rail
        return spec.num_node_counts(self.topology) if is_over_rail else spec.num_counts(self.topology)

    def counts_of_experts(self, rank: int) -> slice:
        """Which of these counts are those of a rank's own experts, in the rank's own plans."""
        num_local = self.spec.num_local_experts(self.topology.num_ranks)
        first = (rank % self.topology.node_size if self.control_words.over_rail else rank) * num_local
        return slice(first, first + num_local)

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
        by_pick = spec.layout.per_pick and spec.reduce != "rank"
        return spec.max_tokens * (spec.num_topk if by_pick else min(spec.num_topk, self.topology.num_ranks))

    @property
    def staged_bytes(self) -> int:
        """Bytes from a staged row to the next: room for a row of the wire, scales behind it, or an unquantized one."""
        scale_bytes = self.scales.num_scales * self.scales.dtype.itemsize
        return _round_up(max(self._scales_at + scale_bytes, self.row_bytes), _WORD)

    @property
    def _scales_at(self) -> int:
        """Where the scales of a staged row begin in it."""
        return _round_up(self.spec.wire.data_bytes(self.spec.hidden), _WORD)

    @cached_property
    def extent(self) -> Extent:
        """What calls of the Spec's own M use of a slot: all of it."""
        return Extent.of(self.spec, self.topology.num_ranks)

    @property
    def scales(self) -> ScaleLayout:
        """Layout of the scales of one slot; ``num_scales`` is 0 for an unquantized wire."""
        return self.extent.scales

    @cached_property
    def regions(self) -> dict[str, Region]:
        """The regions by name, in the order of offsets; the words first."""
        return {**self.control_words.regions, **self._of_spec}

    @cached_property
    def _of_spec(self) -> dict[str, Region]:
        spec, num_ranks = self.spec, self.topology.num_ranks
        slots, rows, hidden = spec.num_slots, spec.most_rows(num_ranks), spec.hidden
        num_sent = spec.max_tokens * (spec.num_topk if spec.layout.per_pick else min(spec.num_topk, num_ranks))
        out = spec.combine_dtype
        whole_rows = math.lcm(_LINE, hidden * out.itemsize)
        table = _Regions(end=self.begin)
        add = table.add
        if spec.is_staged:
            self._add_staged(table)
        else:
            add("data", (slots, rows, spec.wire.num_columns(hidden)), spec.wire.dtype, "peers: dispatched rows", PAGE)
            if self.scales.num_scales:
                add("scale", (slots, *self.scales.shape), spec.wire.scale_dtype, "peers: their scales", PAGE)
        add("metadata", (slots, rows, self.metadata_bytes), torch.uint8, "peers: source, ids, weights, extras", PAGE)
        if spec.layout.per_pick and not self.control_words.over_rail:
            shape = (slots, num_ranks * spec.max_tokens, spec.num_topk)
            add("partial_rows", shape, torch.int32, "peers: which rows are one token's", PAGE)
        if not spec.is_staged:
            has_guests = self.region_of_rows(unquantized=True) == "outputs"
            writer = "this rank: experts' outputs" + ("; peers: unquantized rows" if has_guests else "")
            add("outputs", (slots, rows, hidden), out, writer, whole_rows)
        if self.control_words.over_rail:
            # Two, in turn: when a call offers outputs, all mates have read those of the call before the last.
            add("offered", (2, rows, hidden), out, "this rank: outputs from elsewhere", whole_rows)
            add("offered_weights", (2, rows), torch.float32, "this rank: their weights", PAGE)
            add("offered_extras", (2, rows, self.return_bytes), torch.uint8, "this rank: extras to go home", PAGE)
            return table
        add("returned", (slots, self.num_returned_rows, hidden), out, "peers: rows come home", whole_rows)
        if spec.reduce == "node":
            add("returned_weights", (slots, self.num_returned_rows), torch.float32, "peers: their weights", PAGE)
        add("returned_extras", (slots, num_sent, self.return_bytes), torch.uint8, "peers: extras come home", PAGE)
        return table

    def _add_staged(self, table: _Regions) -> None:
        """Staged rows: of the wire, and their scales, or unquantized ones in the same bytes."""
        spec, wire = self.spec, self.spec.wire
        lead, pitch = (spec.num_slots, self.topology.num_ranks * spec.max_tokens), self.staged_bytes
        columns = wire.num_columns(spec.hidden)
        table.add("data", (*lead, columns), wire.dtype, "peers: rows, one for each token", PAGE, pitch=pitch)
        first = table["data"].offset
        if num_scales := self.scales.num_scales:
            shape, at = (*lead, num_scales), first + self._scales_at
            table.add("scale", shape, wire.scale_dtype, "peers: their scales", pitch=pitch, offset=at)
        if self.region_of_rows(unquantized=True) != "data":
            shape, writer = (*lead, spec.hidden), "peers: unquantized rows"
            table.add("unquantized", shape, spec.combine_dtype, writer, pitch=pitch, offset=first)

    @property
    def num_body_bytes(self) -> int:
        """Bytes behind the control words: what the Spec needs of a ``Connection``."""
        return self.num_bytes - self.begin

    @property
    def begin(self) -> int:
        """Where the Spec's regions begin, in bytes."""
        return self.control_words.num_bytes if self.first is None else self.first

    def moved_to(self, first: int) -> Arena:
        """The same Spec's regions somewhere else."""
        return replace(self, control=self.control_words, first=first)

    def region_of_rows(self, *, unquantized: bool) -> str:
        """The region where dispatched rows arrive: ``data``; if their format is not the wire's, another.

        That is ``outputs``, or ``unquantized`` where rows are staged.
        """
        wire = self.spec.wire
        is_the_wires = wire.is_unquantized and self.spec.combine_dtype == wire.dtype
        other = "unquantized" if self.spec.is_staged else "outputs"
        return other if unquantized and not is_the_wires else "data"

    @property
    def num_bytes(self) -> int:
        """Bytes of one rank's segment up to the end of these regions, a multiple of the page size."""
        last = list(self._of_spec.values())[-1]
        return _round_up(last.offset + last.num_bytes, PAGE)

    @property
    def row_bytes(self) -> int:
        """Bytes of an output row: the outputs, and the returned rows, lie at multiples of it."""
        return self.spec.hidden * self.spec.combine_dtype.itemsize

    def __str__(self) -> str:
        lines = [f"{'offset':>14} {'bytes':>14}  {'region':<15} {'shape':<20} {'dtype':<14} written by"]
        for r in self.regions.values():
            dtype = str(r.dtype).removeprefix("torch.")
            shape = " x ".join(map(str, r.shape))
            lines.append(f"{r.offset:>14,} {r.num_bytes:>14,}  {r.name:<15} {shape:<20} {dtype:<14} {r.writer}")
        lines.append(f"{'':>14} {self.num_bytes:>14,}  bytes in each of {self.topology.num_ranks} ranks' segments")
        return "\n".join(lines)


class _Regions(dict[str, Region]):
    """Regions one behind the other."""

    def __init__(self, end: int = 0) -> None:
        super().__init__()
        self._end = end

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        writer: str,
        align: int = _LINE,
        *,
        pitch: int | None = None,
        offset: int | None = None,
    ) -> None:
        """Puts one more behind the last, or at an offset among those that are there."""
        offset = _round_up(self._end, align) if offset is None else offset
        region = Region(name=name, offset=offset, shape=shape, dtype=dtype, writer=writer, pitch=pitch)
        self[name], self._end = region, max(self._end, offset + region.num_bytes)


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to
