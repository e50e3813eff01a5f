"""The definition of dispatch and combine as plain loops over all ranks' inputs; tests compare bits with it.

Letters: P ranks, T tokens of a rank, K top-k, H hidden, R rows, L local experts, C capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crossdock import Compact, Expanded, Fp8, Quantized, Spec


class Row(NamedTuple):
    """Which token a received row is, and the pick that it serves; None: all picks of its rank."""

    source: int
    token: int
    pick: int | None


def rows_of(spec: Spec, topk: Sequence[Tensor]) -> list[list[Row | None]]:
    """Each rank's rows, in order; None where alignment or a fixed capacity leaves a gap."""
    num_local = spec.num_experts // len(topk)
    picks = [
        (s, t, k, e) for s, idx in enumerate(topk) for t, row in enumerate(idx.tolist()) for k, e in enumerate(row)
    ]
    result: list[list[Row | None]] = []
    for rank in range(len(topk)):
        rows: list[Row | None] = []
        if isinstance(spec.layout, Compact):
            pairs = dict.fromkeys((s, t) for s, t, _, e in picks if e >= 0 and e // num_local == rank)
            rows += [Row(s, t, None) for s, t in pairs]
        else:
            for expert in range(rank * num_local, (rank + 1) * num_local):
                rows += (segment := [Row(s, t, k) for s, t, k, e in picks if e == expert])
                if isinstance(spec.layout, Expanded):
                    rows += [None] * (-len(segment) % spec.layout.alignment)
                else:
                    rows += [None] * (spec.capacity(len(topk)) - len(segment))
        result.append(rows)
    return result


def received(
    spec: Spec,
    topk: Sequence[Tensor],
    x: Sequence[Tensor | Quantized],
    weights: Sequence[Tensor] | None = None,
    extras: Sequence[Sequence[Tensor]] | None = None,
) -> list[dict[str, Tensor]]:
    """What each rank gets, flat over rows: data, scale, src_idx, counts, topk_idx, weights, extras; gaps: 0 or -1."""
    num_local = spec.num_experts // len(topk)
    if isinstance(spec.wire, Fp8):
        x = [rows if isinstance(rows, Quantized) else spec.wire.quantize(rows) for rows in x]
    gets = []
    for rank, rows in enumerate(rows_of(spec, topk)):

        def gather(values: Sequence[Tensor], rows: list[Row | None] = rows) -> Tensor:
            raw = torch.zeros(len(rows), *values[0].shape[1:], dtype=values[0].dtype)
            for r, row in enumerate(rows):
                if row is not None:
                    raw[r] = values[row.source][row.token]
            return raw

        local = gather([torch.where(idx // num_local == rank, idx % num_local, -1) for idx in topk])
        experts = torch.cat([idx.flatten() for idx in topk])
        got = {
            "data": gather([rows.data if isinstance(rows, Quantized) else rows for rows in x]),
            "src_idx": torch.tensor([-1 if r is None else r.source * spec.max_tokens + r.token for r in rows]).int(),
            "counts": torch.stack([(experts == rank * num_local + e).sum() for e in range(num_local)]).int(),
        }
        if spec.wire.num_scales(spec.hidden):
            got["scale"] = gather([rows.scale for rows in x if isinstance(rows, Quantized)])
        if isinstance(spec.layout, Compact):
            got["topk_idx"] = local.int()
        if weights is not None:
            got["weights"] = gather(weights)
            if isinstance(spec.layout, Compact):
                got["weights"] = got["weights"].where(local >= 0, 0.0)
            else:
                picks = [0 if row is None or row.pick is None else row.pick for row in rows]
                got["weights"] = got["weights"][torch.arange(len(rows)), picks]
        for i in range(len(extras[0]) if extras else 0):
            got[f"extras{i}"] = gather([extra[i] for extra in extras or ()])
        gets.append(got)
    return gets


def combined(
    spec: Spec,
    topk: Sequence[Tensor],
    y: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    bias: Sequence[Tensor] | None = None,
    node_size: int | None = None,
) -> list[Tensor]:
    """The sum at each token's owner. By rank: y [R, H]; weights [T, K], [R] unless owners sum; bias [T, H] or [H]."""
    node_size = node_size or len(topk)
    num_local = spec.num_experts // len(topk)
    place = {(rank, row): r for rank, rows in enumerate(rows_of(spec, topk)) for r, row in enumerate(rows) if row}
    outs = []
    for source, idx in enumerate(topk):
        out = torch.empty(idx.shape[0], spec.hidden, dtype=spec.combine_dtype)
        for token, experts in enumerate(idx.tolist()):
            terms: dict[
                tuple[int, int], list[int]
            ] = {}  # (rank, row): the picks it serves; in the order of first picks
            for pick, expert in enumerate(experts):
                if expert >= 0:
                    rank = expert // num_local
                    row = Row(source, token, None if isinstance(spec.layout, Compact) else pick)
                    terms.setdefault((rank, place[rank, row]), []).append(pick)
            if spec.reduce == "token":
                of_picks = None if weights is None else weights[source][token]
                addends = [
                    y[rank][row] if of_picks is None else y[rank][row].float() * sum(of_picks[k] for k in picks)
                    for (rank, row), picks in terms.items()
                ]
            elif spec.reduce == "node":
                addends = []
                order = sorted(terms) if isinstance(spec.layout, Compact) else terms
                for node in sorted({rank // node_size for rank, _ in terms}):
                    here = [at for at in order if at[0] // node_size == node]
                    parts = [y[q][r] if weights is None else y[q][r].float() * weights[q][r] for q, r in here]
                    addends.append(_sum(parts, spec.hidden).to(spec.combine_dtype))
            else:
                addends = []
                for rank in sorted({rank for rank, _ in terms}):
                    here = [row for at, row in terms if at == rank]
                    parts = [y[rank][r] if weights is None else y[rank][r].float() * weights[rank][r] for r in here]
                    addends.append(_sum(parts, spec.hidden).to(spec.combine_dtype))
            total = _sum(addends, spec.hidden)
            if bias is not None:
                total = total + (bias[source] if bias[source].dim() == 1 else bias[source][token]).float()
            out[token] = total.to(spec.combine_dtype)
        outs.append(out)
    return outs


def returned_extras(
    spec: Spec, topk: Sequence[Tensor], extra: Sequence[Tensor], node_size: int | None = None
) -> list[Tensor]:
    """What comes home of extra [R, n] by rank: [T, n] summed in the order of terms (Compact), else [T, K, n]."""
    node_size = node_size or len(topk)
    num_local = spec.num_experts // len(topk)
    homes = [torch.zeros(*idx.shape, extra[0].shape[1]) for idx in topk]
    if not isinstance(spec.layout, Compact):
        for rank, rows in enumerate(rows_of(spec, topk)):
            for r, row in enumerate(rows):
                if row is not None:
                    homes[row.source][row.token, row.pick] = extra[rank][r]
        return homes
    place = {(rank, row): r for rank, rows in enumerate(rows_of(spec, topk)) for r, row in enumerate(rows) if row}
    homes = [torch.zeros(idx.shape[0], extra[0].shape[1]) for idx in topk]
    for source, idx in enumerate(topk):
        for token, experts in enumerate(idx.tolist()):
            ranks = list(dict.fromkeys(e // num_local for e in experts if e >= 0))
            by_node = spec.reduce == "node"
            for node in sorted({rank // node_size for rank in ranks}) if by_node else [None]:
                here = torch.zeros(extra[0].shape[1])
                for rank in ranks if spec.reduce == "token" else sorted(ranks):
                    if node in (None, rank // node_size):
                        here += extra[rank][place[rank, Row(source, token, None)]]
                homes[source][token] += here
    return homes


def _sum(terms: Sequence[Tensor], hidden: int) -> Tensor:
    """float32, from left to right, begun with 0."""
    total = torch.zeros(hidden)
    for term in terms:
        total = total + term.float()
    return total
