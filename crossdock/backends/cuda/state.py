"""What a rank's kernels share: counters and flags of a connection's calls; of a Spec scratch, and where regions lie.

Letters: L local experts, P ranks, W counts, B blocks of rows, C rows of a receive slot, M max_tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from crossdock.arena import Arena, Control
from crossdock.backends.cuda.config import counts_at_once
from crossdock.backends.cuda.kernels import calls
from crossdock.backends.cuda.kernels.groups import (
    Arrivals,
    Boxes,
    Own,
    Places,
    Region,
    Returns,
    Scratch,
    Sizes,
    as_constants,
    odd,
)
from crossdock.backends.cuda.kernels.sync import ABORTED, FAILURE_WORDS
from crossdock.backends.cuda.plan import PlanShape
from crossdock.extent import Extent, RowCount
from crossdock.layout import Expanded, Padded
from crossdock.transport.device import DeviceTransport

_POLL_S = 0.3e-6
"""A poll of words takes at least that long, on an H200 with 2 to 8 ranks on it."""
PICKS_AT_ONCE = 512
"""Picks that a program counts at a time."""


class Kept:
    """Memory of ours that kernels are given in many calls: where it begins is asked once."""

    __slots__ = ("address", "memory")

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.address = memory.data_ptr()


class CallState:
    """The memory that all kernels of a rank's connection share, whatever their Spec: what they know of calls."""

    def __init__(self, transport: DeviceTransport, control: Control, *, timeout_s: float) -> None:
        self.control = control
        self.transport = transport
        self.device = transport.device
        self.rank, self.num_ranks = transport.rank, transport.num_ranks
        self.timeout_s = timeout_s
        self.max_polls = max(1, int(timeout_s / _POLL_S))
        num_state = calls.STATE_WORDS.value
        self.state = self._zeros(num_state + self.num_ranks, torch.int64)
        self.waits_ns = self.state[num_state:]
        """``[P]``, how long kernels have waited for each rank."""
        self.failure = self._zeros(FAILURE_WORDS.value, torch.int64)
        self.host_failure = torch.zeros(FAILURE_WORDS.value, dtype=torch.int64, device="cpu", pin_memory=True)
        """The failure of the call that has failed, in host memory; zero while none has."""
        self.flags = self._zeros(calls.FLAGS.value, torch.int32)
        self.nothing = Kept(self.flags)
        """In place of a tensor that a kernel has no use of."""
        call_words = -(-(self.num_ranks + calls.CALL_WORDS.value) // 2) * 2  # whole multiples of 16 bytes
        self.calls = torch.zeros(control.max_in_flight, call_words, dtype=torch.int64, device=self.device)
        self.next_call = itertools.cycle([Kept(room) for room in self.calls.unbind()]).__next__
        """Room for what kernels keep of the next call; as many calls may be in flight as there is room for."""
        torch.cuda.synchronize(self.device)  # what was zeroed here was so on another stream

    @contextmanager
    def all_void(self) -> Iterator[None]:
        """Calls within are void: their kernels touch no peer's memory, and wait for nobody. None may be under way."""
        before = self.state[calls.STATUS.value].clone()
        self.state[calls.STATUS.value] = ABORTED.value
        yield
        self.state[calls.STATUS.value] = before
        torch.cuda.synchronize(self.device)

    def own(self, sizes: Sizes, *, tokens: Tensor, capacity: int, max_tokens: int) -> Own:
        """The group that all kernels are given.

        Args:
            tokens: int64 ``[L]``, picks of each local expert in all calls.
        """
        boxes = Boxes(*(self.control[name].offset for name in ("words", "arrived", "aborts", "counts")))
        return Own(
            segments=self.transport.segments,
            state=self.state,
            failure=self.failure,
            host_failure=self.host_failure,
            flags=self.flags,
            all_tokens=tokens,
            capacity=odd(capacity),
            max_tokens=odd(max_tokens),
            boxes=boxes,
            sizes=sizes,
        )

    def of_words(self) -> Own:
        """The same for kernels that exchange words alone, of no Spec."""
        sizes = Sizes(
            P=self.num_ranks,
            RING=self.control.ring,
            COUNTS=self.control.num_counts,
            L=1,
            K=1,
            J=1,
            PAIRS=0,
            BY_RANK=True,
            RANK_ORDER=False,
            ALIGNMENT=1,
            AT_ONCE=1,
            TABLES=Places(*(0 for _ in Places._fields)),
        )
        return self.own(as_constants(sizes), tokens=self.state, capacity=0, max_tokens=0)

    def _zeros(self, num: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(num, dtype=dtype, device=self.device)


class DeviceState:
    """The memory that kernels of a rank share for one Spec, and the groups in which they are given it.

    Args:
        has_pairs: whether plans say which rows of a rank are of one token.
    """

    def __init__(self, arena: Arena, of_calls: CallState, *, has_pairs: bool) -> None:
        spec = arena.spec
        self.arena = arena
        self.of_calls = of_calls
        self.device, self.rank, self.num_ranks = of_calls.device, of_calls.rank, of_calls.num_ranks
        self.state, self.nothing, self.waits_ns = of_calls.state, of_calls.nothing, of_calls.waits_ns
        self.calls, self.next_call, self.max_polls = of_calls.calls, of_calls.next_call, of_calls.max_polls
        self.num_local = spec.num_local_experts(self.num_ranks)
        self.tokens = self._zeros(self.num_local, torch.int64)
        """``[L]``, picks of each local expert in all calls."""
        self._regions: dict[str, Tensor] = {}
        self.lie_in(of_calls.transport.segment)
        self.num_pairs = min(spec.num_topk, self.num_ranks) if has_pairs else 0
        """Pairs of a token, at most."""
        self.plan_shape = PlanShape.of(arena, num_pairs=self.num_pairs)
        self.num_chunk_tokens = min(128, PICKS_AT_ONCE // (1 << (spec.num_topk - 1).bit_length()) or 1)
        """Tokens whose picks a program counts."""
        self.own = of_calls.own(
            self._sizes(),
            tokens=self.tokens,
            capacity=spec.capacity(self.num_ranks),
            max_tokens=spec.max_tokens,
        )
        self.scratch = self._scratch()
        self.returns = Returns(self.region("outputs"), self.region("returned"), self.region("returned_extras"))
        torch.cuda.synchronize(self.device)  # what was zeroed here was so on another stream

    def lie_in(self, segment: Tensor | None) -> None:
        """Regions lie in that segment of this rank's from now on; None: in none."""
        self._regions = {} if segment is None else {name: self.arena.view(segment, name) for name in self.arena.regions}

    def own_of(self, extent: Extent, row_count: RowCount) -> Own:
        """What kernels are given for dispatches of such an M."""
        return self.own._replace(capacity=odd(extent.room(row_count)), max_tokens=odd(extent.max_tokens))

    def region(self, name: str, *, offset: int = 0) -> Region:
        """Where a region begins (``offset`` bytes behind), and how large its slots are; zeros where there is none."""
        if name not in self.arena.regions:
            return Region(0, 0)
        region = self.arena[name]
        return Region(region.offset + offset, region.slot_bytes)

    def arrivals(self, rows: str, *, scales: str = "scale", scale_offset: int = 0) -> Arrivals:
        """Where dispatched rows land, if they land in that region; their scales, in that one."""
        scales_at = self.region(scales, offset=scale_offset)
        return Arrivals(self.region(rows), scales_at, self.region("metadata"), self.region("partial_rows"))

    def view(self, name: str, slot: int) -> Tensor:
        """A slot of a region of this rank's own segment."""
        return self._regions[name][slot]

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that belongs to the caller's current stream."""
        return self.state.new_empty(shape, dtype=dtype)

    def _zeros(self, num: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(num, dtype=dtype, device=self.device)

    def _sizes(self) -> Sizes:
        spec = self.arena.spec
        layout, by_rank = spec.layout, not spec.layout.per_pick
        alignment = layout.alignment if isinstance(layout, Expanded) else 0 if isinstance(layout, Padded) else 1
        sizes = Sizes(
            P=self.num_ranks,
            RING=self.arena.control_words.ring,
            COUNTS=self.arena.control_words.num_counts,
            L=self.num_local,
            K=spec.num_topk,
            J=self.plan_shape.num_columns,
            PAIRS=self.num_pairs,
            BY_RANK=by_rank,
            RANK_ORDER=spec.reduce == "rank",
            ALIGNMENT=alignment,
            AT_ONCE=counts_at_once(self.num_ranks, self.plan_shape.num_counts),
            TABLES=self.plan_shape.places,
        )
        return as_constants(sizes)

    def _scratch(self) -> Scratch:
        spec = self.arena.spec
        num_chunks = -(-spec.max_tokens // self.num_chunk_tokens)
        num_pairs = self.num_ranks * spec.max_tokens if self.num_pairs else 0
        return Scratch(
            sums=self._zeros(num_chunks * self.plan_shape.num_counts, torch.int32),
            send_starts=self._zeros(2 * (spec.num_experts + self.num_ranks), torch.int32),
            src_rows=self._zeros(spec.most_rows(self.num_ranks), torch.int64),
            pair_src_rows=self._zeros(max(1, num_pairs), torch.int64),
        )
