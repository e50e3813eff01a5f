"""Random rounds over grids whose messages are late: calls that start early, overflow, and are given up."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from crossdock import (
    Bf16,
    Buffer,
    CapacityError,
    Compact,
    Expanded,
    Fp8,
    Padded,
    PeerFailed,
    Spec,
    Topology,
    run_local,
)
from crossdock.transport.rail import Box
from crossdock.transport.rails.inproc import InprocEngine
from tests import oracle
from tests.cases import EXTRA_BYTES, make_case, observed, raw_rows, same_bits

NUM_STEPS = 60
ABORT_EVERY = 7
"""Never in two steps behind each other: right behind a failure to give up says nothing new."""
LAYOUTS = [Compact(), Expanded(alignment=4), Padded(), Expanded(capacity=30), Padded(capacity=6)]


class Rounds:
    """What all ranks do, step by step, and what must come of it."""

    def __init__(self, layout, grid, seed):
        rng = random.Random(seed)
        self.nodes, self.local = grid
        self.seed, num_ranks = seed, self.nodes * self.local
        self.spec = Spec(
            num_experts=2 * num_ranks,
            num_topk=2,
            hidden=24,
            max_tokens=6,
            layout=layout,
            wire=rng.choice([Bf16(), Fp8(block=8)]),
            reduce="node",
            num_slots=rng.choice([1, 2, 3]),
            extra_bytes=EXTRA_BYTES,
        )
        late = rng.choice([0.0005, 0.003])
        box = Box(chunk_bytes=1024, num_chunks=rng.choice([2, 3, 8]))
        self.engine = InprocEngine(lambda: random.random() * late, box=box)
        roomy = replace(self.spec, layout=replace(layout, capacity=None))
        self.cases = []
        for _ in range(5):
            sizes = [rng.randrange(7) for _ in range(num_ranks)]
            case = make_case(roomy, sizes, picks=rng.choice(["some", "some", "none", "one"]), seed=rng.randrange(10**6))
            self.cases.append(replace(case, spec=self.spec))
        self.fits = [self._fits(case, roomy) for case in self.cases]
        self.wants = [
            oracle.received(self.spec, case.topk, case.x, case.weights, case.extras) if fits else None
            for case, fits in zip(self.cases, self.fits, strict=True)
        ]
        self.sums = [
            oracle.combined(roomy, case.topk, case.flat_y(), node_size=self.local)
            if fits and layout.capacity is None
            else None
            for case, fits in zip(self.cases, self.fits, strict=True)
        ]

    def _fits(self, case, roomy):
        if case.spec.layout.capacity is None:
            return True
        room, num_ranks = case.spec.capacity(len(case.topk)), len(case.topk)
        if isinstance(case.spec.layout, Padded):
            picks = torch.cat([idx.flatten() for idx in case.topk])
            return max(int((picks == e).sum()) for e in range(case.spec.num_experts)) <= room
        return max(len(rows) for rows in oracle.rows_of(roomy, case.topk)[:num_ranks]) <= room

    def run(self, group):
        """Makes the steps on one rank; gives how many calls brought rows, overflowed and were given up."""
        counts = {"rows": 0, "overflows": 0, "failures": 0}
        topology = Topology.grid(nodes=self.nodes, local=self.local)
        with Buffer(group, self.spec, topology=topology, rail=self.engine, timeout_s=30) as buffer:
            for step in range(NUM_STEPS):
                rng = random.Random(1000 * self.seed + step)
                if step % ABORT_EVERY == ABORT_EVERY - 1:
                    self._give_up(buffer, victim=rng.randrange(group.size))
                    counts["failures"] += 1
                else:
                    came = self._call(buffer, i=rng.randrange(5), how=rng.choice(["plain", "cached", "started"]))
                    counts["rows" if came else "overflows"] += 1
        return counts

    def _give_up(self, buffer, *, victim):
        if buffer.rank == victim:
            buffer.abort("it had enough")
            return
        with pytest.raises(PeerFailed, match="it had enough") as caught:
            self._go_on(buffer)
        assert caught.value.rank == victim

    def _go_on(self, buffer):
        """Until a call fails: a rank that is no peer of the victim may do some before it hears of it."""
        x = torch.zeros(0, 24, dtype=self.spec.combine_dtype)
        while True:
            buffer.dispatch(x, torch.zeros(0, 2, dtype=torch.int64))

    def _call(self, buffer, *, i, how):
        case, r = self.cases[i], buffer.rank
        given = {"weights": case.weights[r], "extras": case.extras[r], "rows": "exact"}
        try:
            if how == "started":
                started = [
                    buffer.dispatch_start(case.x[r], case.topk[r], **given) for _ in range(min(2, self.spec.num_slots))
                ]
                recv = None
                for pending in started:
                    recv = pending.wait()
            else:
                recv = buffer.dispatch(case.x[r], case.topk[r], **given)
            if how == "cached":
                recv = buffer.dispatch(case.x[r], recv.plan, **given)
        except CapacityError:
            assert not self.fits[i]
            if how == "started" and self.spec.num_slots > 1:
                with pytest.raises(CapacityError):
                    started[1].wait()
            return False
        assert self.fits[i]
        self._check(observed(recv), self.wants[i][r])
        if self.sums[i] is not None:
            assert same_bits(buffer.combine(case.y[r], recv.plan), self.sums[i][r])
        return True

    def _check(self, got, want):
        num_rows, is_real = want["src_idx"].shape[0], want["src_idx"] >= 0
        assert torch.equal(got["src_idx"][:num_rows], want["src_idx"])
        assert torch.equal(raw_rows(got["data"][:num_rows])[is_real], raw_rows(want["data"])[is_real])
        assert same_bits(got["weights"][:num_rows], want["weights"])
        assert all(same_bits(got[f"extras{k}"][:num_rows], want[f"extras{k}"]) for k in range(2))


@pytest.mark.parametrize("grid", [(2, 2), (3, 2), (4, 1)], ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_random_rounds_bring_what_they_should_and_blame_who_gave_up(layout, grid):
    rounds = Rounds(layout, grid, seed=LAYOUTS.index(layout))
    counts = run_local(rounds.run, grid[0] * grid[1])
    assert all(mine == counts[0] for mine in counts)
    assert counts[0]["failures"] == NUM_STEPS // ABORT_EVERY
    assert counts[0]["rows"] > 0
    assert (counts[0]["overflows"] > 0) == (not all(rounds.fits))
