"""This rank's receive slots, used in turn: whose rows lie in each, and for how long."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.consent import PUSHED
from crossdock.errors import ConfigError
from crossdock.pending import Pending
from crossdock.received import Lease, Received, Records


class ReceiveSlots:
    """Hands out receive slots to dispatches, in turn, and tells which slot a tensor lies in."""

    def __init__(self, arena: Arena, segment: Tensor) -> None:
        self.device = segment.device
        self._num_slots = arena.spec.num_slots
        self._views = {
            name: arena.view(segment, name) for name in ("data", "scale", "record", "outputs") if name in arena.regions
        }
        self._leases: list[Lease | None] = [None] * self._num_slots
        self._calls: list[Pending[Received] | None] = [None] * self._num_slots
        self._num_taken = 0

    def check_free(self, is_unwaited: Callable[[Pending[Received] | None], bool]) -> None:
        """Raises ConfigError when the next slot belongs to a dispatch that was not waited for."""
        slot = self._num_taken % self._num_slots
        if is_unwaited(self._calls[slot]):
            raise ConfigError(
                f"receive slot {slot} belongs to a dispatch that was not waited for; call wait() on it first"
            )

    def take(self) -> int:
        """The next slot; what lay in it is stale."""
        slot = self._num_taken % self._num_slots
        self._num_taken += 1
        lease, self._leases[slot], self._calls[slot] = self._leases[slot], None, None
        if lease is not None:
            lease.end()
        return slot

    def fill(self, slot: int, call: Pending[Received]) -> None:
        """Says which call the slot was taken for."""
        self._calls[slot] = call

    def lease(self, slot: int, stamp: int, records: Records) -> Lease:
        """The right to the rows that have just landed in the slot, by the plan of that stamp."""
        self._leases[slot] = lease = Lease(slot, stamp, records)
        return lease

    def outputs(self, slot: int, num_rows: int) -> Tensor:
        """Where this rank writes the outputs of the slot's rows, [R, H]."""
        return self._views["outputs"][slot, :num_rows]

    def output_slot(self, y: Tensor, stamp: int) -> int:
        """The slot whose output rows ``y`` is, to be pulled from there; PUSHED for any other tensor.

        Raises:
            ConfigError: ``y`` lies in a slot that no longer holds rows of that plan.
        """
        for name in ("outputs", "data"):
            region = self._views[name]
            offset = y.data_ptr() - region.data_ptr()
            if y.numel() and 0 <= offset < region.nbytes:
                slot, within = divmod(offset, region.nbytes // self._num_slots)
                lease = self._leases[slot]
                if lease is None or lease.stamp != stamp:
                    raise ConfigError(
                        f"y is stale: it lies in receive slot {slot}, which a later dispatch has taken; combine rows "
                        f"before their slot comes round, or pass a tensor of your own"
                    )
                return slot if name == "outputs" and within == 0 and y.is_contiguous() else PUSHED
        return PUSHED

    def poison(self, slot: int, *names: str) -> None:
        """Fills regions of the slot with bytes that are NaN in every format and no index of anything."""
        for name in names:
            if name in self._views:
                self._views[name][slot].view(torch.uint8).fill_(0xFF)
