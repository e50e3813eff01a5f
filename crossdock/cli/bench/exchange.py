"""The baseline: dispatch and combine by ``all_to_all_single``, as they are commonly written without Crossdock.

Counts are exchanged first; one gather packs the rows, one ``all_to_all_single`` with split sizes moves them, and a
second gather orders them by expert where the layout requires it. Combine reverses this and computes the same sums. Rows
are received in new tensors, as in most code, or in buffers kept between calls, which saves page faults.

CPU tensors are exchanged over gloo; every result is compared with theirs, bit for bit. CUDA tensors use NCCL.

Letters: T tokens here, K top-k, H hidden, E experts, L local ones, P ranks, Q rows sent, R rows received, C capacity.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.backends.sums import sum_rows
from crossdock.layout import Compact, Expanded, Padded
from crossdock.plan import Terms
from crossdock.spec import Spec


@dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """One routing as this rank needs it for dispatch and combine."""

    send_idx: Tensor
    """[Q], the token of each sent row, in the order of destinations."""
    send_splits: list[int]
    recv_splits: list[int]
    by_expert: Tensor | None
    """[R], received rows in the order of experts; None where they keep the order of arrival."""
    num_tokens_per_expert: list[int]
    pos: Tensor
    """[T, K], the sent row that serves each pick; -1 for no pick, or if the row serves an earlier pick of the token."""
    places: Tensor
    """[T, K], the rank of each pick; -1 for no pick."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrived:
    """Received rows in the layout's order, [R, ...] or [L, C, ...]: data, and scales if quantised."""

    parts: tuple[Tensor, ...]
    route: Route


@dataclass
class AllToAll:
    """Dispatch and combine over the default process group, for tensors of one device.

    Args:
        spec: row formats, layout and reduction.
        num_ranks: P, the size of the group.
        keeps_buffers: reuse the buffers for packed and received rows in the next call; else allocate new ones.
        node_size: U, the ranks of a node, for sums by node.

    >>> exchange = AllToAll(spec, num_ranks=4)  # doctest: +SKIP
    >>> arrived = exchange.dispatch((x,), topk_idx)  # doctest: +SKIP
    >>> out = exchange.combine(arrived.parts[0], arrived.route)  # doctest: +SKIP
    """

    spec: Spec
    num_ranks: int
    keeps_buffers: bool = False
    node_size: int = 1
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def dispatch(self, parts: tuple[Tensor, ...], topk_idx: Tensor) -> Arrived:
        """Exchanges counts, then rows. ``parts``: [T, ...] each, sent in parallel. Collective."""
        return self.send(parts, self.route(topk_idx))

    def route(self, topk_idx: Tensor) -> Route:
        """Plans a routing and exchanges its counts. Collective; reads the counts on the host."""
        num_local = self.spec.num_local_experts(self.num_ranks)
        places = topk_idx // num_local
        if isinstance(self.spec.layout, Compact):
            send_idx, counts, pos = _rows_by_rank(places, self.num_ranks)
        else:
            send_idx, counts, pos = _rows_by_expert(topk_idx, self.spec.num_experts)
        counts = counts.view(self.num_ranks, -1)  # [P, 1] or [P, L]
        incoming = torch.empty_like(counts)
        dist.all_to_all_single(incoming, counts)
        by_expert = None
        if incoming.shape[1] > 1 or not isinstance(self.spec.layout, Compact):
            experts = torch.arange(num_local, device=counts.device).repeat(self.num_ranks)
            by_expert = torch.argsort(experts.repeat_interleave(incoming.flatten()), stable=True)
        return Route(
            send_idx=send_idx,
            send_splits=counts.sum(1).tolist(),
            recv_splits=incoming.sum(1).tolist(),
            by_expert=by_expert,
            num_tokens_per_expert=incoming.sum(0).tolist(),
            pos=pos,
            places=places,
        )

    def send(self, parts: tuple[Tensor, ...], route: Route) -> Arrived:
        """Exchanges rows on a known route. Collective."""
        packed = [self._gathered(f"send {i}", part.view(torch.uint8), route.send_idx) for i, part in enumerate(parts)]
        landed = self._exchange("recv", packed, route.recv_splits, route.send_splits)
        final = [self._arranged(f"final {i}", rows, route) for i, rows in enumerate(landed)]
        return Arrived(parts=tuple(rows.view(part.dtype) for rows, part in zip(final, parts, strict=True)), route=route)

    def combine(self, y: Tensor, route: Route) -> Tensor:
        """Sums of each token's outputs, [T, H], in the Spec's order, from y [R, H] or [L, C, H]. Collective."""
        rows = y.view(-1, self.spec.hidden).view(torch.uint8)
        if route.by_expert is not None:
            back = torch.empty_like(route.by_expert)
            back[route.by_expert] = self._final_rows(route)
            rows = self._gathered("back", rows, back)
        (home,) = self._exchange("home", [rows], route.send_splits, route.recv_splits)
        return self._summed(home.view(y.dtype), route)

    def _summed(self, home: Tensor, route: Route) -> Tensor:
        """The sums of returned rows. Partial sums of ranks or nodes are computed here, from all their rows."""
        dtype, pos = self.spec.combine_dtype, route.pos
        if self.spec.reduce == "token":
            return _sums(home, pos, dtype)
        if not self.spec.layout.per_pick:
            last = torch.iinfo(pos.dtype).max
            pos = pos.masked_fill(pos < 0, last).sort(dim=1).values  # rows are in the order of ranks
            pos = pos.masked_fill(pos == last, -1)
            if self.spec.reduce == "rank":
                return _sums(home, pos, dtype)
        size = self.node_size if self.spec.reduce == "node" else 1
        splits = torch.tensor(route.send_splits, device=home.device)
        ranks = torch.arange(self.num_ranks, device=home.device).repeat_interleave(splits)  # of each returned row
        parts = torch.cat([ranks // size, torch.full((1,), -1, device=home.device)])[pos]  # -1: no row
        num_parts = self.num_ranks // size
        partial = [_sums(home, pos.masked_fill(parts != part, -1), dtype) for part in range(num_parts)]
        tokens = torch.arange(len(pos), device=home.device)
        table = torch.stack(
            [(tokens + part * len(tokens)).masked_fill((parts != part).all(dim=1), -1) for part in range(num_parts)],
            dim=1,
        )
        return _sums(torch.cat(partial), table, dtype)

    def _exchange(self, name: str, parts: list[Tensor], there: list[int], here: list[int]) -> list[Tensor]:
        """One asynchronous ``all_to_all_single`` of bytes per part, then waits for all."""
        rooms = [self._room(f"{name} {i}", sum(there), p.shape[1], torch.uint8, p.device) for i, p in enumerate(parts)]
        works = [
            dist.all_to_all_single(room, part, there, here, async_op=True)
            for room, part in zip(rooms, parts, strict=True)
        ]
        for work in works:
            work.wait()
        return rooms

    def _gathered(self, name: str, rows: Tensor, idx: Tensor) -> Tensor:
        """Gathers rows of bytes, on GPUs as int64 where possible."""
        room = self._room(name, len(idx), rows.shape[1], torch.uint8, rows.device)
        if rows.is_cuda and rows.shape[1] % 8 == 0:
            torch.index_select(rows.view(torch.int64), 0, idx, out=room.view(torch.int64))
            return room
        return torch.index_select(rows, 0, idx, out=room)

    def _arranged(self, name: str, rows: Tensor, route: Route) -> Tensor:
        """Received rows in the layout's order."""
        if route.by_expert is None:
            return rows
        layout = self.spec.layout
        if isinstance(layout, Expanded) and layout.alignment > 1:
            final = self._room(name, int(self._starts(route)[-1]), rows.shape[1], torch.uint8, rows.device).zero_()
            final[self._final_rows(route)] = rows[route.by_expert]
            return final
        if not isinstance(layout, Padded):
            return self._gathered(name, rows, route.by_expert)
        capacity, num_experts = self.spec.capacity(self.num_ranks), len(route.num_tokens_per_expert)
        room = self._room(name, num_experts * capacity, rows.shape[1], torch.uint8, rows.device)
        blocks = room.view(num_experts, capacity, -1)
        for block, idx in zip(blocks, torch.split(route.by_expert, route.num_tokens_per_expert), strict=True):
            torch.index_select(rows, 0, idx, out=block[: len(idx)])
        return blocks

    def _final_rows(self, route: Route) -> Tensor:
        """[R], the layout's row of each received row in the order of experts."""
        starts = self._starts(route).tolist()
        places = [start + torch.arange(n) for start, n in zip(starts, route.num_tokens_per_expert, strict=False)]
        return torch.cat(places).to(route.send_idx.device)

    def _starts(self, route: Route) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """[L + 1], the first row of each expert, and the end of the last."""
        counts = np.array(route.num_tokens_per_expert, dtype=np.int64)
        return self.spec.layout.segment_starts(counts, self.spec.capacity(self.num_ranks))

    def _room(self, name: str, num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer [num_rows, width]; a kept one grows if it is too small."""
        if not self.keeps_buffers:
            return torch.empty(num_rows, width, dtype=dtype, device=device)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < num_rows * width:
            kept = self._kept[name] = torch.empty(num_rows * width, dtype=dtype, device=device)
        return kept[: num_rows * width].view(num_rows, width)


def _sums(source: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 sums of rows [N, H]: sum t adds rows ``table[t]`` from left to right; negative entries are no terms."""
    if not source.is_cuda:
        return sum_rows(source, Terms.of(table.numpy()), dtype=dtype)
    sums = torch.zeros(len(table), source.shape[1], device=source.device)
    if len(source):
        for rows in table.unbind(dim=1):
            sums += source.index_select(0, rows.clamp_min(0)).masked_fill_((rows < 0).unsqueeze(1), 0)
    return sums.to(dtype)


def _rows_by_rank(places: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """One row per (token, rank), by rank, then token: tokens [Q], counts [P], and the row of each pick [T, K].

    >>> _rows_by_rank(torch.tensor([[1, 0], [1, 1]]), 2)
    (tensor([0, 0, 1]), tensor([1, 2]), tensor([[ 1,  0],
            [ 2, -1]]))
    """
    num_tokens, device = places.shape[0], places.device
    tokens = torch.arange(num_tokens, device=device).unsqueeze(1)
    hits = torch.zeros(num_ranks + 1, num_tokens, dtype=torch.bool, device=device)
    hits[places, tokens] = True  # -1 marks the row that is cut off
    hits = hits[:num_ranks]
    rows = (hits.flatten().cumsum(0) - 1).view(num_ranks, num_tokens)
    pos = rows[places, tokens]
    is_repeated = (places.unsqueeze(2) == places.unsqueeze(1)).tril(-1).any(dim=2)
    return hits.nonzero()[:, 1], hits.sum(1), pos.masked_fill(is_repeated | (places < 0), -1)


def _rows_by_expert(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """One row per pick, by expert, then token: tokens [Q], counts [E], and the row of each pick [T, K]."""
    picks = topk_idx.flatten()
    counts = torch.bincount(picks + 1, minlength=num_experts + 1)
    order = torch.argsort(picks, stable=True)[int(counts[0]) :]
    pos = torch.full_like(picks, -1)
    pos[order] = torch.arange(len(order), device=pos.device)
    return order // topk_idx.shape[1], counts[1:], pos.view(topk_idx.shape)
