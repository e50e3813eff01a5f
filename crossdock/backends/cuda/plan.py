"""Where rows go, as tables on the device.

Letters: T tokens here, J rows of a token, K top-k, R rows, C rows of a receive slot, P ranks, N segments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from crossdock.plan import Plan

Made = TypeVar("Made", bound="_Cut")
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Of tables, by name: their shapes and types."""
_ALIGNED_BYTES = 128
"""Tables in one allocation begin at whole cache lines."""


class Part(NamedTuple):
    """A tensor in an allocation: its first byte, its bytes, its shape and type."""

    first: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Room:
    """All tables of a plan in one allocation: addresses for kernels at once, and tensors when somebody asks."""

    def __init__(self, memory: Int32[Tensor, "words"], parts: Mapping[str, Part]) -> None:
        self._memory = memory
        self.parts = parts

    @staticmethod
    def divided(tables: Shapes) -> tuple[int, dict[str, Part]]:
        """Bytes of a room for tables of such shapes and types, and where each lies."""
        parts, end = {}, 0
        for name, (shape, dtype) in tables.items():
            parts[name] = Part(end, math.prod(shape) * dtype.itemsize, shape, dtype)
            end += -(-parts[name].num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return end, parts

    def addresses(self) -> list[int]:
        """Where each of the tables begins, in their order."""
        begin = self._memory.data_ptr()
        return [begin + part.first for part in self.parts.values()]

    def address(self, name: str) -> int:
        """Where one of the tables begins."""
        return self._memory.data_ptr() + self.parts[name].first

    def tensors(self) -> list[Tensor]:
        """All tables, in their order."""
        return [self.tensor(name) for name in self.parts]

    def tensor(self, name: str) -> Tensor:
        """One of the tables."""
        part = self.parts[name]
        words = self._memory[part.first // 4 : (part.first + part.num_bytes) // 4]
        return words.view(part.dtype).view(part.shape)


class _Cut:
    """What may have its tables in a room: each is cut out of it when somebody first asks for it."""

    room: Room | None = None

    @classmethod
    def of(cls: type[Made], room: Room, **fields: Any) -> Made:
        """One with such fields, whose tables are in the room."""
        made = cls.__new__(cls)
        made.__dict__.update(fields, room=room)
        return made

    def address(self, name: str) -> int:
        """Where a table begins."""
        address: int = getattr(self, name).data_ptr() if self.room is None else self.room.address(name)
        return address

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if self.room is None or name not in self.room.parts:
                raise AttributeError(f"{type(self).__name__} has no {name!r}")
            table = self.__dict__[name] = self.room.tensor(name)
            return table


@dataclass(frozen=True, eq=False, kw_only=True)
class Table(_Cut):
    """One flat exchange: where this rank's rows go, and where the rows that come here are from.

    Places and src_rows are ``rank << 32 | row``; -1: none.
    """

    dst_rows: Int64[Tensor, "T J"]
    """The row at its receiver of each of a token's rows, in the order in which they are summed."""
    return_rows: Int32[Tensor, "T J"]
    """The row's place in this rank's sending order."""
    incoming: Int32[Tensor, "3 blocks"]
    """Of each block that comes here: first row, rows, place of the first in its sender's order."""
    num_slots: int
    """C"""

    @cached_property
    def src_rows(self) -> Int64[Tensor, "C"]:
        """Of each row here: its sender, and its place in the sender's order. Allocated when first asked for.

        A call as a whole has no need of it, and it is larger than all the rest.
        """
        return self.incoming.new_empty(self.num_slots, dtype=torch.int64)

    @property
    def has_src_rows(self) -> bool:
        """Whether anybody has asked for these."""
        return "src_rows" in self.__dict__


@dataclass(eq=False)
class HostCounts:
    """What the host is told of a fresh dispatch."""

    row: Int64[Tensor, "words"]
    """In host memory; see ``kernels.plan``."""
    told: npt.NDArray[np.int64]
    """The same memory, to be read: that takes a tenth of the time of asking the tensor."""
    event: torch.cuda.Event
    """When it is there."""
    is_captured: bool
    """Whether a graph writes it, at each replay; then the event says nothing."""
    stamp: int = 0
    """That of the plan whose host counts these are now."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DevicePlan(_Cut, Plan):
    """A plan whose rows are moved by kernels."""

    rows: Table
    pairs: Table | None
    """(token, rank) pairs, where rows are summed, or copied, at the ranks that they came to."""
    scalars: Int32[Tensor, "3"]
    """What only the device has to know; see ``kernels.plan``."""
    host_counts: HostCounts | None
    """None when the host knows already."""
    src_idx: Int32[Tensor, "R"] | None = None
    """Filled on arrival, for later dispatches on this plan."""
    local_idx: Int32[Tensor, "R K"] | None = None
    is_fused: bool = False
    """Whether its dispatch was done as a whole: then src_rows and sources are looked for when somebody asks."""
    sums_pairs: bool = False
    """Whether ranks sum a token's rows, and one goes back."""

    @property
    def back(self) -> Table:
        """The way back of what is summed at its owner."""
        return self.pairs if self.sums_pairs and self.pairs is not None else self.rows
