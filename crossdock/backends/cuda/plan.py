"""Where rows go, as tables on the device.

Letters: T tokens here, J places of a token, K top-k, R rows, C rows of a receive slot, P ranks, N segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from crossdock.plan import Plan


@dataclass(frozen=True, eq=False, kw_only=True)
class Table:
    """One flat exchange: where this rank's rows go, and where the rows that come here are from.

    Places and origins are ``rank << 32 | row``; -1: none.
    """

    places: Int64[Tensor, "T J"]
    """The row at its receiver of each of a token's rows, in the order in which they are summed."""
    homes: Int32[Tensor, "T J"]
    """The row's place in this rank's sending order."""
    incoming: Int32[Tensor, "3 blocks"]
    """Of each block that comes here: first row, rows, place of the first in its sender's order."""
    num_slots: int
    """C"""

    @cached_property
    def origins(self) -> Int64[Tensor, "C"]:
        """Of each row here: who sent it, and its place in the sender's order. Room from the first time it is asked for.

        A call as a whole has no need of it, and it is larger than all the rest.
        """
        return self.incoming.new_empty(self.num_slots, dtype=torch.int64)

    @property
    def has_origins(self) -> bool:
        """Whether anybody has asked for these."""
        return "origins" in self.__dict__


@dataclass(eq=False)
class Report:
    """What the host is told of a fresh dispatch."""

    row: Int64[Tensor, "words"]
    """In host memory; see ``kernels.places``."""
    told: npt.NDArray[np.int64]
    """The same memory, to be read: that takes a tenth of the time of asking the tensor."""
    event: torch.cuda.Event
    """When it is there."""
    is_captured: bool
    """Whether a graph writes it, at each replay; then the event says nothing."""
    stamp: int = 0
    """That of the plan whose report it is now."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DevicePlan(Plan):
    """A plan whose rows are moved by kernels."""

    rows: Table
    pairs: Table | None
    """(token, rank) pairs, where rows are summed, or copied, at the ranks that they came to."""
    scalars: Int32[Tensor, "3"]
    """What only the device has to know; see ``kernels.places``."""
    report: Report | None
    """None when the host knows already."""
    src_idx: Int32[Tensor, "R"] | None = None
    """Filled on arrival, for later dispatches on this plan."""
    local_idx: Int32[Tensor, "R K"] | None = None
    is_whole: bool = False
    """Whether its dispatch was done as a whole: then origins and sources are looked for when somebody asks."""
    sums_pairs: bool = False
    """Whether ranks sum a token's rows, and one goes home."""

    @property
    def back(self) -> Table:
        """The way home of what is summed at its owner."""
        return self.pairs if self.sums_pairs and self.pairs is not None else self.rows
