"""Which Spec serves a call of V2 or V2.5, and how many rows there is room for.

Letters: R ranks, K picks per token, H hidden, M the most tokens of a rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.buffer import Buffer
from crossdock.compat.deep_ep import sizes
from crossdock.compat.deep_ep.engine import Engine
from crossdock.compat.deep_ep.ep_handle import Routed
from crossdock.compat.deep_ep.formats import wire_of
from crossdock.layout import Compact, Expanded, Layout
from crossdock.spec import Spec


class Shape(NamedTuple):
    """What decides a Spec, beside the rows of a slot."""

    is_expanded: bool
    num_experts: int
    num_topk: int
    hidden: int
    max_tokens: int
    """The most M of its calls."""
    alignment: int
    dtype: torch.dtype
    packed: int
    """Values in one element of data."""
    scales: tuple[int, torch.dtype] | None
    turns_scales: bool


class Shapes:
    """Native Buffers by what calls need.

    Args:
        max_tokens: M of calls that name none; 0: there is none.
        hidden: of rows whose data has several values in an element; 0: none have.
        sums_at_rank: expanded rows of a token are added up where they are first; else at their owner alone.
        num_slots: calls that may be started and not waited for.
    """

    def __init__(self, engine: Engine, *, max_tokens: int, hidden: int, sums_at_rank: bool, num_slots: int) -> None:
        self._engine = engine
        self._max_tokens = max_tokens
        self._hidden = hidden
        self._sums_at_rank = sums_at_rank
        self._num_slots = num_slots
        self._capacities: dict[Shape, int] = {}
        self._worst_cases: dict[Shape, int] = {}

    def shape(
        self,
        data: Tensor,
        scales: Tensor | None,
        *,
        expands: bool,
        num_experts: int,
        num_topk: int,
        num_tokens: int,
        alignment: int,
        turns_scales: bool,
    ) -> Shape:
        """That of a fresh dispatch of such rows."""
        columns = data.shape[1]
        packed = 1
        if scales is not None and columns and self._hidden > columns and self._hidden % columns == 0:
            packed = self._hidden // columns
        return Shape(
            is_expanded=expands,
            num_experts=num_experts,
            num_topk=num_topk,
            hidden=columns * packed,
            max_tokens=num_tokens if num_tokens == self._max_tokens else self._room(num_tokens),
            alignment=alignment,
            dtype=data.dtype,
            packed=packed,
            scales=None if scales is None else (scales.shape[1], scales.dtype),
            turns_scales=turns_scales and scales is not None,
        )

    def _room(self, num_tokens: int) -> int:
        """The buffer's own M or a power of two, whichever is smaller and enough: few Specs serve all M of calls."""
        room = 1 << (num_tokens - 1).bit_length()
        return min(room, self._max_tokens) if num_tokens <= self._max_tokens else room

    def _layout(self, shape: Shape) -> Layout:
        return Expanded(alignment=shape.alignment) if shape.is_expanded else Compact()

    def _worst(self, shape: Shape) -> int:
        if shape not in self._worst_cases:
            self._worst_cases[shape] = self._layout(shape).worst_case(
                num_ranks=self._engine.num_ranks,
                max_tokens=shape.max_tokens,
                num_topk=shape.num_topk,
                num_local_experts=shape.num_experts // self._engine.num_ranks,
            )
        return self._worst_cases[shape]

    def _capacity(self, shape: Shape) -> int:
        """Rows of a slot, where the host knows how many come; more once a call has needed more."""
        if shape not in self._capacities:
            self._capacities[shape] = sizes.rows_at_first(
                self._worst(shape),
                num_ranks=self._engine.num_ranks,
                num_tokens=shape.max_tokens,
                num_topk=shape.num_topk,
            )
        return self._capacities[shape]

    def grow(self, shape: Shape) -> None:
        """Twice the rows from now on; every rank raises the same CapacityError, so all of them grow together."""
        self._capacities[shape] = min(2 * self._capacity(shape), self._worst(shape))

    def buffer(self, shape: Shape, *, asks_host: bool, device: torch.device) -> Buffer:
        known = self._capacities if asks_host else self._worst_cases
        capacity = known.get(shape) or (self._capacity(shape) if asks_host else self._worst(shape))

        def make_spec() -> Spec:
            layout: Layout = Compact(capacity=capacity)
            if shape.is_expanded:
                layout = Expanded(alignment=shape.alignment, capacity=capacity)
            sums_at_rank = self._sums_at_rank or not shape.is_expanded
            return Spec(
                num_experts=shape.num_experts,
                num_topk=shape.num_topk,
                hidden=shape.hidden,
                max_tokens=shape.max_tokens,
                wire=wire_of(
                    shape.dtype, shape.hidden, shape.scales, packed=shape.packed, column_major=shape.turns_scales
                ),
                layout=layout,
                reduce="rank" if sums_at_rank else "token",
                extra_bytes=0 if sums_at_rank else 4 * shape.num_topk,
                num_slots=self._num_slots,
            )

        return self._engine.buffer((shape, capacity), make_spec, device)

    def carrier(self, routed: Routed, data: Tensor, scales: Tensor | None, *, turns: bool) -> tuple[Buffer, bool]:
        """The Buffer that carries such rows on a known plan, and whether they go in the combine format.

        Of another Buffer than the plan's its Spec has the call's M, as a plan that is made again has its Buffer's.
        """
        spec = routed.buffer.spec
        wire = spec.wire
        if scales is None:
            return routed.buffer, not wire.is_unquantized
        if (
            data.dtype == wire.dtype
            and scales.dtype == wire.scale_dtype
            and scales.shape[1] == wire.num_scales(spec.hidden)
            and turns == wire.column_major
        ):
            return routed.buffer, False
        packed = spec.hidden // data.shape[1]
        shape = Shape(
            routed.is_expanded, spec.num_experts, spec.num_topk, spec.hidden, routed.num_tokens, routed.alignment,
            data.dtype, packed, (scales.shape[1], scales.dtype), turns,
        )  # fmt: skip
        assert spec.layout.capacity is not None
        self._capacities[shape] = spec.layout.capacity
        return self.buffer(shape, asks_host=True, device=data.device), False
