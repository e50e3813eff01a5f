"""The seam: what a Buffer asks of whatever moves rows.

Letters: T tokens here, K top-k, H hidden, R rows received, Q rows sent, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from crossdock.plan import Plan
from crossdock.wire import Quantized


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """What a dispatch sends: rows, and the small things that travel with each."""

    x: Tensor | Quantized  # [T, H]
    weights: Tensor | None  # [T, K] float32
    extras: tuple[Tensor, ...]  # [T, ...] each
    wide: bool = False
    """x travels in the combine format; ``Arena.region_of_rows`` says where it lands."""


@dataclass(frozen=True, kw_only=True)
class Landed:
    """What lies in a receive slot once all rows have arrived; rows are views, the small things are copies."""

    plan: Plan
    data: Tensor  # [R, H]
    scale: Tensor | None  # [R, G]
    src_idx: Tensor  # [R] int32
    topk_idx: Tensor | None  # [R, K] int32, one row per (token, rank)
    weights: Tensor | None  # [R, K] there, [R] where a row is one pick; float32
    extras: tuple[Tensor, ...]  # [R, ...] each


class Backend(Protocol):
    """Moves rows between this rank and its peers. Called only between the words that permit it."""

    def post_counts(self, sequence: int, counts: Tensor) -> None:
        """Tells every rank how many rows this rank will send it in the call; before the call's word is posted."""

    def read_counts(self, sequence: int) -> Tensor:
        """Everybody's counts for the call, int64 [P, W]; after the words of all ranks have been seen."""

    def push_rows(self, plan: Plan, outgoing: Outgoing, slots: Sequence[int]) -> None:
        """Writes each row into its final place, in the receive slot that each peer named."""

    def landed(self, plan: Plan, outgoing: Outgoing, slot: int, *, num_rows: int) -> Landed:
        """What has arrived in this rank's slot, with as many rows; zeroes what alignment left between segments."""

    def push_outputs(
        self, plan: Plan, y: Tensor | None, extras: Sequence[Tensor], weights: Tensor | None, slots: Sequence[int]
    ) -> None:
        """Writes outputs [R, H] (or their sums, weighted by [R], where ranks sum) and extras [R, ...] to their owners.

        ``y`` None: the outputs stay in the arena, to be pulled.
        """

    def sum_rows(
        self, plan: Plan, weights: Tensor | None, bias: Tensor | None, output_slots: Sequence[int], landing_slot: int
    ) -> Tensor:
        """The sum of each token's rows [T, H], pulled from the peers' output slots or, if pushed, from landing."""

    def returned_extras(self, plan: Plan, extras: Sequence[Tensor], landing_slot: int) -> tuple[Tensor, ...]:
        """Extras that came home: [T, ...] summed over ranks, or [T, K, ...] where a row is one pick."""
