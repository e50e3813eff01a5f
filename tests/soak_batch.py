"""Random inputs of all ranks for one dispatch and combine, and their expected results, vectorised for the soak.

Letters: P ranks, T tokens of a rank, M max_tokens, K top-k, H hidden, E experts, R rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crossdock import Compact, Padded, Quantized, Spec
from crossdock.wire import Fp8

EXTRA_BYTES = 10
"""Of the extras that each token brings."""


_NORMAL = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32)
"""Batches are cut out of it: to draw them each time took half of a round."""


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Where every pick of every rank goes."""

    ranks: np.ndarray  # [P, M, K] the rank of each pick, -1: none
    rows: np.ndarray  # [P, M, K] its row there
    sources: list[np.ndarray]  # by rank [R, 3]: source rank, token, pick of each row; -1 in gaps
    counts: np.ndarray  # [E] picks of each expert
    fits: bool


def find_routes(spec: Spec, num_ranks: int, topk: np.ndarray) -> Routes:
    """By source rank and token (Compact), or by expert, source rank and token; no sources where they do not fit."""
    num_local = spec.num_local_experts(num_ranks)
    ranks, rows = topk // num_local, np.full(topk.shape, -1)
    counts = np.bincount(topk.ravel() + 1, minlength=spec.num_experts + 1)[1:]
    by_rank = counts.reshape(num_ranks, num_local)
    if isinstance(spec.layout, Compact):
        goes = (ranks == np.arange(num_ranks)[:, None, None, None]).any(-1)  # [destination, source, token]
        row_of_token = (goes.reshape(num_ranks, -1).cumsum(1) - 1).reshape(goes.shape)
        source, token, _ = np.indices(topk.shape, sparse=True)
        rows = np.where(topk < 0, -1, row_of_token[ranks, source, token])
        num_rows = goes.sum((1, 2))
        sources = np.argwhere(goes)[:, [1, 2, 2]]
    else:
        order = np.argsort(np.where(topk < 0, spec.num_experts, topk), axis=None, kind="stable")[: counts.sum()]
        experts = topk.ravel()[order]
        if isinstance(spec.layout, Padded):
            lengths = np.full_like(by_rank, max(spec.capacity(num_ranks), by_rank.max()))
        else:
            lengths = -(-by_rank // spec.layout.alignment) * spec.layout.alignment
        starts, num_rows = (lengths.cumsum(1) - lengths).ravel(), lengths.sum(1)
        nth = np.arange(len(order)) - (counts.cumsum() - counts)[experts]
        rows.ravel()[order] = starts[experts] + nth
        first = num_rows.cumsum() - num_rows
        sources = np.full((num_rows.sum(), 3), -1)
        sources[first[experts // num_local] + rows.ravel()[order]] = np.array(np.unravel_index(order, topk.shape)).T
    fits = (by_rank if isinstance(spec.layout, Padded) else num_rows).max() <= spec.capacity(num_ranks)
    parts = np.split(sources, num_rows.cumsum()[:-1]) if fits else [sources[:0]] * num_ranks
    return Routes(ranks=ranks, rows=rows, sources=parts, counts=counts, fits=bool(fits))


class Batch:
    """Inputs by rank, and what each rank must get."""

    def __init__(self, rng: np.random.Generator, spec: Spec, num_ranks: int, node_size: int | None = None) -> None:
        self.spec, self.num_ranks, self._rng = spec, num_ranks, rng
        self._part_size = node_size if spec.reduce == "node" and node_size else 1
        m, k = spec.max_tokens, spec.num_topk
        self.num_tokens = rng.integers(0, m + 1, num_ranks)
        if rng.random() < 0.2:
            self.num_tokens[:] = rng.choice([0, m])
        scores = rng.random((num_ranks, m, spec.num_experts))
        if rng.random() < 0.2:
            scores[..., : spec.num_local_experts(num_ranks)] += 0.5  # rank 0 is hot
        self.topk = np.argsort(-scores, axis=-1)[..., :k]
        self.topk[rng.random(self.topk.shape) < rng.choice([0, 0.2, 0.9])] = -1
        self.topk[np.arange(m) >= self.num_tokens[:, None]] = -1
        self.routes = find_routes(spec, num_ranks, self.topk)
        self.weights = torch.from_numpy(rng.random((num_ranks, m, k), dtype=np.float32))
        self.extras = torch.from_numpy(rng.integers(-128, 128, (num_ranks, m, EXTRA_BYTES)).astype(np.int8))
        self.bias = self.randn(num_ranks, m, spec.hidden)
        num_rows = max(1, *map(len, self.routes.sources))
        self.y = self.randn(num_ranks, num_rows, spec.hidden).to(spec.combine_dtype)
        self.row_weights = self.randn(num_ranks, num_rows)
        self.home = self.randn(num_ranks, num_rows, 2)
        for rank, sources in enumerate(self.routes.sources):
            for rows in (self.y, self.row_weights, self.home):
                rows[rank, : len(sources)][torch.from_numpy(sources[:, 0] < 0)] = float("nan")

    def randn(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        at = int(self._rng.integers(len(_NORMAL) - size))
        return torch.from_numpy(_NORMAL[at : at + size].reshape(shape).copy())

    def tokens(self, *, unquantized: bool = False) -> Tensor:
        """Rows to dispatch, of all ranks: [P, M, H]."""
        wire = self.spec.wire
        dtype = self.spec.combine_dtype if unquantized else torch.bfloat16 if isinstance(wire, Fp8) else wire.dtype
        return self.randn(self.num_ranks, self.spec.max_tokens, self.spec.hidden).to(dtype)

    def received(self, rank: int, tokens: Tensor, *, unquantized: bool = False) -> dict[str, Tensor]:
        """What a rank gets, flat over its rows; gaps are 0 or -1."""
        spec, routes = self.spec, self.routes
        source, token, pick = routes.sources[rank].T
        is_gap = torch.from_numpy(source < 0)
        at = (source, token)
        local = torch.from_numpy(np.where(routes.ranks[at] == rank, self.topk[at] % self._num_local, -1))
        local[is_gap] = -1
        want = {"src_idx": torch.from_numpy(np.where(source < 0, -1, source * spec.max_tokens + token)).int()}
        rows = tokens[at]
        if isinstance(spec.wire, Fp8) and not unquantized:
            rows = spec.wire.quantize(rows)
            want["scale"] = _blank(rows.scale, is_gap)
        want["data"] = _blank(rows.data if isinstance(rows, Quantized) else rows, is_gap)
        want["extras"] = _blank(self.extras[at], is_gap)
        if isinstance(spec.layout, Compact):
            want["topk_idx"] = local.int()
            want["weights"] = self.weights[at].where(local >= 0, 0.0)
        else:
            want["weights"] = _blank(self.weights[at][np.arange(len(pick)), pick], is_gap)
        mine = slice(rank * self._num_local, (rank + 1) * self._num_local)
        want["counts"] = torch.from_numpy(routes.counts[mine]).int()
        return want

    def combined(self, rank: int, *, weighted: bool, biased: bool) -> Tensor:
        """The sums [T, H] at a rank: float32, each begun with its first term, then the bias, then one cast."""
        spec, ranks = self.spec, self.routes.ranks[rank]
        total = _Sum(spec)
        if spec.reduce == "token":
            for k in range(spec.num_topk):
                total.add(self._term(rank, k, weighted=weighted), self._is_first(rank, k))
        else:
            for ranks_of_part in self._parts():
                part = _Sum(spec)
                for r in ranks_of_part:
                    for k in range(spec.num_topk):
                        is_term = self._is_first(rank, k) & np.isin(ranks[:, k], r)
                        part.add(self._term(rank, k, weighted=weighted), is_term)
                total.add(part.value.to(spec.combine_dtype).float(), part.has_any)
        out = total.value + self.bias[rank] if biased else total.value
        return out.to(spec.combine_dtype)[: self.num_tokens[rank]]

    def came_home(self, rank: int) -> Tensor:
        """What a rank gets back of its tokens' extras: [T, K, n], or summed [T, n] for Compact."""
        spec, ranks = self.spec, self.routes.ranks[rank]
        values = self.home[ranks, self.routes.rows[rank]]
        values[torch.from_numpy(ranks < 0)] = 0
        if not isinstance(spec.layout, Compact):
            return values[: self.num_tokens[rank]]
        total = torch.zeros_like(values[:, 0])
        for ranks_of_part in [[range(self.num_ranks)]] if spec.reduce == "token" else self._parts():
            part = torch.zeros_like(total)
            for r in ranks_of_part:
                for k in range(spec.num_topk):
                    counts = self._is_first(rank, k) & np.isin(ranks[:, k], r)
                    part = torch.where(torch.from_numpy(counts)[:, None], part + values[:, k], part)
            total = total + part
        return total[: self.num_tokens[rank]]

    def _parts(self) -> list[list[range]]:
        """The ranks whose rows are summed first, rank by rank, or all at once in the order of picks."""
        parts = [range(first, first + self._part_size) for first in range(0, self.num_ranks, self._part_size)]
        return [[range(r, r + 1) for r in part] if isinstance(self.spec.layout, Compact) else [part] for part in parts]

    @property
    def _num_local(self) -> int:
        return self.spec.num_local_experts(self.num_ranks)

    def _is_first(self, rank: int, k: int) -> np.ndarray:
        """[M]: whether pick k has a row that no earlier pick of the token has."""
        ranks = self.routes.ranks[rank]
        is_pick = ranks[:, k] >= 0
        return (
            is_pick & ~(ranks[:, :k] == ranks[:, k : k + 1]).any(1)
            if isinstance(self.spec.layout, Compact)
            else is_pick
        )

    def _term(self, rank: int, k: int, *, weighted: bool) -> Tensor:
        """[M, H]: the row of pick k of each token, weighted."""
        ranks, rows = self.routes.ranks[rank], self.routes.rows[rank]
        term = self.y[ranks[:, k], rows[:, k]].float()
        if not weighted:
            return term
        if self.spec.reduce != "token":
            weights = self.row_weights[ranks[:, k], rows[:, k]]
        elif isinstance(self.spec.layout, Compact):
            weights = torch.zeros(self.spec.max_tokens, dtype=torch.float32)
            for other in range(self.spec.num_topk):
                is_same = torch.from_numpy(ranks[:, other] == ranks[:, k])
                weights = torch.where(is_same, weights + self.weights[rank, :, other], weights)
        else:
            weights = self.weights[rank, :, k]
        return term * weights[:, None]


class _Sum:
    """Sums of M tokens, each begun with its first term."""

    def __init__(self, spec: Spec) -> None:
        self.value = torch.zeros(spec.max_tokens, spec.hidden, dtype=torch.float32)
        self.has_any = np.zeros(spec.max_tokens, dtype=bool)

    def add(self, term: Tensor, counts: np.ndarray) -> None:
        begun, here = (torch.from_numpy(flags)[:, None] for flags in (self.has_any, counts))
        self.value = torch.where(here, torch.where(begun, self.value + term, term), self.value)
        self.has_any = self.has_any | counts


def _blank(rows: Tensor, is_gap: Tensor) -> Tensor:
    raw = rows.clone(memory_format=torch.contiguous_format)
    raw.view(torch.uint8).flatten(1 if rows.dim() > 1 else 0).view(len(is_gap), rows[:1].nbytes)[is_gap] = 0
    return raw
