"""Makes plans on the device, and sees to what the host is told of them.

Letters: T tokens here, K top-k, P ranks, W counts.
"""

from __future__ import annotations

from collections import deque
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.base import PlanTensors
from crossdock.backends.cuda.kernels.plan import (
    HOST_NEEDED,
    HOST_PAIRS,
    HOST_ROWS,
    HOST_STAMP,
    HOST_WORDS,
    HOST_WORST,
    NUM_PAIRS,
    NUM_ROWS,
)
from crossdock.backends.cuda.plan import DevicePlan, HostCounts
from crossdock.backends.cuda.state import DeviceState
from crossdock.backends.cuda.stream import CallStreams
from crossdock.errors import CapacityError, NotSupported
from crossdock.extent import Extent, RowCount
from crossdock.layout import Padded
from crossdock.plan import overflow
from crossdock.spec import MAX_COUNT

NUM_HOST_COUNTS = 64
"""Dispatches whose host counts are kept."""
_TOLD_AFTER = NUM_HOST_COUNTS // 2
"""Fresh dispatches after which an overflow is told that nobody has asked for: all ranks then know of it."""
_MARK_EVERY = NUM_HOST_COUNTS // 4
"""Fresh dispatches for one event, by which the host knows that all before it are done."""
_NUM_CAPTURED = 4096
"""Captured dispatches for which there is room in host memory at first, and after it has grown so many more."""
_FEW_PLANS = 256
"""Plans that are remembered before those that are gone are looked for."""
REMADE = 1
"""The stamp of plans that are made again: no dispatch has such a number."""


class Planner:
    """A rank's plans."""

    def __init__(self, arena: Arena, state: DeviceState, streams: CallStreams, *, buffer_id: int) -> None:
        self._arena = arena
        self._on = state
        self._streams = streams
        self._masked: tuple[int, ...] = ()
        self._plans: list[ref[DevicePlan]] = []
        """All that may be used again, to be made void when a rank is masked; and some that are gone."""
        self._most_plans = _FEW_PLANS
        self._nowhere = torch.tensor([[2**30], [0]], dtype=torch.int32, device=state.device)
        num_words = state.plan_shape.num_words
        self._fixed_words, self._token_words = num_words(0), num_words(1) - num_words(0)
        """Words of a plan without tokens, and more for each of them."""
        self._same: dict[str, Any] = {
            "rank": state.rank,
            "buffer_id": buffer_id,
            "shape": state.plan_shape,
            "src_idx": None,
            "local_idx": None,
        }
        """Fields of all plans of dispatches."""
        self._has_fixed_rows = isinstance(arena.spec.layout, Padded)
        """Whether the host knows how many rows there are without being told."""
        num_words = HOST_WORDS.value + -(-state.num_local // 2) * 2
        self._end_of_tokens = HOST_WORDS.value + state.num_local
        self._words_of_row = num_words
        rows = _pinned_rows(NUM_HOST_COUNTS + 1, num_words)
        self.nobody = rows[-1]
        """Host counts that nobody reads."""
        self._host_counts = [HostCounts(row, row.numpy(), is_captured=False) for row in rows[:-1].unbind()]
        self._captured: list[HostCounts] = []
        """Those that graphs write, whenever they are replayed."""
        self._rows_to_capture = list(_pinned_rows(_NUM_CAPTURED, num_words).unbind())
        """Room for more of them."""
        self._is_short_of_rows = False
        """Whether half of it has been given away since there was made more."""
        self.overflows: list[tuple[int, CapacityError]] = []
        """See Backend."""
        self._num_given = 0
        """Host counts that were given to dispatches; the last one's number."""
        self._num_done = 0
        """Of these, how many are known to be done."""
        self._marks: deque[tuple[int, torch.cuda.Event]] = deque()
        """Every ``_MARK_EVERY`` of these, its number, and when it is done."""
        self._num_fresh = 0
        self._unread: deque[tuple[int, int, HostCounts]] = deque()
        """Of dispatches whose host counts nobody has looked at: its number among the fresh ones, sequence number,
        host counts."""

    def mask(self, ranks: tuple[int, ...]) -> None:
        """Plans from now on have no rows of these ranks. Those before move no rows any more, in graphs too.

        A graph that makes its plan itself does so again when it is replayed.
        """
        self._masked = ranks
        for plan in filter(None, (known() for known in self._plans)):
            plan.table("dst_rows").fill_(-1)
            plan.table("pair_dst_rows").fill_(-1)
            for incoming in (plan.table("incoming"), plan.table("pair_incoming")):
                incoming[:2] = self._nowhere  # no rows, and no gap before them

    def blank(self, num_tokens: int, stamp: int, extent: Extent) -> DevicePlan:
        """The plan of a dispatch whose kernels fill it, with the picks too; of the caller's current stream.

        Args:
            stamp: REMADE for one that is made again: the host is told nothing of it.
        """
        host_counts = None
        if torch.cuda.is_current_stream_capturing():
            host_counts = self._next_captured(extent) if stamp != REMADE else None
        elif stamp != REMADE:
            number = self._num_given = self._num_given + 1
            if number - self._num_done > NUM_HOST_COUNTS:
                self._until_done(number - NUM_HOST_COUNTS)
            host_counts = self._host_counts[number % NUM_HOST_COUNTS]
            if self._is_short_of_rows:
                self._rows_to_capture += _pinned_rows(_NUM_CAPTURED, self._words_of_row).unbind()
                self._is_short_of_rows = False
            host_counts.number, host_counts.stamp, told = number, stamp, host_counts.told
            host_counts.extent = extent
            told[HOST_NEEDED.value] = told[HOST_STAMP.value] = 0  # if that was void, nobody has looked
        num_words = self._fixed_words + num_tokens * self._token_words
        plan = DevicePlan.__new__(DevicePlan)
        memory = self._on.state.new_empty((num_words,), dtype=torch.int32)
        plan.__dict__.update(
            self._same,
            memory=memory,
            address=memory.data_ptr(),
            extent=extent,
            num_rows=extent.slot_rows if self._has_fixed_rows else None,
            stamp=stamp,
            num_tokens=num_tokens,
            too_many=min(num_tokens, MAX_COUNT) if num_tokens > extent.max_tokens else 0,
            masked=self._masked,
            host_counts=host_counts,
        )
        self._plans.append(ref(plan))
        if len(self._plans) > self._most_plans:
            self._forget_gone()
        return plan

    def placed(self, plan: DevicePlan, sequence: int, mode: RowCount) -> None:
        """What fills the plan of a dispatch has been issued: its host counts are on their way."""
        host_counts = plan.host_counts
        if host_counts is None or host_counts.is_captured:
            return
        host_counts.tells = mode == "exact"
        self._num_fresh += 1
        if mode == "capacity":
            self._unread.append((self._num_fresh, sequence, host_counts))
        if host_counts.number % _MARK_EVERY == 0:
            self._marks.append((host_counts.number, self._streams.event()))
        if self._unread and self._num_fresh - self._unread[0][0] >= _TOLD_AFTER:
            self._look_at_host_counts(_TOLD_AFTER)

    def as_remade(self, plan: DevicePlan, tensors: PlanTensors) -> DevicePlan:
        """A plan whose tables are filled, as one that was made of these tensors."""
        pairs = tensors.partial_rows if self._on.num_pairs else None
        if pairs is not None and plan.stamp == REMADE and plan.src_idx is None:  # else they have come with the rows
            plan.table("partial_rows")[: pairs.shape[0]].copy_(pairs)
        made = plan.changed(
            topk_idx=tensors.topk_idx,
            counts=tensors.counts,
            stamp=REMADE,
            num_rows=tensors.src_idx.numel(),
            host_counts=None,
            partial_rows=pairs,
            src_idx=tensors.src_idx.reshape(-1),
            local_idx=None if self._arena.spec.layout.per_pick else tensors.local_idx,
        )
        self._plans.append(ref(made))
        return made

    def told(self, plan: DevicePlan) -> DevicePlan:
        """The plan with what its host counts say, which have come.

        Raises:
            CapacityError: rows did not fit; on all ranks.
        """
        host_counts = plan.host_counts
        if host_counts is None:
            return plan
        is_its = host_counts.is_captured or host_counts.stamp == plan.stamp
        if is_its and (error := self.overflow_of(host_counts)) is not None:
            raise error
        if is_its and host_counts.tells:
            num_rows, num_pairs = int(host_counts.told[HOST_ROWS.value]), int(host_counts.told[HOST_PAIRS.value])
            tokens = host_counts.told[HOST_WORDS.value : self._end_of_tokens].tolist()
        else:  # nobody has asked for them yet, or so long ago that the host counts are another dispatch's by now
            scalars = plan.table("scalars").tolist()
            num_rows, num_pairs = scalars[NUM_ROWS.value], scalars[NUM_PAIRS.value]
            tokens = plan.num_tokens_per_expert.tolist()
        made = plan.changed(num_rows=num_rows, num_pairs=num_pairs, told_tokens=tokens, host_counts=None)
        self._plans.append(ref(made))
        return made

    def overflow_of(self, host_counts: HostCounts) -> CapacityError | None:
        """What host counts that have come say of rows that did not fit; once."""
        told = host_counts.told
        needed = int(told[HOST_NEEDED.value])
        if not needed:
            return None
        told[HOST_NEEDED.value] = 0
        worst = int(told[HOST_WORST.value])
        assert host_counts.extent is not None, "host counts of no dispatch"
        return overflow(host_counts.extent.spec, self._arena.topology, worst=worst, needed=needed)

    def look_at_all_host_counts(self) -> None:
        """Notes all overflows, also of graphs that were replayed; what was issued is done."""
        self._marks.clear()
        self._num_done = self._num_given
        self._look_at_host_counts(0)
        for host_counts in self._captured:
            if (error := self.overflow_of(host_counts)) is not None:
                self.overflows.append((0, error))

    def _look_at_host_counts(self, age: int) -> None:
        """Notes the overflows of dispatches ``age`` before the last, or earlier; all ranks look at the same ones."""
        while self._unread and self._num_fresh - self._unread[0][0] >= age:
            _, sequence, host_counts = self._unread.popleft()
            self._until_done(host_counts.number)
            if (error := self.overflow_of(host_counts)) is not None:
                self.overflows.append((sequence, error))

    def _until_done(self, number: int) -> None:
        """Returns when what has had host counts up to that number is done: some behind it has been marked."""
        while self._num_done < number:
            if not self._marks:  # a call that has failed is not marked
                self._streams.synchronize()
                self._num_done = self._num_given
                return
            self._num_done, event = self._marks.popleft()
            event.synchronize()

    def _forget_gone(self) -> None:
        """Plans that are gone need not be made void."""
        self._plans = [known for known in self._plans if known() is not None]
        self._most_plans = 2 * len(self._plans) + _FEW_PLANS

    def _next_captured(self, extent: Extent) -> HostCounts:
        """Room in host memory for what a graph tells the host: its own for good.

        A capture may not allocate such memory; any fresh dispatch outside of one sees that there is enough.
        """
        if not self._rows_to_capture:
            raise NotSupported(
                f"{len(self._captured)} fresh dispatches of this buffer have been captured in graphs, the last "
                f"{_NUM_CAPTURED // 2} at least with none outside of a capture, which would have made room for more; "
                f"dispatch once outside of a capture"
            )
        row = self._rows_to_capture.pop()
        self._is_short_of_rows = len(self._rows_to_capture) < _NUM_CAPTURED // 2
        self._captured.append(HostCounts(row, row.numpy(), is_captured=True, extent=extent))
        return self._captured[-1]


def _pinned_rows(num: int, num_words: int) -> Tensor:
    """Host memory that a device writes to, int64 ``[num, words]``, zeroed."""
    return torch.zeros(num, num_words, dtype=torch.int64, device="cpu", pin_memory=True)
