"""Makes plans on the device: counts of picks, everybody's counts, and from both where each row goes.

Letters: T tokens here, K top-k, J rows of a token, C rows of a receive slot, P ranks, N segments, B blocks, W
counts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.base import PlanTensors, RowCount
from crossdock.backends.cuda.config import power_of_two, src_rows_at_once
from crossdock.backends.cuda.kernels import plan as plan_kernels
from crossdock.backends.cuda.kernels.plan import (
    HOST_NEEDED,
    HOST_PAIRS,
    HOST_ROWS,
    HOST_WORDS,
    HOST_WORST,
    SCALARS,
)
from crossdock.backends.cuda.launch import Launcher, kind_of
from crossdock.backends.cuda.plan import DevicePlan, HostCounts, Part, Room, Shapes, Table
from crossdock.errors import CapacityError, NotSupported
from crossdock.layout import Padded
from crossdock.plan import overflow

_PICKS = 128
"""Picks that a program compares with each other."""
_CELLS = 4096
"""Counts of chunks that a program sums at a time."""
NUM_HOST_COUNTS = 64
"""Dispatches whose host_counts are kept."""
_TOLD_AFTER = NUM_HOST_COUNTS // 2
"""Fresh dispatches after which an overflow is told that nobody has asked for: all ranks then know of it."""
_NUM_CAPTURED = 1024
REMADE = 1
"""The stamp of plans that are made again: no dispatch has such a number."""


class Planner:
    """A rank's plans.

    Args:
        has_pairs: whether plans say which rows of a rank are of one token.
    """

    def __init__(self, arena: Arena, launcher: Launcher, *, rank: int, buffer_id: int, has_pairs: bool) -> None:
        self._arena = arena
        self._on = launcher
        self._rank = rank
        self._buffer_id = buffer_id
        self._has_pairs = has_pairs
        self._masked: tuple[int, ...] = ()
        self._nowhere = torch.tensor([[2**30], [0]], dtype=torch.int32, device=launcher.device)
        self._tables: WeakSet[Table] = WeakSet()
        """All that plans have, to be made void when a rank is masked."""
        self._num_ranks = arena.topology.num_ranks
        self._num_local = arena.spec.num_local_experts(self._num_ranks)
        self._slot_rows = arena.spec.num_slot_rows(self._num_ranks)
        per_pick, self._num_pairs = arena.spec.layout.per_pick, min(arena.spec.num_topk, self._num_ranks)
        self._num_places = arena.spec.num_topk if per_pick else self._num_pairs
        """Rows of a token, at most."""
        self._num_segments = self._num_local if per_pick else 1
        self._known_rows = self._slot_rows if isinstance(arena.spec.layout, Padded) else None
        """What the host knows of the rows that come before it is told."""
        self._sums_pairs = arena.spec.ranks_sum_picks
        num_rows = NUM_HOST_COUNTS + _NUM_CAPTURED + 1
        self._rows = torch.zeros(num_rows, HOST_WORDS.value, dtype=torch.int64, pin_memory=True)
        self._rows[:, HOST_ROWS.value] = self._slot_rows  # where there are always as many, no kernel says so
        self._host_counts = [self._host_counts_in(i, is_captured=False) for i in range(NUM_HOST_COUNTS)]
        self._num_host_counts = 0
        self._captured: list[HostCounts] = []
        """Those that graphs write, whenever they are replayed."""
        self.overflows: list[tuple[int, CapacityError]] = []
        """See Backend."""
        self._num_fresh = 0
        self._untold: deque[tuple[int, int, HostCounts]] = deque()
        """Of dispatches whose host_counts nobody has looked at: its number among the fresh ones, sequence number,
        host_counts."""
        self._nobody = self._rows[-1]
        self._chunk_tokens = max(1, _PICKS // power_of_two(arena.spec.num_topk))
        num_chunks = -(-arena.spec.max_tokens // self._chunk_tokens)
        self._columns = _CELLS // min(power_of_two(num_chunks), 256)
        """Counts that a program sums, of as many chunks as make ``_CELLS`` with them."""
        num_counts = arena.spec.num_counts(arena.topology)
        self._rooms: dict[int, tuple[int, dict[str, Part]]] = {}
        """Of plans of dispatches as a whole, by their number of tokens."""
        self._beside: Shapes = {
            "scalars": ((SCALARS.value,), torch.int32),
            "num_tokens_per_expert": ((self._num_local,), torch.int32),
            "segment_starts": ((self._num_segments + 1,), torch.int32),
        }
        """What a plan says of the rows that come, beside its tables."""
        self._partial_sums = torch.zeros(num_chunks, num_counts, dtype=torch.int32, device=launcher.device)
        """Of the plan that is being made: for each chunk of tokens, the counts of those before it."""

    def mask(self, ranks: tuple[int, ...]) -> None:
        """Plans from now on have no rows of these ranks. Those before move no rows any more, in graphs too.

        A graph that makes its plan itself does so again when it is replayed.
        """
        self._masked = ranks
        for table in self._tables:
            table.dst_rows.fill_(-1)
            table.incoming[:2] = self._nowhere  # no rows, and no gap before them
            if table.has_src_rows:
                table.src_rows.fill_(-1)

    def count(self, topk_idx: Tensor, *, stamp: int) -> DevicePlan:
        """Counts this rank's picks, for the words that come next to tell; the plan that is filled with them.

        Until it has its places, no other is counted.
        """
        plan = self._fresh(topk_idx, stamp=stamp)
        self._count_picks(topk_idx)
        return plan

    def blank(self, num_tokens: int, *, stamp: int) -> DevicePlan:
        """The plan of a dispatch as a whole, which counts for itself and fills it, with the picks too."""
        if (divided := self._rooms.get(num_tokens)) is None:
            divided = self._rooms[num_tokens] = self._divided(num_tokens)
        num_bytes, parts = divided
        room = Room(self._ints(num_bytes // 4), parts)
        rows = Table.of(room, num_slots=self._slot_rows)
        self._tables.add(rows)
        return DevicePlan.of(
            room,
            rank=self._rank,
            buffer_id=self._buffer_id,
            stamp=stamp,
            num_tokens=num_tokens,
            num_rows=self._known_rows,
            rows=rows,
            pairs=None,
            masked=self._masked,
            host_counts=self._next_host_counts(stamp),
            is_fused=True,
        )

    def _divided(self, num_tokens: int) -> tuple[int, dict[str, Part]]:
        """The room of a plan of a dispatch as a whole: what its kernel fills, in the order of its arguments."""
        return Room.divided(
            {
                "topk_idx": ((num_tokens, self._num_places), torch.int64),
                "counts": ((self._num_ranks, self._on.counts.shape[0]), torch.int64),
                **self._beside,
                **self._of_table(num_tokens, self._num_places, self._num_segments),
            }
        )

    def place(self, plan: DevicePlan) -> None:
        """Fills in where rows go, once everybody's counts are here."""
        assert plan.host_counts is not None
        self._place(plan, plan.host_counts.row)

    def placed(self, plan: DevicePlan, sequence: int, mode: RowCount) -> None:
        """What fills the plan of a dispatch has been issued: its host_counts is on its way."""
        host_counts = plan.host_counts
        assert host_counts is not None
        if host_counts.is_captured:
            return
        host_counts.event.record(self._on.stream)
        self._num_fresh += 1
        if mode == "capacity":
            self._untold.append((self._num_fresh, sequence, host_counts))
        self._look_at_host_counts(_TOLD_AFTER)

    def remake(self, tensors: PlanTensors) -> DevicePlan:
        """The plan again, from the tensors that decide it."""
        plan = self._blank(tensors.topk_idx, tensors.counts, stamp=REMADE, host_counts=None)
        self._count_picks(tensors.topk_idx)
        self._derive_blocks(plan, plan.rows, self._nobody, is_pairs=False)
        self._place(plan, self._nobody)
        for table in (plan.rows, plan.pairs):
            if table is not None:
                self.find_src_rows(plan, table)
        return self.as_remade(plan, tensors)

    def as_remade(self, plan: DevicePlan, tensors: PlanTensors) -> DevicePlan:
        """A plan whose tables are filled, as one that was made of these tensors."""
        return replace(
            plan,
            topk_idx=tensors.topk_idx,
            counts=tensors.counts,
            stamp=REMADE,
            num_rows=tensors.src_idx.numel(),
            host_counts=None,
            is_fused=False,
            partial_rows=tensors.partial_rows if self._has_pairs else None,
            src_idx=tensors.src_idx.reshape(-1),
            local_idx=None if self._arena.spec.layout.per_pick else tensors.local_idx,
        )

    def told(self, plan: DevicePlan) -> DevicePlan:
        """The plan with what its host_counts says, which has come.

        Raises:
            CapacityError: rows did not fit; on all ranks.
        """
        host_counts = plan.host_counts
        if host_counts is None:
            return plan
        if host_counts.is_captured or host_counts.stamp == plan.stamp:
            if (error := self.overflow_of(host_counts)) is not None:
                raise error
            num_rows, num_pairs = int(host_counts.told[HOST_ROWS.value]), int(host_counts.told[HOST_PAIRS.value])
        else:  # so long ago that the host_counts is another dispatch's by now, and was looked at before it was
            num_rows, _, num_pairs = plan.scalars.tolist()

        def cut(rows: Tensor | None, num: int) -> Tensor | None:
            return None if rows is None else rows[:num]

        return replace(
            plan,
            num_rows=num_rows,
            host_counts=None,
            partial_rows=cut(plan.partial_rows, num_pairs),
            src_idx=cut(plan.src_idx, num_rows),
            local_idx=cut(plan.local_idx, num_rows),
        )

    def overflow_of(self, host_counts: HostCounts) -> CapacityError | None:
        """What a host_counts that has come says of rows that did not fit; once."""
        told = host_counts.told
        needed = int(told[HOST_NEEDED.value])
        if not needed:
            return None
        told[HOST_NEEDED.value] = 0
        worst = int(told[HOST_WORST.value])
        return overflow(self._arena.spec, self._arena.topology, worst=worst, needed=needed)

    def look_at_all_host_counts(self) -> None:
        """Notes all overflows, also of graphs that were replayed; what was issued is done."""
        self._look_at_host_counts(0)
        for host_counts in self._captured:
            if (error := self.overflow_of(host_counts)) is not None:
                self.overflows.append((0, error))

    def _look_at_host_counts(self, age: int) -> None:
        """Notes the overflows of dispatches ``age`` before the last, or earlier; all ranks look at the same ones."""
        while self._untold and self._num_fresh - self._untold[0][0] >= age:
            _, sequence, host_counts = self._untold.popleft()
            host_counts.event.synchronize()
            if (error := self.overflow_of(host_counts)) is not None:
                self.overflows.append((sequence, error))

    def _fresh(self, topk_idx: Tensor, *, stamp: int) -> DevicePlan:
        gathered = self._ints(self._num_ranks, self._on.counts.shape[0], dtype=torch.int64)
        return self._blank(topk_idx, gathered, stamp=stamp, host_counts=self._next_host_counts(stamp))

    def _place(self, plan: DevicePlan, told: Tensor) -> None:
        self._find_dst_rows(plan, plan.rows, is_pairs=False)
        if plan.pairs is not None:
            self._derive_blocks(plan, plan.pairs, told, is_pairs=True)
            self._find_dst_rows(plan, plan.pairs, is_pairs=True)

    def _count_picks(self, topk_idx: Tensor) -> None:
        """Counts picks ``[T, K]``, by chunks of tokens and all together."""
        num_counts, num_chunks = self._on.counts.shape[0], self._num_chunks(topk_idx)
        if num_chunks:
            self._on.launch(
                plan_kernels.count_picks,
                (num_chunks,),
                topk_idx,
                topk_idx.shape[0],
                self._partial_sums,
                self._on.refused,
                E=self._on.num_local * self._on.num_ranks,
                P=self._on.num_ranks,
                K=self._on.arena.spec.num_topk,
                S=self._chunk_tokens,
                given=kind_of(topk_idx),
                num_warps=4,
            )
        self._on.launch(
            plan_kernels.sum_chunks,
            (-(-num_counts // self._columns),),
            self._partial_sums,
            self._on.counts,
            num_chunks,
            W=num_counts,
            TILE=_CELLS // self._columns,
            COLUMNS=self._columns,
            num_warps=4,
        )

    def _derive_blocks(self, plan: DevicePlan, table: Table, told: Tensor, *, is_pairs: bool) -> None:
        """Where the blocks of a table begin, from everybody's counts; what the host is told goes to ``told``."""
        self._on.launch(
            plan_kernels.derive_blocks,
            (1,),
            plan.counts,
            self._on.state,
            plan.scalars,
            told,
            self._on.send_starts,
            table.incoming,
            plan.segment_starts,
            plan.num_tokens_per_expert,
            self._on.arena.spec.capacity(self._on.num_ranks),
            self._on.rank,
            P=self._on.num_ranks,
            **self._on.blocks(is_pairs=is_pairs),
            IS_PAIRS=is_pairs,
            KEEPS_COUNTS=True,
            given=kind_of(plan.counts),
            num_warps=4,
        )

    def _find_dst_rows(self, plan: DevicePlan, table: Table, *, is_pairs: bool) -> None:
        """Places and return_rows of this rank's rows."""
        spec, topk_idx = self._on.arena.spec, plan.topk_idx
        if topk_idx.shape[0]:
            self._on.launch(
                plan_kernels.find_dst_rows,
                (self._num_chunks(topk_idx),),
                topk_idx,
                topk_idx.shape[0],
                self._partial_sums,
                self._on.send_starts,
                plan.scalars,
                self._on.state,
                table.dst_rows,
                table.return_rows,
                P=self._on.num_ranks,
                L=self._on.num_local,
                K=self._on.arena.spec.num_topk,
                J=table.dst_rows.shape[1],
                S=self._chunk_tokens,
                BY_RANK=is_pairs or not spec.layout.per_pick,
                IN_ORDER_OF_RANKS=is_pairs or spec.reduce == "rank",
                given=kind_of(topk_idx),
                num_warps=4,
            )

    def find_src_rows(self, plan: DevicePlan, table: Table) -> None:
        """Works out where the rows of a table that come here are from; of fresh rows, ``unpack_metadata`` does it."""
        num_blocks, num_slots = table.incoming.shape[1], table.num_slots
        at_once = src_rows_at_once(num_blocks)
        self._on.launch(
            plan_kernels.find_src_rows,
            (-(-num_slots // at_once),),
            table.incoming,
            plan.scalars,
            table.src_rows,
            num_slots,
            NUM=(plan_kernels.NUM_PAIRS if table is plan.pairs else plan_kernels.NUM_ROWS).value,
            BLOCKS=num_blocks,
            P=self._on.num_ranks,
            ROWS=at_once,
            num_warps=4,
        )

    def _num_chunks(self, topk_idx: Tensor) -> int:
        return -(-topk_idx.shape[0] // self._chunk_tokens)

    def _blank(self, topk_idx: Tensor, counts: Tensor, *, stamp: int, host_counts: HostCounts | None) -> DevicePlan:
        """A plan whose tables are still to be filled."""
        num_tokens = topk_idx.shape[0]
        rows, pairs = self._table(num_tokens, self._num_places, self._num_segments, self._slot_rows), None
        if self._has_pairs:
            pairs = self._table(num_tokens, self._num_pairs, 1, self._num_ranks * self._arena.spec.max_tokens)
        for table in (rows, pairs):
            if table is not None:
                self._on.given(table.src_rows)
        return DevicePlan(
            rank=self._rank,
            buffer_id=self._buffer_id,
            stamp=stamp,
            topk_idx=topk_idx,
            counts=counts,
            num_rows=self._known_rows,
            rows=rows,
            pairs=pairs,
            sums_pairs=self._sums_pairs,
            masked=self._masked,
            host_counts=host_counts,
            **self._each(self._beside),
        )

    def _table(self, num_tokens: int, num_columns: int, num_segments: int, num_slots: int) -> Table:
        tables = self._each(self._of_table(num_tokens, num_columns, num_segments))
        table = Table(**tables, num_slots=num_slots)
        self._tables.add(table)
        return table

    def _each(self, shapes: Shapes) -> dict[str, Any]:
        """A tensor for each, by name."""
        return {name: self._ints(*shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}

    def _of_table(self, num_tokens: int, num_columns: int, num_segments: int) -> Shapes:
        """What a table has."""
        return {
            "dst_rows": ((num_tokens, num_columns), torch.int64),
            "return_rows": ((num_tokens, num_columns), torch.int32),
            "incoming": ((3, num_segments * self._num_ranks), torch.int32),
        }

    def _next_host_counts(self, stamp: int) -> HostCounts:
        """Room in host memory for what the host is told; a graph's is its own for good."""
        if torch.cuda.is_current_stream_capturing():
            if len(self._captured) == _NUM_CAPTURED:
                raise NotSupported(
                    f"{_NUM_CAPTURED} fresh dispatches of this buffer have been captured in graphs, and there is room "
                    f"for no more; capture dispatches on recv.plan of an earlier one, or make another Buffer"
                )
            self._captured.append(self._host_counts_in(NUM_HOST_COUNTS + len(self._captured), is_captured=True))
            return self._captured[-1]
        host_counts = self._host_counts[self._num_host_counts % NUM_HOST_COUNTS]
        self._num_host_counts += 1
        host_counts.event.synchronize()  # of the dispatch that had it before
        host_counts.told[HOST_NEEDED.value] = 0  # if that was void, nobody has looked
        host_counts.stamp = stamp
        return host_counts

    def _host_counts_in(self, row: int, *, is_captured: bool) -> HostCounts:
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return HostCounts(self._rows[row], self._rows[row].numpy(), event, is_captured=is_captured)

    def _ints(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return self._on.empty(*shape, dtype=dtype)
