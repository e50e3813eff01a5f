"""Seeded inputs of all ranks of a world, the received values that a program returns, and their comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossdock import Compact, Expanded, Opaque, Padded, Quantized, Received, Spec
from tests import oracle


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call's inputs, by rank."""

    name: str
    spec: Spec
    x: list[Tensor | Quantized]  # [T, H] each; of opaque rows all bits at random
    topk: list[Tensor]  # [T, K] each
    weights: list[Tensor]  # [T, K] each
    extras: list[tuple[Tensor, ...]]  # [T, ...] each
    y: list[Tensor] = field(default_factory=list)
    """Outputs for the rows that come, [R, H] or [L, C, H]; NaN in gaps."""
    y_extras: list[tuple[Tensor, ...]] = field(default_factory=list)
    """float32 [R, 3] and [R, 1] (or [L, C, ...]) that go home with them; NaN in gaps."""

    def flat_y(self) -> list[Tensor]:
        return [y.reshape(-1, y.shape[-1]) for y in self.y]


STAGED = Expanded(alignment=4, capacity=10**6, staged=True)
"""With room for whatever comes where rows="capacity" is asked for."""
EXTRA_BYTES = 14
"""Of the extras that make_case gives each token: three int16 and a float64."""


def make_case(
    spec: Spec, num_tokens: Sequence[int], *, picks: str | Sequence[Tensor] = "some", seed: int = 0, idx=torch.int64
) -> Case:
    """Random rows; picks that are given, or "some" (a fifth missing), "none", "one" (a token's first is expert 0)."""
    g = torch.Generator().manual_seed(seed)
    num_ranks, num_topk = len(num_tokens), spec.num_topk
    dtype = spec.combine_dtype
    x, topk, weights, extras = [], [], [], []
    for r, t in enumerate(num_tokens):
        if isinstance(spec.wire, Opaque):
            x.append(opaque_rows(spec, t, g))
        else:
            x.append((torch.randn(t, spec.hidden, generator=g) * 3).to(dtype))
        picked = torch.rand(t, spec.num_experts, generator=g).topk(num_topk, 1).indices
        if not isinstance(picks, str):
            picked = picks[r].clone()
        elif picks == "one":
            picked[:, 1:] = -1
            picked[:, 0] = 0
        else:
            picked[torch.rand(t, num_topk, generator=g) < (0.2 if picks == "some" else 2)] = -1
        topk.append(picked.to(idx))
        weights.append(torch.rand(t, num_topk, generator=g) + 0.01)
        small = torch.randint(-1000, 1000, (t, 3), generator=g).to(torch.int16)
        extras.append((small, torch.randn(t, generator=g, dtype=torch.float64)))
    y, y_extras = [], []
    for rows in oracle.rows_of(spec, topk):
        lead = (num_ranks and spec.num_experts // num_ranks, -1) if isinstance(spec.layout, Padded) else (len(rows),)
        is_gap = torch.tensor([row is None for row in rows], dtype=torch.bool)
        here = [torch.randn(len(rows), n, generator=g) for n in (spec.hidden, 3, 1)]
        for tensor in here:
            tensor[is_gap] = float("nan")
        y.append(here[0].to(dtype).view(*lead, spec.hidden))
        y_extras.append((here[1].view(*lead, 3), here[2].view(*lead, 1)))
    name = f"{picks if isinstance(picks, str) else 'given'} picks of {list(num_tokens)} tokens"
    return Case(name=name, spec=spec, x=x, topk=topk, weights=weights, extras=extras, y=y, y_extras=y_extras)


def opaque_rows(spec: Spec, num_tokens: int, generator: torch.Generator) -> Tensor | Quantized:
    """Rows of an opaque wire, with whatever bits, as a dispatch takes them."""

    def bits(num_columns: int, dtype: torch.dtype) -> Tensor:
        shape = (num_tokens, num_columns * dtype.itemsize)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype)

    wire, num_scales = spec.wire, spec.wire.num_scales(spec.hidden)
    data = bits(wire.num_columns(spec.hidden), wire.dtype)
    return Quantized(data, bits(num_scales, wire.scale_dtype)) if num_scales else data


def loads(spec: Spec, num_ranks: int) -> list[Case]:
    """Calls that one buffer makes in a row: full, uneven, no picks, all to one expert, ranks without tokens."""
    m = spec.max_tokens
    return [
        make_case(spec, [m] * num_ranks, seed=1),
        make_case(spec, [(3 * r + 1) % (m + 1) for r in range(num_ranks)], seed=2),
        make_case(spec, [m] * num_ranks, picks="none", seed=3),
        make_case(spec, [m] * num_ranks, picks="one", seed=4),
        make_case(spec, [0] + [m] * (num_ranks - 1), seed=5),
        make_case(spec, [0] * num_ranks, seed=6),
        make_case(spec, [m - 1] * num_ranks, seed=7, idx=torch.int32),
    ]


def observed(recv: Received) -> dict[str, Tensor]:
    """What oracle.received gives for this rank, as it arrived: copies, flat over rows."""
    lead = recv.src_idx.dim()

    def flat(tensor: Tensor) -> Tensor:
        return tensor.clone().reshape(-1, *tensor.shape[lead:])

    rows = recv.x
    got = {"src_idx": flat(recv.src_idx), "counts": recv.num_tokens_per_expert}
    got["data"] = flat(rows.data if isinstance(rows, Quantized) else rows)
    if isinstance(rows, Quantized):
        got["scale"] = flat(rows.scale)
    if recv.topk_idx is not None:
        got["topk_idx"] = recv.topk_idx
    if recv.weights is not None:
        got["weights"] = flat(recv.weights)
    return got | {f"extras{i}": flat(extra) for i, extra in enumerate(recv.extras)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of NaN and of zeros with a sign."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return not a.numel() or torch.equal(*(_dense(t).view(-1).view(torch.uint8) for t in (a, b)))


def raw_rows(tensor: Tensor) -> Tensor:
    """[R, bytes]; torch 2.9 cannot pick rows of one-byte floats."""
    return _dense(tensor).view(tensor.shape[0], tensor[:1].numel() or 1).view(torch.uint8)


def _dense(tensor: Tensor) -> Tensor:
    """A copy without gaps, also of one element, whose strides ``contiguous()`` would leave as they are."""
    return tensor.clone(memory_format=torch.contiguous_format)


def check_received(case: Case, got: list[dict[str, Tensor]], *, x=None, weights=True, extras=True) -> None:
    """Bit for bit what the oracle says. Data and scales of a Padded layout's gaps are nobody's; other gaps are zero."""
    spec = case.spec
    wants = oracle.received(
        spec, case.topk, x or case.x, case.weights if weights else None, case.extras if extras else None
    )
    for rank, (mine, want) in enumerate(zip(got, wants, strict=True)):
        assert mine.keys() == want.keys(), (case.name, rank)
        num_rows = want["src_idx"].shape[0]
        for key in want:
            here = mine[key]
            if key != "counts":
                assert (mine["src_idx"][num_rows:] == -1).all(), (case.name, rank)
                here = here[:num_rows]
            if key in ("data", "scale") and isinstance(spec.layout, Padded):
                is_real = want["src_idx"] >= 0
                assert torch.equal(raw_rows(here)[is_real], raw_rows(want[key])[is_real]), (case.name, rank, key)
            else:
                assert same_bits(here, want[key]), (case.name, rank, key)


def row_weights(case: Case) -> list[Tensor]:
    """float32 [R] by rank: of its pick, or, where a row serves several (Compact), of the first of them at that rank."""
    wants = oracle.received(case.spec, case.topk, case.x, case.weights)
    if isinstance(case.spec.layout, Compact):
        return [want["weights"].sum(1) for want in wants]
    return [want["weights"] for want in wants]
