"""Launches around a call whose caller brought tensors to count in; other calls have none of them."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.backends.base import Counters
from crossdock.backends.cuda.kernels import counters as kernels
from crossdock.backends.cuda.launch import NUM_KINDS, Launch, Launcher, kind_of
from crossdock.kinds import Kinds


class CounterKernels:
    """Kernels of one program, in stream order with those of the call."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._on = launcher.state
        self._note = launcher.bind(kernels.note_waits, 1, self._on.own, num_warps=1)
        self._adds: Kinds[Launch] = Kinds(NUM_KINDS)

    def begin(self, stream: int) -> Tensor:
        """Before the call's first kernel; gives what ``end`` takes."""
        seen = self._on.empty(self._on.num_ranks, dtype=torch.int64)
        self._note(0, stream, seen)
        return seen

    def end(self, counters: Counters, seen: Tensor, plan: Tensor, stream: int) -> None:
        """Behind its last.

        Args:
            plan: memory of the call's plan.
        """
        tokens, waits = counters
        key = kind_of(tokens), kind_of(waits)
        launch = self._adds.get(key)
        if launch is None:
            made = self._launcher.bind(
                kernels.add_counters,
                1,
                self._on.own,
                HAS_TOKENS=tokens is not None,
                HAS_WAITS=waits is not None,
                num_warps=1,
            )
            launch = self._adds.keep(key, made)
        launch(0, stream, plan, seen if tokens is None else tokens, seen if waits is None else waits, seen)
