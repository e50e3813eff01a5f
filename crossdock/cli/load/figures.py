"""What a routing means for ranks and links: loads, imbalance, rows, and what another placement would change.

Letters: S steps, T tokens of all ranks in a step, K top-k, E experts, V physical experts, P ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from crossdock import cost
from crossdock.cli.load.recording import Recording
from crossdock.layout import Compact
from crossdock.nn.placement import Placement
from crossdock.spec import Spec, Topology
from crossdock.wire import Bf16, Fp8, Fp32

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Picks and rows of each step."""

    num_tokens: int
    """Of all ranks in a step."""
    expert_picks: Counts
    """[S, E]: picks of each expert; the rows that it computes."""
    picks: Counts
    """[S, P, P]: picks from each rank of experts on each rank."""
    rows: Counts
    """[S, P, P]: the same, a token counted once for each rank that holds any of its experts."""

    @property
    def rank_picks(self) -> Counts:
        """[S, P]: rows that each rank's experts compute."""
        loads: Counts = self.picks.sum(axis=1)
        return loads

    @property
    def links(self) -> npt.NDArray[np.float64]:
        """[P, P]: rows of a step that cross from rank to rank, the mean over steps; none stay on their rank."""
        mean: npt.NDArray[np.float64] = self.rows.mean(axis=0)
        np.fill_diagonal(mean, 0)
        return mean

    @property
    def rows_per_token(self) -> float:
        """Ranks that a token visits, its own included."""
        return float(self.rows.sum() / (self.num_tokens * len(self.rows)))


@dataclass(frozen=True, kw_only=True)
class Imbalance:
    """The largest load over the mean load, 1 where all are equal."""

    mean: float
    """Of the steps: what a step waits for."""
    worst: float
    """The worst step."""
    overall: float
    """Of the load summed over steps: what stays when steps are averaged, and what a placement can mend."""

    @staticmethod
    def of(load: Counts) -> Imbalance:
        """Of a load [S, n]; steps without any load are left out.

        >>> Imbalance.of(np.array([[4, 0], [1, 3]]))
        Imbalance(mean=1.75, worst=2.0, overall=1.25)
        """
        steps = load[load.sum(axis=1) > 0]
        if not len(steps):
            return Imbalance(mean=1.0, worst=1.0, overall=1.0)
        each = steps.max(axis=1) / steps.mean(axis=1)
        total = steps.sum(axis=0)
        return Imbalance(mean=float(each.mean()), worst=float(each.max()), overall=float(total.max() / total.mean()))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A placement and what the measured steps would have been with it."""

    name: str
    num_physical: int
    ranks: Imbalance
    rows_per_token: float
    busiest_bytes: float
    """Of a step, on the link that carries most of them."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All that is shown."""

    recording: Recording
    spec: Spec
    traffic: Traffic
    experts: Imbalance
    ranks: Imbalance
    uniform_rows_per_token: float
    """What `crossdock.cost` expects when all picks are equally likely."""
    missing_share: float
    """Of the picks, those that are -1."""
    capacities: dict[str, int]
    """By layout, what ``capacity=`` the worst step needs."""
    candidates: Sequence[Candidate]
    dispatch: cost.Prediction
    combine: cost.Prediction
    """What `crossdock size` predicts of these picks, of ranks of one node."""
    fitted_steps: int
    measured_steps: int
    """The candidates' placements were made from the first of these, and measured on the others, or on the same."""

    @property
    def link_bytes(self) -> npt.NDArray[np.float64]:
        """[P, P]: bytes of a step's dispatch from rank to rank, in one row per token and rank."""
        return self.traffic.links * self.spec.row_bytes()

    @property
    def busiest_s(self) -> float:
        """Seconds of the busiest rank's link in a dispatch, by what it sends or gets; the mean of the steps."""
        return self.dispatch.hops[-1].link_s


def measure(recording: Recording, spec: Spec, *, replicas: Sequence[int]) -> Figures:
    """The figures of a recording.

    Args:
        recording: the picks.
        spec: of the buffer that would carry them; its layout does not matter.
        replicas: of each candidate, how many physical experts more than logical ones each rank has.
    """
    measured = traffic(recording)
    steps = len(recording.picks)
    fitted = max(1, steps // 2)
    unseen = replace(recording, picks=recording.picks[fitted:] if steps > 1 else recording.picks)
    load = measured.expert_picks[:fitted].sum(axis=0)
    candidates = [_candidate("as recorded", unseen, spec, None)]
    for extra in replicas:
        num_physical = recording.num_experts + extra * recording.num_ranks
        placement = Placement.balanced(torch.from_numpy(load), num_physical=num_physical, num_ranks=recording.num_ranks)
        name = "exchanged" if extra == 0 else f"{extra} more on each rank"
        candidates.append(_candidate(name, unseen, spec, placement))
    topology = Topology(num_ranks=recording.num_ranks)
    rows = cost.recorded_rows(recording.picks, spec, topology)
    return Figures(
        recording=recording,
        spec=spec,
        traffic=measured,
        experts=Imbalance.of(measured.expert_picks),
        ranks=Imbalance.of(measured.rank_picks),
        uniform_rows_per_token=cost.ranks_per_token(spec, recording.num_ranks),
        missing_share=float((recording.picks < 0).mean()),
        capacities={
            "Compact": int(measured.rows.sum(axis=1).max()),
            "Expanded": int(measured.rank_picks.max()),
            "Padded": int(measured.expert_picks.max()),
        },
        candidates=candidates,
        dispatch=cost.predict("dispatch", spec, topology, rows),
        combine=cost.predict("combine", spec, topology, rows),
        fitted_steps=fitted,
        measured_steps=len(unseen.picks),
    )


def make_spec(recording: Recording, *, hidden: int, wire: str) -> Spec:
    """The Spec of a buffer that would carry the recording.

    Raises:
        ConfigError: a size is not allowed.
    """
    wires = {"bf16": Bf16(), "fp8": Fp8(), "fp32": Fp32()}
    return Spec(
        num_experts=recording.num_experts,
        num_topk=recording.picks.shape[2],
        hidden=hidden,
        max_tokens=recording.max_tokens,
        wire=wires[wire],
        layout=Compact(),
    )


def traffic(recording: Recording) -> Traffic:
    """Counts picks and rows, step by step.

    >>> picks = np.array([[[0, 1], [1, 3]]], np.int32)  # one token of each of two ranks, experts 0 and 1 on rank 0
    >>> found = traffic(Recording(picks=picks, num_experts=4, num_ranks=2))
    >>> found.picks[0].tolist(), found.rows[0].tolist(), found.rows_per_token
    ([[2, 0], [1, 1]], [[1, 0], [1, 1]], 1.5)
    """
    num_experts, num_ranks, sources = recording.num_experts, recording.num_ranks, recording.sources
    num_local = num_experts // num_ranks
    expert_picks, picks, rows = [], [], []
    for step in recording.picks:
        expert_picks.append(np.bincount(step.ravel() + 1, minlength=num_experts + 1)[1:])
        targets = np.where(step < 0, num_ranks, step // num_local)  # [T, K], P where there is no pick
        cells = sources[:, None] * (num_ranks + 1) + targets
        shape = num_ranks, num_ranks + 1
        picks.append(np.bincount(cells.ravel(), minlength=shape[0] * shape[1]).reshape(shape)[:, :-1])
        ordered = np.sort(cells, axis=1)
        first = np.concatenate([np.ones((len(step), 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
        rows.append(np.bincount(ordered[first], minlength=shape[0] * shape[1]).reshape(shape)[:, :-1])
    return Traffic(
        expert_picks=np.stack(expert_picks), picks=np.stack(picks), rows=np.stack(rows), num_tokens=len(sources)
    )


def _candidate(name: str, recording: Recording, spec: Spec, placement: Placement | None) -> Candidate:
    if placement is not None:
        recording = place(recording, placement)
    found = traffic(recording)
    return Candidate(
        name=name,
        num_physical=recording.num_experts,
        ranks=Imbalance.of(found.rank_picks),
        rows_per_token=found.rows_per_token,
        busiest_bytes=float(found.links.max() * spec.row_bytes()),
    )


def place(recording: Recording, placement: Placement) -> Recording:
    """The same picks as physical experts; each rank begins with the replica of its own number."""
    starts = np.searchsorted(recording.sources, np.arange(recording.num_ranks + 1))
    placed = np.empty_like(recording.picks)
    for rank, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
        for step in range(len(placed)):
            of_rank = torch.from_numpy(np.ascontiguousarray(recording.picks[step, start:end]))
            placed[step, start:end] = placement.to_physical(of_rank, start=rank).numpy()
    return replace(recording, picks=placed, num_experts=placement.num_physical)
