"""Launches of the two ends of a call: words to all and from all."""

from __future__ import annotations

from torch import Tensor

from crossdock.backends.cuda.kernels import calls
from crossdock.backends.cuda.kernels import plan as plan_kernels
from crossdock.backends.cuda.launch import Launcher
from crossdock.backends.cuda.plan import DevicePlan


class WordKernels:
    """The one-program kernels that give and await words, on a launcher's stream."""

    def __init__(self, launcher: Launcher) -> None:
        self._on = launcher

    def begin_call(self, payload: int, plan: DevicePlan | None) -> None:
        """Words to all and from all; of a fresh dispatch with counts, and its plan's blocks of rows from them."""
        self._on.next_call()
        words = (
            self._on.segments,
            self._on.state,
            self._on.call,
            self._on.failure,
            self._on.host_failure,
            payload,
            self._on.refused,
            self._on.counts,
        )
        arena, is_small = self._on.arena, (payload < 2**31,)
        offsets_of_words = (arena["words"].offset, arena["aborts"].offset, arena["counts"].offset)
        if plan is None:
            args = (*words, self._on.counts, self._on.rank, self._on.max_polls, *offsets_of_words)
            self._on.launch(
                calls.begin_call,
                (1,),
                *args,
                P=self._on.num_ranks,
                RING=arena.ring,
                W=0,
                AT_ONCE=1,
                num_warps=1,
                given=is_small,
            )
            return
        assert plan.host_counts is not None
        self._on.launch(
            plan_kernels.begin_dispatch,
            (1,),
            *words,
            plan.counts,
            self._on.rank,
            self._on.max_polls,
            *offsets_of_words,
            plan.scalars,
            plan.host_counts.row,
            self._on.send_starts,
            plan.rows.incoming,
            plan.segment_starts,
            plan.num_tokens_per_expert,
            arena.spec.capacity(self._on.num_ranks),
            P=self._on.num_ranks,
            RING=arena.ring,
            **self._on.blocks(is_pairs=False),
            given=is_small,
            num_warps=4,
        )

    def finish_call(self, *, posts: bool, awaits_all: bool, tokens: Tensor | None = None) -> None:
        """Rows are in place: to all, and from all (or from those that push). Counts ``tokens [L]``."""
        self._on.launch(
            calls.finish_call,
            (1,),
            self._on.segments,
            self._on.state,
            self._on.call,
            self._on.failure,
            self._on.host_failure,
            self._on.rank,
            self._on.max_polls,
            self._on.arena["arrived"].offset,
            self._on.arena["aborts"].offset,
            self._on.tokens if tokens is None else tokens,
            self._on.tokens,
            P=self._on.num_ranks,
            RING=self._on.arena.ring,
            POSTS=posts,
            AWAITS_ALL=awaits_all,
            L=0 if tokens is None else tokens.shape[0],
            num_warps=1,
        )

    def exchange_words(self, payload: int, num_trips: int) -> None:
        """Calls of nothing but words."""
        self._on.next_call()
        self._on.launch(
            calls.exchange_words,
            (1,),
            self._on.segments,
            self._on.state,
            self._on.call,
            self._on.failure,
            self._on.host_failure,
            payload,
            self._on.rank,
            self._on.max_polls,
            self._on.arena["words"].offset,
            self._on.arena["aborts"].offset,
            num_trips,
            P=self._on.num_ranks,
            RING=self._on.arena.ring,
            given=(payload < 2**31,),
            num_warps=1,
        )

    def check_call(self) -> None:
        """Ends the call where a peer has given it up."""
        self._on.launch(
            calls.check_call,
            (1,),
            self._on.segments,
            self._on.state,
            self._on.call,
            self._on.failure,
            self._on.host_failure,
            self._on.rank,
            self._on.arena["aborts"].offset,
            P=self._on.num_ranks,
            num_warps=1,
        )
