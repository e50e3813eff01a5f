"""Random rounds of calls, each compared bit for bit: ``scripts/soak --rounds 100000 --ranks 4 --seed 0``.

Every rank derives the inputs of all ranks from (seed, round), and from these its own expected results. A round is a
value: it is drawn first, printed if a result is wrong, and repeated by ``--only ROUND``.

``--device cuda`` runs the same rounds on GPUs. Inputs are then also written late on the caller's stream, and
``buffer.check()`` raises the errors of calls without a host sync. ``--device interpreted`` runs them without a GPU, on
the CUDA backend in Triton's interpreter, at a few rounds per second; in some rounds programs of a rank begin late.

``--grid 2x2`` plays them over nodes that share no memory: with ``--threads`` messages between them are late at random,
else they travel through torch.distributed, or with ``--rail nixl`` through NIXL. Whoever a failure names must then be a
rank that is at fault.
"""

# Printing is what it is for.
# ruff: noqa: T201

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from crossdock import (
    Arena,
    Bf16,
    Buffer,
    CapacityError,
    Compact,
    ConfigError,
    Connection,
    Expanded,
    Fp8,
    Fp16,
    Fp32,
    Padded,
    PeerFailed,
    Plan,
    Quantized,
    Received,
    Spec,
    Topology,
    TransportError,
    run_local,
)
from crossdock.arena import PAGE, Control
from crossdock.spec import MAX_SLOTS
from tests.cases import STAGED
from tests.gpu import late
from tests.gpu.ranks import own_stream, take_all, take_share
from tests.interrupter import Interrupter
from tests.soak_batch import EXTRA_BYTES, Batch
from tests.soak_grid import Grid

MAX_TOKENS = 12
"""Of every Spec."""
LOST_COUNT = ("leave out", "repeat", "interrupt")
"""After these ranks are a call or a failure apart, and find back."""
SLOW = (*LOST_COUNT, "stay away")
"""They take some tenths of a second, or seconds."""
TROUBLES = (
    "bad dispatch",
    "bad combine",
    "abort",
    "abort in flight",
    "abort overlapped",
    "mismatch",
    "bad picks",
    "restart",
    *SLOW,
)
MEMORY_SHARE = 0.01
"""Of rounds over one connection, before which its memory grows; and of those before which it was away."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What a rank may have as its default."""
TIGHT_S = 0.2
"""How long calls wait while ranks have lost count; then they do no longer than ``RELAXED_S``."""
RELAXED_S = 10
PATIENT_S = 3
"""How long calls wait for a rank that stays away: a healthy one is never as late."""
_AHEAD = 20
"""Rounds that no rank can be ahead of another: each has calls of all."""
_NEXT = 3
"""Rounds of which a rank that is behind may hear the failures."""
REASONS = ("hidden=", "outputs go home", "had enough", "the same on all ranks", "topk_idx", "max_tokens=", "restart()")
"""What the ranks that cause trouble say."""


class Wrong(Exception):
    """A round gave something else than it means."""


def make_specs(num_ranks: int) -> list[Spec]:
    """One buffer each: every layout, wire and place to sum at, tight capacities, one to three slots.

    Over a grid all of them sum on each node first.
    """
    common: dict[str, Any] = {"num_topk": 3, "hidden": 32, "max_tokens": MAX_TOKENS, "extra_bytes": EXTRA_BYTES}
    few, many = 2 * num_ranks, 4 * num_ranks
    return [
        Spec(num_experts=few, layout=Compact(), **common),
        Spec(num_experts=many, layout=Expanded(alignment=4), wire=Fp8(block=16), **common),
        Spec(num_experts=many, layout=Padded(), wire=Fp32(), reduce="rank", **common),
        Spec(num_experts=few, layout=Compact(), wire=Fp16(), reduce="rank", num_slots=1, **common),
        Spec(num_experts=few, layout=Expanded(), reduce="rank", num_slots=3, **common | {"hidden": 64}),
        Spec(num_experts=few, layout=Expanded(capacity=30), wire=Fp32(), combine_wire=Bf16(), **common),
        Spec(
            num_experts=few,
            layout=Compact(capacity=20),
            wire=Fp8(block=8, scale="ue8m0", column_major=True),
            **common | {"num_topk": 2},
        ),
        Spec(num_experts=few, layout=Padded(capacity=14), **common | {"hidden": 16}),
        Spec(num_experts=many, layout=STAGED, wire=Fp8(block=16), **common),
        Spec(num_experts=few, layout=STAGED, reduce="rank", **common | {"hidden": 20}),
    ]


def over_nodes(spec: Spec) -> Spec:
    """The same, as it can be over a grid: rows are staged only among ranks that share memory."""
    layout = replace(spec.layout, staged=False, capacity=None) if spec.is_staged else spec.layout
    return replace(spec, reduce="node", layout=layout)


@dataclass(frozen=True, kw_only=True)
class Round:
    """What is done in a round; the batches follow from the same generator."""

    number: int
    spec: int
    trouble: str | None
    culprit: int
    is_overlapped: bool
    is_cached: bool
    rows: str | None
    max_tokens: int
    """Of the round's calls; those of a second batch have the Spec's."""
    brings_too_many: bool
    """Whether a call comes first in which some rank has more tokens than it may have."""
    has_weights: bool
    has_extras: bool
    is_weighted: bool
    is_biased: bool
    brings_home: bool
    goes_back: bool
    """Whether unquantized rows follow on the same plan, and extras go home alone, as gradients do."""
    pulls: tuple[bool, ...]
    """By rank: whether outputs are left in the arena."""
    copies: tuple[bool, ...]
    resets: tuple[bool, ...]
    """By rank: whether it calls reset() after trouble."""


def make_round(
    rng: np.random.Generator, number: int, num_specs: int, num_ranks: int, troubles: tuple[str, ...]
) -> Round:
    """Decides a round."""

    def chance(probability: float) -> bool:
        return bool(rng.random() < probability)

    slow = [trouble for trouble in troubles if trouble in SLOW]
    quick = [trouble for trouble in troubles if trouble not in SLOW]
    trouble = None
    if num_ranks > 1:
        if chance(0.15) and quick:
            trouble = str(rng.choice(quick))
        elif chance(0.005) and slow:
            trouble = str(rng.choice(slow))
    return Round(
        number=number,
        spec=int(rng.integers(num_specs)),
        trouble=trouble,
        culprit=int(rng.integers(num_ranks)),
        is_overlapped=chance(0.25) and trouble is None,
        is_cached=chance(0.2),
        rows=[None, "exact", "capacity"][rng.integers(3)],
        max_tokens=int(rng.integers(1, MAX_TOKENS + 1)) if chance(0.3) else MAX_TOKENS,
        brings_too_many=chance(0.03),
        has_weights=chance(0.5),
        has_extras=chance(0.3),
        is_weighted=chance(0.6),
        is_biased=chance(0.3),
        brings_home=chance(0.3),
        goes_back=chance(0.2),
        pulls=tuple((rng.random(num_ranks) < rng.choice([0, 0.5, 1])).tolist()),
        copies=tuple((rng.random(num_ranks) < 0.1).tolist()),
        resets=tuple((rng.random(num_ranks) < 0.3).tolist()),
    )


class Player:
    """One rank's part in rounds."""

    def __init__(self, group: Any, options: argparse.Namespace, device: torch.device) -> None:
        self._has_kernels, make_buffer = options.device != "cpu", Buffer
        self._is_interpreted = options.device == "interpreted"
        self._grid: Grid | None = options.grid
        self.specs = make_specs(options.ranks)
        if self._grid is not None:
            self.specs = [over_nodes(spec) for spec in self.specs]
        if options.device == "interpreted":
            from tests.interpreted import make_buffer  # noqa: PLC0415 - it imports Triton

            # The interpreter cuts float32 off where it makes bfloat16 of it.
            self.specs = [replace(spec, combine_wire=Fp32()) for spec in self.specs]
        if options.spec is not None:
            self.specs = [self.specs[options.spec]] * 2
        # debug=True finishes the calls in flight before it poisons a slot, so half of the buffers overlap for real.
        self.connection = _shared_connection(group, options, self.specs) if options.shared else None
        self.buffers = [
            make_buffer(group, spec, debug=i % 2 == 0, **_buffer_options(options, device, spec, i))
            if self.connection is None
            else Buffer(self.connection, spec, debug=i % 2 == 0, exclusive=_is_apart(i))
            for i, spec in enumerate(self.specs)
        ]
        self.rank, self.num_ranks, self._seed = self.buffers[0].rank, options.ranks, options.seed
        # How long kernels wait is fixed when a buffer is made.
        without = (*options.without, *(SLOW if self._has_kernels else ()))
        self._troubles = tuple(trouble for trouble in TROUBLES if trouble not in without)
        self._device, self._group = device, group
        self._has_same_sms = options.same_sms
        self._has_processes = not options.threads and options.device == "cpu"
        self._kept: dict[int, tuple[Received, Tensor]] = {}
        """By spec: rows of an earlier round, and a copy."""

    def play(self, number: int) -> None:
        """Does a round and compares; raises Wrong."""
        rng = np.random.default_rng([self._seed, number])
        self.round = make_round(rng, number, len(self.specs), self.num_ranks, self._troubles)
        self._naps = np.random.default_rng([self._seed, number, self.rank, 1])
        spec, self.buffer = self.specs[self.round.spec], self.buffers[self.round.spec]
        batch = self._batch(rng, replace(spec, max_tokens=self.round.max_tokens))
        if self.connection is not None:
            self._change_memory(self.connection, np.random.default_rng([self._seed, number, self.num_ranks]))
        if self._has_processes and self._naps.random() < 0.2:
            torch.set_default_dtype(DTYPES[self._naps.integers(len(DTYPES))])
        try:
            with self._late_programs(number):
                self._play(rng, spec, batch)
        finally:
            torch.set_default_dtype(torch.float32)
        if self._has_processes and self._naps.random() < 0.001:
            self._fork()

    def _change_memory(self, connection: Connection, rng: np.random.Generator) -> None:
        """At times, on all ranks: there is more, a little each time; or it is given back and taken again."""
        if (change := rng.random()) < MEMORY_SHARE:
            connection.check()
            connection.reserve(connection.num_bytes + PAGE)
        elif change < 2 * MEMORY_SHARE:
            connection.check()
            connection.release()
            connection.reacquire()

    def _late_programs(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """In the interpreter, in every fifth round or so, room for few of one rank's programs at a time."""
        rng = np.random.default_rng([self._seed, number, 2])
        if not self._is_interpreted or rng.random() >= 0.2 or rng.integers(self.num_ranks) != self.rank:
            return contextlib.nullcontext()
        from tests.late_programs import late_programs  # noqa: PLC0415 - beside Triton

        return late_programs(room=int(rng.integers(1, 4)), seed=number)

    def _batch(self, rng: np.random.Generator, spec: Spec) -> Batch:
        return Batch(rng, spec, self.num_ranks, None if self._grid is None else self._grid.local)

    def _play(self, rng: np.random.Generator, spec: Spec, batch: Batch) -> None:
        needs_two_slots = self.round.trouble == "abort overlapped"
        if self.round.trouble is not None and batch.routes.fits and not (needs_two_slots and spec.num_slots == 1):
            if self.round.trouble in LOST_COUNT:
                self._lose_count(batch)
            elif self.round.trouble == "stay away":
                self._stay_away(batch)
            elif self.round.trouble == "restart":
                self._restart(batch)
            else:
                self._get_into_trouble(batch)
            self._check_kept()
            if self.round.resets[self.rank]:
                self.buffer.reset()
        elif self.round.is_overlapped and spec.num_slots > 1:
            self._overlap([batch, self._batch(rng, spec)], rng)
        else:
            self._do(batch)

    def _do(self, batch: Batch) -> None:
        if self.round.brings_too_many:
            self._bring_too_many(batch)
        tokens = batch.tokens()
        if not batch.routes.fits:
            self._overflow(batch, tokens)
            return
        recv = self._dispatch(batch, tokens).wait()
        self._check_received(batch, tokens, recv)
        if self.round.is_cached:
            tokens = batch.tokens()
            self._nap()
            recv = self._dispatch(batch, tokens, recv.plan).wait()
            self._check_received(batch, tokens, recv)
        self._nap()
        out = self._combine(batch, recv).wait()
        self._check_combined(batch, out)
        if self.round.goes_back:
            recv = self._go_back(batch, recv)
        if self._naps.random() < 0.5:
            self._surface()
        self._kept[self.round.spec] = (recv, _bits(_data(recv.x)).clone())

    def _go_back(self, batch: Batch, recv: Received) -> Received:
        wide = batch.tokens(unquantized=True)
        self._nap()
        gradients = self._dispatch(batch, wide, recv.plan, unquantized=True).wait()
        self._check_received(batch, wide, gradients, unquantized=True)
        self._nap()
        (given,) = self._bring(self._home(batch))
        (home,) = self.buffer.return_extras(recv.plan, [_filled(given, recv)])
        _same("extras that came home alone", home, batch.came_home(self.rank))
        return gradients

    def _overflow(self, batch: Batch, tokens: Tensor) -> None:
        with _expect(CapacityError, "capacity is"):
            recv = self._dispatch(batch, tokens).wait()
            if int(recv.num_tokens_per_expert.sum()):
                raise Wrong(f"an overflow gave {recv.num_tokens_per_expert}")
            self.buffer.check()

    def _bring_too_many(self, batch: Batch) -> None:
        most = int(batch.num_tokens.max()) - 1
        if most < 1:
            return
        if self._grid is not None:  # whoever has too many gives up
            if batch.num_tokens[self.rank] > most:
                with _expect(CapacityError, f"more than max_tokens={most}"):
                    self._dispatch(batch, batch.tokens(), max_tokens=most)
            else:
                self._hear_of_it(batch, batch.tokens(), max_tokens=most)
            return
        with _expect(CapacityError, f"more than max_tokens={most}"):
            recv = self._dispatch(batch, batch.tokens(), max_tokens=most).wait()
            if int(recv.num_tokens_per_expert.sum()):
                raise Wrong(f"a call with too many tokens gave {recv.num_tokens_per_expert}")
            self.buffer.check()

    def _overlap(self, batches: list[Batch], rng: np.random.Generator) -> None:
        other = int(rng.integers(len(self.specs)))
        tokens = [batch.tokens() for batch in batches]
        dispatches = []
        for batch, x in zip(batches, tokens, strict=True):
            dispatches.append(self._dispatch(batch, x, rows="exact"))
            self._nap()
        if _is_apart(other) != _is_apart(self.round.spec):
            self._beside(other, rng)
        came = []
        for batch, x, pending in zip(batches, tokens, dispatches, strict=True):
            if batch.routes.fits:
                came.append((batch, pending.wait()))
                self._check_received(batch, x, came[-1][1])
            else:
                with _expect(CapacityError, "capacity is"):
                    pending.wait()
        combines = []
        for batch, recv in came:
            combines.append((batch, self._combine(batch, recv)))
            self._nap()
        if other != self.round.spec:
            self._beside(other, rng)
        for batch, pending in combines[:: 1 - 2 * (self.round.number % 2)]:
            self._check_combined(batch, pending.wait())

    def _beside(self, spec: int, rng: np.random.Generator) -> None:
        """Calls of another Spec over the same connection while some of this one's are in flight."""
        if self.connection is None:
            return
        batch, own = self._batch(rng, self.specs[spec]), self.buffer
        if batch.routes.fits:
            self.buffer = self.buffers[spec]
            recv = self._dispatch(batch, tokens := batch.tokens()).wait()
            self._check_received(batch, tokens, recv)
            self._check_combined(batch, self._combine(batch, recv).wait())
            self.buffer = own

    def _lose_count(self, batch: Batch) -> None:
        """One rank makes another number of calls than the others, and all find back, step by step."""
        queue, patience = self.buffer._queue, self.buffer._queue._timeout_s
        queue._timeout_s = TIGHT_S
        steps = [batch.tokens() for _ in range(7)]
        self._meet()
        if self.rank != self.round.culprit:
            self._attempt(batch, steps[0])
        elif self.round.trouble == "repeat":
            for _ in range(2):
                self._attempt(batch, steps[0])
        elif self.round.trouble == "interrupt":
            again = int(self._naps.choice([0, 3, 20]))
            with contextlib.suppress(KeyboardInterrupt), Interrupter(int(self._naps.integers(1, 400)), again):
                self._attempt(batch, steps[0])
        self._meet()
        for tokens in steps[1:]:
            is_right = self._meet(self._attempt(batch, tokens))
            if all(is_right):
                break
            queue._timeout_s = RELAXED_S
        else:
            raise Wrong(f"ranks have not found back: {is_right}")
        queue._timeout_s = patience

    def _stay_away(self, batch: Batch) -> None:
        """One rank begins nothing until all others have missed it: they name it, and no other."""
        queue, patience = self.buffer._queue, self.buffer._queue._timeout_s
        tokens, error = batch.tokens(), None
        queue._timeout_s = PATIENT_S
        self._meet()
        if self.rank != self.round.culprit:
            try:
                self._dispatch(batch, tokens).wait()
            except TransportError as raised:
                error = raised
            if error is None or getattr(error, "rank", None) != self.round.culprit:
                raise Wrong(f"rank {self.round.culprit} has stayed away, and this was raised: {error!r}")
        self._meet()
        queue._timeout_s = patience
        self.buffer.restart()

    def _restart(self, batch: Batch) -> None:
        """One rank begins again, in a call or without one; the others are told, and come to it."""
        tokens = batch.tokens()
        if self.rank != self.round.culprit:
            self._hear_of_it(batch, tokens)
        elif self._naps.random() < 0.5:
            self._dispatch(batch, tokens)
        self.buffer.restart()

    def _hear_of_it(self, batch: Batch, tokens: Tensor, *, max_tokens: int | None = None) -> None:
        """Calls, of which one fails because another rank has given up."""
        with self._blaming():
            recv = self._dispatch(batch, tokens, max_tokens=max_tokens).wait()
            self._combine(batch, recv).wait()
            self._surface()
            self._go_on(batch, tokens)

    def _go_on(self, batch: Batch, tokens: Tensor) -> None:
        """More calls: over a grid, those of a rank that is two steps away do until it hears of a failure."""
        for _ in range(4 if self._grid is not None else 0):
            self._dispatch(batch, tokens).wait()

    @contextlib.contextmanager
    def _blaming(self) -> Iterator[None]:
        """A call in it fails because of a peer, which is one that is at fault."""
        with _expect(PeerFailed):
            try:
                yield
            except PeerFailed as error:
                if error.rank not in self._at_fault():
                    raise Wrong(f"rank {error.rank} is healthy, and was blamed: {error}") from error
                raise

    def _at_fault(self) -> set[int]:
        """The ranks that give up in this round or, for a rank that is behind, in one of the next."""
        ranks: set[int] = set()
        for number in range(self.round.number, self.round.number + _NEXT):
            rng = np.random.default_rng([self._seed, number])
            other = make_round(rng, number, len(self.specs), self.num_ranks, self._troubles)
            is_everybody = other.trouble in (*SLOW, "restart", "mismatch") or other.brings_too_many
            ranks |= set(range(self.num_ranks)) if is_everybody else {other.culprit}
        return ranks

    def _attempt(self, batch: Batch, tokens: Tensor) -> bool:
        """Whether a dispatch and its combine gave what they mean; False: a peer was missed, or gave up."""
        try:
            recv = self._dispatch(batch, tokens).wait()
            self._check_received(batch, tokens, recv)
            self._check_combined(batch, self._combine(batch, recv).wait())
        except TransportError:
            return False
        return True

    def _meet(self, value: Any = None) -> list[Any]:
        """All ranks have come here, not through a buffer; what they have brought."""
        if self._group is not None:
            return self._group.all_gather(value)
        values = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def _fork(self) -> None:
        """A child, which has no part in the buffers, and ends."""
        child = os.fork()
        if not child:
            try:
                self.buffer.check()
            except ConfigError as error:
                for buffer in self.buffers:
                    buffer.__exit__(SystemExit, SystemExit(), None)
                os._exit(0 if "forked" in str(error) else 2)
            os._exit(1)
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise Wrong(f"a forked child ended with {code}")

    def _get_into_trouble(self, batch: Batch) -> None:
        tokens, trouble = batch.tokens(), self.round.trouble
        is_culprit = self.rank == self.round.culprit
        if trouble == "mismatch":
            with self._blaming():
                self._dispatch(batch, tokens, rows="capacity" if is_culprit else "exact").wait()
                self._surface()
        elif trouble in ("bad dispatch", "bad picks") and is_culprit:
            self._dispatch_badly(batch, tokens)
        elif trouble == "abort in flight" and is_culprit:
            self._dispatch(batch, tokens)
            self._nap()
            self.buffer.abort("had enough")
        elif trouble == "abort overlapped":
            pending = [self._dispatch(batch, tokens, rows="exact")]
            self._nap()
            if is_culprit:
                self.buffer.abort("had enough")
                return
            with self._blaming():
                if self.buffer.spec.num_slots > 1:
                    pending.append(self._dispatch(batch, tokens, rows="exact"))
                for call in pending:
                    call.wait()
                self._surface()
                self._go_on(batch, tokens)
        elif trouble in ("bad dispatch", "bad picks", "abort in flight"):
            self._hear_of_it(batch, tokens)
        else:
            recv = self._dispatch(batch, tokens).wait()
            self._check_received(batch, tokens, recv)
            self._nap()
            if not is_culprit:
                with self._blaming():
                    self._combine(batch, recv).wait()
                    self._surface()
                    self._go_on(batch, tokens)
            elif trouble == "abort":
                self.buffer.abort("had enough")
            else:
                with _expect(ConfigError, "outputs go home"):
                    self.buffer.combine(*self._bring(torch.zeros(1, dtype=torch.float64)), recv.plan)
            self._check_if_there(batch, tokens, recv)

    def _dispatch_badly(self, batch: Batch, tokens: Tensor) -> None:
        if self.round.trouble == "bad dispatch":
            with _expect(ConfigError, "hidden="):
                self.buffer.dispatch(*self._bring(torch.zeros(1, 3), torch.zeros(1, 1, dtype=torch.int64)))
        else:
            with _expect(ConfigError, "topk_idx"):
                self._dispatch(batch, tokens, topk=self._bad_picks(batch)).wait()
                self._surface()

    def _bad_picks(self, batch: Batch) -> np.ndarray:
        """[T, K] with one expert that there is not, or twice; at least one token."""
        topk = batch.topk[self.rank, : max(1, batch.num_tokens[self.rank])].copy()
        row = topk[self.round.number % len(topk)]
        row[-1] = [batch.spec.num_experts, -2, row[0]][self.round.number % 3]
        if row[-1] == -1:
            row[:] = 0
        return topk

    def _dispatch(
        self,
        batch: Batch,
        tokens: Tensor,
        plan: Plan | None = None,
        *,
        rows: str | None = None,
        max_tokens: int | None = None,
        unquantized: bool = False,
        topk: np.ndarray | None = None,
    ) -> Any:
        self._nap()
        if topk is None:
            topk = batch.topk[self.rank, : batch.num_tokens[self.rank]]
        n = len(topk)
        inputs = self._bring(
            tokens[self.rank, :n],
            torch.from_numpy(topk),
            batch.weights[self.rank, :n] if self.round.has_weights else None,
            batch.extras[self.rank, :n] if self.round.has_extras else None,
        )
        x, topk_idx, weights, extras = inputs
        pending = self.buffer.dispatch_start(
            x,
            topk_idx if plan is None else plan,
            weights=weights,
            extras=() if extras is None else (extras,),
            rows=rows or self.round.rows,
            max_tokens=max_tokens or batch.spec.max_tokens,
            unquantized=unquantized,
            copy=self.round.copies[self.rank],
            **self._launch(),
        )
        return self._started(pending, inputs)

    def _combine(self, batch: Batch, recv: Received) -> Any:
        rank, spec = self.rank, batch.spec
        num_rows = len(batch.routes.sources[rank])
        y = batch.y[rank, :num_rows]
        if isinstance(spec.layout, Padded):
            y = y.view(spec.num_local_experts(self.num_ranks), -1, spec.hidden)
        weights = None
        if self.round.is_weighted:
            n = int(batch.num_tokens[rank])
            by_row = batch.row_weights[rank, :num_rows].view(y.shape[:-1])
            weights = batch.weights[rank, :n] if spec.reduce == "token" else by_row
        bias = batch.bias[rank, : batch.num_tokens[rank]] if self.round.is_biased else None
        inputs = self._bring(y, weights, bias, self._home(batch) if self.round.brings_home else None)
        y, weights, bias, home = inputs
        y, home = _filled(y, recv), None if home is None else _filled(home, recv)
        if weights is not None and spec.reduce != "token":
            weights = _filled(weights, recv)
        if self.round.pulls[rank]:
            outputs = recv.output_rows()
            outputs = outputs if isinstance(spec.layout, Padded) else outputs[: y.shape[0]]
            y = outputs.copy_(y)
        more = self._launch() if home is None else {"extras": [home], **self._launch()}
        return self._started(self.buffer.combine_start(y, recv.plan, weights=weights, bias=bias, **more), inputs)

    def _home(self, batch: Batch) -> Tensor:
        home = batch.home[self.rank, : len(batch.routes.sources[self.rank])]
        is_padded = isinstance(batch.spec.layout, Padded)
        return home.view(batch.spec.num_local_experts(self.num_ranks), -1, 2) if is_padded else home

    def _check_received(self, batch: Batch, tokens: Tensor, recv: Received, *, unquantized: bool = False) -> None:
        want = batch.received(self.rank, tokens, unquantized=unquantized)
        lead, num_rows = recv.src_idx.dim(), len(want["src_idx"])
        got = {"src_idx": recv.src_idx, "counts": recv.num_tokens_per_expert, "data": _data(recv.x)}
        if isinstance(recv.x, Quantized):
            got["scale"] = recv.x.scale
        if recv.topk_idx is not None:
            got["topk_idx"] = recv.topk_idx
        if self.round.has_weights:
            got["weights"] = recv.weights
        if self.round.has_extras:
            got["extras"] = recv.extras[0]
        for name, tensor in got.items():
            mine, theirs = tensor, want[name]
            if name != "counts":
                mine = tensor.cpu().reshape(-1, *tensor.shape[lead:])[:num_rows]
            if name in ("data", "scale") and isinstance(batch.spec.layout, Padded):
                is_row = want["src_idx"] >= 0
                mine, theirs = mine[is_row], theirs[is_row]
            _same(f"received {name}", mine, theirs)

    def _check_if_there(self, batch: Batch, tokens: Tensor, recv: Received) -> None:
        """Calls on the way to a failure may have taken its slot."""
        if not recv.is_stale:
            self._check_received(batch, tokens, recv)

    def _check_combined(self, batch: Batch, result: Any) -> None:
        out, home = (result[0], result[1][0]) if self.round.brings_home else (result, None)
        want = batch.combined(self.rank, weighted=self.round.is_weighted, biased=self.round.is_biased)
        _same("sums", out, want)
        if home is not None:
            _same("extras that came home", home, batch.came_home(self.rank))

    def _check_kept(self) -> None:
        recv, bits = self._kept.get(self.round.spec, (None, None))
        if recv is not None and not recv.is_stale and not torch.equal(_bits(_data(recv.x)), bits):
            raise Wrong("rows of an earlier round were lost in a failure")

    def _nap(self) -> None:
        """Other ranks get ahead, sometimes."""
        if self._naps.random() < 0.05:
            time.sleep(self._naps.exponential(0.002))
        if self._device.type == "cuda" and self._naps.random() < 0.1:
            late.sleep(self._naps)

    def _bring(self, *tensors: Tensor | None) -> list[Any]:
        """Inputs, on the buffers' device."""
        if self._device.type == "cuda":
            return late.bring(tensors, self._device, self._naps)
        return [tensor.clone() if self._has_kernels and tensor is not None else tensor for tensor in tensors]

    def _started(self, pending: Any, inputs: list[Tensor | None]) -> Any:
        return late.Call(pending, inputs) if self._has_kernels else pending

    def _launch(self) -> dict[str, Any]:
        """What a call may say of its kernels; ranks need not agree."""
        if not self._has_kernels or self._has_same_sms:
            return {}
        return {"num_sms": [None, None, 1, 2][self._naps.integers(4)]}

    def _surface(self) -> None:
        """On CUDA the failure of a call without a host sync shows in the next one or here; on CPU, in ``wait()``."""
        if self._has_kernels:
            self.buffer.check()


def _buffer_options(options: argparse.Namespace, device: torch.device, spec: Spec, number: int) -> dict[str, Any]:
    """How the buffer of that number is made."""
    timeout = {"timeout_s": 2 * options.watchdog}
    if options.grid is not None:
        return timeout | options.grid.options(options.rail)
    if options.device == "cpu":
        return timeout
    may_expand = (
        spec.layout.per_pick and not spec.is_staged and spec.row_bytes() <= spec.hidden * spec.combine_dtype.itemsize
    )
    expand = (options.expand or ("sender", "receiver")[number % 2]) if may_expand else None
    engine = options.mover if not spec.layout.per_pick else "kernel"
    fused = {"is_fused": not options.several_kernels} if options.device == "interpreted" else {}
    return timeout | fused | {"device": device, "num_sms": options.num_sms, "expand": expand, "mover": engine}


def _is_apart(number: int) -> bool:
    """Whether the buffer of that number shares no bytes, where all lie over one connection."""
    return number % 3 == 2


def _shared_connection(group: Any, options: argparse.Namespace, specs: list[Spec]) -> Connection:
    """A connection with room for all buffers; at first for half, so that it grows."""
    topology, over_rail = Topology(num_ranks=options.ranks), {}
    if options.grid is not None:
        over_rail = options.grid.options(options.rail)
        topology = over_rail["topology"]
    control = Control(topology=topology, max_experts=512, max_in_flight=MAX_SLOTS, over_rail=bool(over_rail))
    sizes = [Arena(spec, topology, control).num_body_bytes + 2 * PAGE for spec in specs]
    num_bytes = max(sizes) + sum(size for i, size in enumerate(sizes) if _is_apart(i))
    if options.device == "interpreted":
        from tests.interpreted import make_connection  # noqa: PLC0415 - it imports Triton

        connection = make_connection(group, num_bytes // 2, timeout_s=2 * options.watchdog)
    else:
        connection = Connection(group, num_bytes // 2, timeout_s=2 * options.watchdog, **over_rail)
    connection.reserve(num_bytes)
    return connection


@contextlib.contextmanager
def _expect(kind: type[Exception], *texts: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        # A rank that is behind may read what a peer has given up for since: any reason, but a reason.
        if not any(text in str(error) for text in texts or REASONS):
            raise Wrong(f"expected one of {texts or REASONS} in {error!r}") from error
    else:
        raise Wrong(f"expected {kind.__name__}")


def _filled(rows: Tensor, recv: Received) -> Tensor:
    """Rows up to the end of the slot, where the host does not know how many came; nobody looks at those behind."""
    missing = recv.src_idx.shape[0] - rows.shape[0] if recv.num_rows is None else 0
    return torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), float("nan"))]) if missing else rows


def _data(rows: Tensor | Quantized) -> Tensor:
    return rows.data if isinstance(rows, Quantized) else rows


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _same(what: str, got: Tensor, want: Tensor) -> None:
    got = got.cpu()
    if got.shape != want.shape or got.dtype != want.dtype or (got.numel() and not torch.equal(_bits(got), _bits(want))):
        raise Wrong(f"{what}: got {got.dtype} {list(got.shape)}\n{got}\nwant {want.dtype} {list(want.shape)}\n{want}")


def play_rounds(group: Any, options: argparse.Namespace, at: Any, device: torch.device) -> None:
    """One rank's part in all rounds; ``at[rank]`` says in which round it is, ``at[-1]`` which is the first no more."""
    torch.set_num_threads(1)
    player = Player(group, options, device)
    first, last = options.first, options.first + options.rounds
    if options.only is not None:
        first, last = options.only, options.only + 1
    began = armed = told = time.monotonic()
    faulthandler.dump_traceback_later(options.watchdog, exit=True)
    for number in range(first, last):
        if number >= at[-1]:
            break
        at[player.rank] = number
        try:
            player.play(number)
        except BaseException as error:
            print(
                f"\nrank {player.rank}, seed {options.seed}, {player.round}\n{type(error).__name__}: {error}",
                flush=True,
            )
            raise
        now = time.monotonic()
        if player.rank == 0 and now - began > options.seconds:
            at[-1] = min(at[-1], number + _AHEAD)
        if now - armed > options.watchdog / 6:
            armed = now
            faulthandler.dump_traceback_later(options.watchdog, exit=True)
        if player.rank == 0 and now - told > options.every:
            told = now
            print(f"{number + 1} rounds, {(number + 1 - first) / (now - began):.0f}/s", flush=True)
    faulthandler.cancel_dump_traceback_later()
    for buffer in player.buffers:
        buffer.close()
    if player.connection is not None:
        player.connection.close()


def _process(rank: int, options: argparse.Namespace, store: str, at: Any, num_devices: int) -> None:
    device = take_share(rank, options.ranks, num_devices) if num_devices else torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.ranks)
    play_rounds(None, options, at, device)
    dist.destroy_process_group()


def _in_threads(options: argparse.Namespace) -> int:
    at = [0] * options.ranks + [sys.maxsize]
    device = take_all() if options.device == "cuda" else torch.device("cpu")

    def play(group: Any) -> None:
        with own_stream(device) if device.type == "cuda" else contextlib.nullcontext():
            play_rounds(group, options, at, device)

    run_local(play, options.ranks)
    return at[0] + 1 - options.first


def _in_processes(options: argparse.Namespace) -> int:
    """How many rounds were played; 0 when any went wrong."""
    context = multiprocessing.get_context("spawn")
    at = context.Array("q", [0] * options.ranks + [sys.maxsize], lock=False)
    num_devices = torch.cuda.device_count() if options.device == "cuda" else 0
    with tempfile.TemporaryDirectory(prefix="crossdock-soak-") as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=_process, args=(r, options, store, at, num_devices)) for r in range(options.ranks)
        ]
        # Triton looks when it is imported, which torch may do.
        with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"} if options.device == "interpreted" else {}):
            for process in ranks:
                process.start()
        failed_at = None
        while any(process.is_alive() for process in ranks):
            for process in ranks:
                process.join(0.1)
            if failed_at is None and any(process.exitcode for process in ranks):
                failed_at = time.monotonic()
            # The watchdogs of the others go off soon after the first, and tell where each is.
            if failed_at is not None and time.monotonic() - failed_at > options.grace:
                for process in ranks:
                    process.kill()
        codes = [process.exitcode for process in ranks]
    if any(codes):
        print(f"ranks were in rounds {list(at)[:-1]}; exit codes {codes}", flush=True)
        return 0
    return at[0] + 1 - options.first


def main(arguments: list[str] | None = None) -> int:
    """Plays rounds, and ends with one line that says how it went."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="play no longer, however many rounds are left")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--grid", type=Grid.of, metavar="NxU", help="over N nodes of U ranks, instead of --ranks")
    parser.add_argument("--rail", choices=["dist", "nixl"], default="dist", help="between nodes that are processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", action="store_true", help="ranks are threads of one process")
    parser.add_argument("--device", choices=["cpu", "cuda", "interpreted"], default="cpu")
    parser.add_argument("--shared", action="store_true", help="all Specs over one connection, some of them apart")
    parser.add_argument("--spec", type=int, choices=range(10), help="play this one of the Specs alone")
    parser.add_argument("--num-sms", type=int, help="on CUDA, of every buffer; calls choose others at times")
    parser.add_argument("--same-sms", action="store_true", help="on CUDA: calls choose no others; less to compile")
    parser.add_argument("--expand", choices=["sender", "receiver"], help="on CUDA; else every other buffer has either")
    parser.add_argument("--several-kernels", action="store_true", help="interpreted: as calls of more tokens")
    parser.add_argument("--mover", choices=["kernel", "copy"], default="kernel", help="on CUDA")
    parser.add_argument("--only", type=int, help="play this round alone")
    parser.add_argument("--first", type=int, default=0, help="the first round, to see what led to a later one")
    parser.add_argument("--without", choices=TROUBLES, action="append", default=[], help="leave a kind of trouble out")
    parser.add_argument("--every", type=float, default=10, help="seconds between lines")
    parser.add_argument("--watchdog", type=float, default=60, help="seconds after which a rank that is stuck says so")
    parser.add_argument("--grace", type=float, default=15, help="seconds that others get when a rank has failed")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.device_count():
        parser.error("--device cuda: this machine has no CUDA device that torch could use")
    if options.device == "interpreted" and options.threads:
        parser.error("--device interpreted: Triton's interpreter is not made for threads; leave --threads out")
    if options.grid is not None and options.device != "cpu":
        parser.error("--grid: ranks of several nodes move rows on CPUs; leave --device out")
    if options.grid is not None:
        options.ranks = options.grid.num_ranks
        options.rail = "inproc" if options.threads else options.rail
    configuration = f"{options.ranks} {'threads' if options.threads else 'processes'}, seed {options.seed}"
    if options.grid is not None:
        configuration += f", grid {options.grid}, rail {options.rail}"
    if options.device != "cpu":
        configuration += f", {options.device}"
    if options.spec is not None:
        configuration += f", spec {options.spec}"
    if options.without:
        configuration += f", without {', '.join(options.without)}"
    began = time.monotonic()
    num_rounds = _in_threads(options) if options.threads else _in_processes(options)
    if not num_rounds:
        print(f"FAILED ({configuration}, torch {torch.__version__})", flush=True)
        return 1
    rate = num_rounds / (time.monotonic() - began)
    print(f"{num_rounds} rounds, 0 wrong, 0 stuck ({configuration}, {rate:.0f} rounds/s, torch {torch.__version__})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
