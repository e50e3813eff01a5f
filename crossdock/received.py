"""What a dispatch gives: rows in a receive slot, and everything that is known about them.

Letters: R rows, L local experts, C capacity per expert, K top-k, H hidden, G scale groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from crossdock.backends.base import Metadata
from crossdock.errors import ConfigError
from crossdock.plan import Plan
from crossdock.scales import ScaleLayout
from crossdock.wire import Quantized

CopyRows = Callable[[Plan, "Tensor | Quantized", "Tensor | Quantized"], None]
"""``Backend.copied``."""


class Lease:
    """The right to the rows of one receive slot, until a later dispatch takes it, and what travelled with them.

    That is read when somebody asks for it; or when the slot comes round, where somebody could still ask.
    """

    def __init__(self, slot: int, read: Callable[[], Metadata]) -> None:
        self.slot = slot
        self.is_valid = True
        self._read: Callable[[], Metadata] | None = read
        self._metadata: Metadata | None = None

    def metadata(self) -> Metadata:
        """What travelled with the rows; stays when they are stale.

        Raises:
            ConfigError: it could not be read before the slot came round, or cannot be read here.
        """
        if self._metadata is None:
            if self._read is None:
                raise ConfigError(
                    "what came with these rows is gone: their receive slot was taken in a CUDA graph's capture before "
                    "anybody read it; ask for recv.src_idx (and weights) before the capture begins"
                )
            self._metadata, self._read = self._read(), None
        return self._metadata

    def end(self) -> None:
        """The slot comes round: rows in it are stale from now on. Reads what came with them, if that can be."""
        self.is_valid = False
        with contextlib.suppress(ConfigError):
            self.metadata()
        self._read = None

    def check(self) -> None:
        """Raises ConfigError when the slot has come round."""
        if not self.is_valid:
            raise ConfigError(
                f"these rows are stale: receive slot {self.slot} has been taken by a later dispatch; use rows before "
                f"their slot comes round (num_slots dispatches later, or a call of another Spec over the same bytes), "
                f"or dispatch with copy=True"
            )


class SlotViews(Protocol):
    """Where the rows of receive slots lie, as tensors."""

    scales: ScaleLayout
    has_offsets: bool
    """Whether experts' rows begin at offsets (Expanded)."""

    def received(self, region: str, slot: int, num_rows: int) -> Tensor | Quantized:
        """The first rows of a slot, [R, H] or [L, C, H]."""

    def room(self, rows: Tensor | Quantized) -> Tensor | Quantized:
        """Memory for rows like these, in no slot."""
        raise NotImplementedError

    def rows(self, name: str, slot: int, num_rows: int) -> Tensor:
        """The first rows of a slot in a region."""
        raise NotImplementedError

    def new_outputs(self, num_rows: int) -> Tensor:
        """Memory for so many outputs that lies in no slot."""
        raise NotImplementedError


class Received:
    """Rows that came to this rank. Leading dimensions are [R] for Compact and Expanded, [L, C] for Padded.

    ``x`` and ``output_rows()`` are views of a receive slot, valid until it comes round, unless the layout expands rows
    into memory of their own (``Expanded(staged=True)``); all the rest stays valid.
    """

    def __init__(
        self,
        plan: Plan,
        lease: Lease,
        views: SlotViews,
        region: str,
        num_rows: int,
        x: Tensor | Quantized | None = None,
    ) -> None:
        self.plan = plan
        """Where each row came from and goes back to; good for any number of dispatches and combines."""
        self._lease = lease
        self._views = views
        self._region = region
        self._num_rows = num_rows
        """Rows to look at."""
        self._expanded = x
        """Rows that were expanded into memory of their own: nothing of them lies in a slot."""
        self._owned = x
        """Rows of its own, which no later dispatch overwrites."""

    def __repr__(self) -> str:
        tokens = self.num_tokens_per_expert.tolist()
        return f"Received(num_rows={self.num_rows}, num_tokens_per_expert={tokens}, is_stale={self.is_stale})"

    @property
    def num_rows(self) -> int | None:
        """Rows up to the end of the last segment; fewer than ``x`` has with ``rows="capacity"``.

        None where the host has not been told: on CUDA with ``rows="capacity"``.
        """
        return self.plan.num_rows

    @property
    def num_tokens_per_expert(self) -> Tensor:
        """int32 [L], the picks of each local expert."""
        return self.plan.num_tokens_per_expert

    @property
    def num_tokens_per_expert_list(self) -> list[int]:
        """The same as integers on the host, of the read that ``rows="exact"`` makes: nothing is waited for again.

        Raises:
            ConfigError: the host has not been told: on CUDA with ``rows="capacity"``, also where a plan was made so.
        """
        counts = self.plan.num_tokens_per_expert_list
        if counts is None:
            raise ConfigError(
                "the host was not told how many tokens came: it waits for nothing with rows='capacity'; dispatch with "
                "rows='exact', or ask for recv.num_tokens_per_expert.tolist(), which waits for the device"
            )
        return counts

    @cached_property
    def expert_offsets(self) -> Tensor | None:
        """Expanded: int32 [L + 1], where each expert's rows start, and the end."""
        return self.plan.segment_starts.to(torch.int32) if self._views.has_offsets else None

    @property
    def topk_idx(self) -> Tensor | None:
        """Compact: int32 [R, K], the local experts each row is for, in pick order; -1 for picks of other ranks."""
        return self._lease.metadata().topk_idx

    @property
    def weights(self) -> Tensor | None:
        """float32, when dispatch was given weights: for Compact [R, K], 0 for other ranks' picks; else one per row."""
        return self._lease.metadata().weights

    @property
    def src_idx(self) -> Tensor:
        """int32: source rank * max_tokens + source token; -1 in rows that hold none."""
        return self._lease.metadata().src_idx

    @property
    def extras(self) -> tuple[Tensor, ...]:
        """The opaque tensors dispatch was given, by row."""
        return self._lease.metadata().extras

    @property
    def x(self) -> Tensor | Quantized:
        """The rows, [R, H] or [L, C, H]; Quantized when the wire is narrow.

        Raises:
            ConfigError: the slot has come round.
        """
        if self._owned is not None:
            return self._owned
        self._lease.check()
        return self._rows

    def output_rows(self) -> Tensor:
        """Where to write outputs so that combine can leave them in place and the owners pull them: shaped as ``x``.

        Once a combine has been given them they belong to the peers, until a later dispatch completes. Where rows are
        staged these are memory of the caller's, contents undefined, which combine pushes like any other tensor.

        Raises:
            ConfigError: the slot has come round.
        """
        if self._expanded is None:
            self._lease.check()
        return self._outputs

    def copied(self, copies: CopyRows) -> Received:
        """The same with rows ``x`` of its own, which no later dispatch overwrites; of those that came, no others."""
        copy = Received(self.plan, self._lease, self._views, self._region, self._num_rows)
        x = self.x
        copy._owned = self._views.room(x)
        copies(self.plan, x, copy._owned)
        return copy

    def without_copy(self) -> Received:
        """The same, whose ``x`` is a view again where rows lie in a slot: it keeps no copy of them alive."""
        return Received(self.plan, self._lease, self._views, self._region, self._num_rows, self._expanded)

    @cached_property
    def _rows(self) -> Tensor | Quantized:
        return self._views.received(self._region, self._lease.slot, self._num_rows)

    @cached_property
    def _outputs(self) -> Tensor:
        if self._expanded is not None:
            return self._views.new_outputs(self._num_rows)
        return self._views.rows("outputs", self._lease.slot, self._num_rows)

    @property
    def is_stale(self) -> bool:
        """Whether the receive slot has come round; never of rows that were expanded into memory of their own."""
        return not self._lease.is_valid and self._expanded is None
