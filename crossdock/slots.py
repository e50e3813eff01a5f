"""This rank's receive slots, used in turn: whose rows lie in each, and for how long."""

from __future__ import annotations

from dataclasses import replace
from weakref import ref

import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.base import Arrived, Metadata
from crossdock.consent import PUSHED
from crossdock.errors import ConfigError
from crossdock.layout import Expanded, Padded
from crossdock.pending import CallQueue, Pending
from crossdock.received import CopyRows, Lease, Received
from crossdock.scales import room_like
from crossdock.wire import Quantized


class ReceiveSlots:
    """Hands out receive slots to dispatches, in turn, and tells which slot a tensor lies in."""

    def __init__(self, arena: Arena, segment: Tensor) -> None:
        spec, num_ranks = arena.spec, arena.topology.num_ranks
        self.spec = spec
        self._arena, self._device = arena, segment.device
        self._region_of_rows = [arena.region_of_rows(unquantized=unquantized) for unquantized in (False, True)]
        self.scales = arena.scales
        self.has_offsets = isinstance(spec.layout, Expanded)
        self._num_segments = spec.num_local_experts(num_ranks) if isinstance(spec.layout, Padded) else None
        self._num_slots, self._slot_rows = spec.num_slots, arena.extent.slot_rows
        names = ("data", "scale", "unquantized", "metadata", "outputs")
        self._names = [name for name in names if name in arena.regions]
        self._regions: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}
        """Of all slots, shaped as the layout has its rows; none where these are in memory of their own."""
        self._spans: dict[str, tuple[int, int]] = {}
        """Where tensors lie that a dispatch may have given: addresses, and bytes."""
        self.lie_in(segment)
        self.begin, self.end = arena.begin, arena.num_bytes
        """Which bytes of the segment calls of this Spec write to."""
        self._leases: list[ref[Lease] | None] = [None] * self._num_slots
        """Of the rows in each slot, while somebody has them."""
        self._stamps: list[int | None] = [None] * self._num_slots
        """Of the plan whose rows lie in each slot."""
        self._calls: list[Pending[Received] | None] = [None] * self._num_slots
        self._num_taken = 0
        self.is_settled = False
        """Whether a dispatch of this Spec has been waited for since calls of others used these bytes: all ranks took
        part in it, so nobody reads what those left here. A call that failed is no sign of that."""

    def lie_in(self, segment: Tensor | None) -> None:
        """Slots lie in that segment from now on; None: in none."""
        self._regions, self._views, self._spans = {}, {}, {}
        if segment is None:
            return
        regions = self._regions = {name: self._arena.view(segment, name) for name in self._names}
        if self.spec.is_staged:
            return
        lead: tuple[int, ...] = (self._slot_rows,)
        if self._num_segments is not None:
            lead = (self._num_segments, self._arena.extent.capacity)
        for name in ("outputs", "data"):
            self._views[name] = regions[name].view(self._num_slots, *lead, regions[name].shape[2])
            self._spans[name] = regions[name].data_ptr(), regions[name].nbytes
        if "scale" in regions:
            of_slots = regions["scale"]
            of_slot = self.scales.of_rows(of_slots[0], self._slot_rows)
            shape, strides = (self._num_slots, *of_slot.shape), (of_slots.stride(0), *of_slot.stride())
            self._views["scale"] = of_slots.as_strided(shape, strides)

    def take(self, queue: CallQueue) -> int:
        """The next slot; what lay in it is stale.

        Raises:
            ConfigError: it belongs to a dispatch that was started and not waited for.
        """
        slot = self._num_taken % self._num_slots
        call = self._calls[slot]
        if call is not None and queue.is_unwaited(call):
            raise ConfigError(
                f"receive slot {slot} belongs to a dispatch that was not waited for; call wait() on it first"
            )
        self._num_taken += 1
        self._stamps[slot] = self._calls[slot] = None
        if (known := self._leases[slot]) and (lease := known()):
            lease.end()
        return slot

    def vacate(self, begin: int, end: int, queue: CallQueue) -> None:
        """Another Spec's calls use these bytes from now on: what lies in them is stale.

        Raises:
            ConfigError: it is of a dispatch that was started and not waited for.
        """
        for slot, call in enumerate(self._calls):
            if not self._overlaps(slot, begin, end):
                continue
            if call is not None and queue.is_unwaited(call):
                raise ConfigError(
                    f"receive slot {slot} of another Spec, over the same bytes, belongs to a dispatch that was not "
                    f"waited for; call wait() on it first, or make one of the Buffers with exclusive=True"
                )
            self._stamps[slot] = self._calls[slot] = None
            if (known := self._leases[slot]) and (lease := known()):
                lease.end()

    def _overlaps(self, slot: int, begin: int, end: int) -> bool:
        """Whether any of a slot's regions lies in those bytes of the segment, at least in part."""
        for name in self._names:
            at = self._arena[name]
            first = at.offset + slot * at.slot_bytes
            if first < end and begin < first + at.slot_bytes:
                return True
        return False

    def fill(self, slot: int, call: Pending[Received]) -> None:
        """Says which call, that was only started, the slot was taken for."""
        self._calls[slot] = call

    def lend(
        self, arrived: Arrived, *, slot: int, unquantized: bool, copies: CopyRows | None, poisons: bool
    ) -> Received:
        """What a dispatch gives: the rows that have just arrived in a slot, until it comes round.

        Args:
            copies: makes copies of rows, to be given in place of views.
            poisons: fill the slot's output rows with NaN.
        """
        self._calls[slot], self.is_settled = None, True
        plan, num_rows = arrived.plan, arrived.num_rows
        lease = Lease(slot, lambda: self._shaped(arrived.read_metadata(), num_rows))
        self._leases[slot], self._stamps[slot] = ref(lease), plan.stamp
        region = self._region_of_rows[unquantized]
        if poisons and region == "data":
            self.poison(slot, "outputs")
        recv = Received(plan, lease, self, region, num_rows, arrived.x)
        return recv if copies is None or arrived.x is not None else recv.copied(copies)

    def _shaped(self, metadata: Metadata, num_rows: int) -> Metadata:
        """Of the first rows, with their leading dimensions: [R], or [L, C] for Padded."""
        lead = (num_rows,) if self._num_segments is None else (self._num_segments, num_rows // self._num_segments)

        def shaped(rows: Tensor) -> Tensor:
            return rows[:num_rows].view(*lead, *rows.shape[1:])

        return Metadata(
            src_idx=shaped(metadata.src_idx),
            topk_idx=None if metadata.topk_idx is None else metadata.topk_idx[:num_rows],
            weights=None if metadata.weights is None else shaped(metadata.weights),
            extras=tuple(shaped(extra) for extra in metadata.extras),
        )

    def rows(self, name: str, slot: int, num_rows: int) -> Tensor:
        """Of a region what belongs to the slot's first rows: [R, ...], or [L, C, ...] for Padded."""
        rows = self._views[name][slot]
        if num_rows == self._slot_rows:
            return rows
        if self._num_segments is None:
            return rows[:num_rows]
        of_slot, of_segment = self._regions[name][slot], num_rows // self._num_segments  # of a call of fewer tokens
        if name == "scale":
            return replace(self.scales, segment_rows=of_segment).of_rows(of_slot, num_rows)
        return of_slot[:num_rows].view(self._num_segments, of_segment, of_slot.shape[-1])

    def new_outputs(self, num_rows: int) -> Tensor:
        """Memory for so many outputs that lies in no slot."""
        return torch.empty(num_rows, self.spec.hidden, dtype=self.spec.combine_dtype, device=self._device)

    def room(self, rows: Tensor | Quantized) -> Tensor | Quantized:
        """Memory for rows like these, in no slot."""
        if not isinstance(rows, Quantized):
            return room_like(rows)
        return Quantized(room_like(rows.data), self.scales.room(rows.scale))

    def received(self, region: str, slot: int, num_rows: int) -> Tensor | Quantized:
        """The rows that lie in the slot, with their scales where they are narrow."""
        data = self.rows(region, slot, num_rows)
        if region == "data" and "scale" in self._views:
            return Quantized(data, self.rows("scale", slot, num_rows))
        return data

    def output_slot(self, y: Tensor, stamp: int) -> int:
        """The slot whose output rows ``y`` is, to be pulled from there; PUSHED for any other tensor.

        Raises:
            ConfigError: ``y`` lies in a slot that no longer holds rows of that plan.
        """
        for name, (begin, num_bytes) in self._spans.items():
            offset = y.data_ptr() - begin
            if 0 <= offset < num_bytes and y.numel():
                slot, within = divmod(offset, num_bytes // self._num_slots)
                if self._stamps[slot] != stamp:
                    raise ConfigError(
                        f"y is stale: it lies in receive slot {slot}, which a later dispatch has taken; combine rows "
                        f"before their slot comes round, or pass a tensor of your own"
                    )
                return slot if name == "outputs" and within == 0 and y.is_contiguous() else PUSHED
        return PUSHED

    def poison(self, slot: int, *names: str) -> None:
        """Fills regions of the slot with bytes that are NaN in every format and no index of anything."""
        for name in names:
            if name in self._regions:
                self._regions[name][slot].view(torch.uint8).fill_(0xFF)
