"""How many bytes Specs need, as far as a client can ask before there is a buffer: hints that grow with every argument.

Letters: R ranks, M most tokens of a rank, H hidden, K picks per token.
"""

from __future__ import annotations

from crossdock.arena import PAGE, Arena
from crossdock.layout import Compact, Expanded, Layout, Padded
from crossdock.spec import Spec, Topology

_LINE = 64
MIN_TOPK = 16
"""Picks that hints leave room for where nobody has said how many there are."""


def bytes_of(spec: Spec, num_ranks: int) -> int:
    """At least what the Spec needs; never fewer for a larger hidden, as rows begin at multiples of their own size."""
    regions = list(Arena(spec, Topology(num_ranks=num_ranks)).regions.values())
    rows = [region.num_bytes for region in regions if region.name not in _CONTROL]
    slack = 2 * _LINE * spec.hidden * spec.combine_dtype.itemsize + (len(rows) + 1) * PAGE
    return sum(rows) + slack


_CONTROL = {"words", "arrived", "aborts", "closed", "masks", "restarts", "reasons", "counts"}


def low_latency(num_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Of V1's low-latency calls: [L, R * M, H] at each rank, twice."""
    num_local = -(-num_experts // num_ranks)
    return _of(
        Padded(capacity=num_ranks * num_tokens),
        num_tokens,
        hidden,
        num_ranks,
        num_experts=num_local * num_ranks,
        num_topk=min(MIN_TOPK, num_experts),
        num_slots=2,
    )


def normal(num_tokens: int, hidden: int, num_ranks: int) -> int:
    """Of V1's normal calls, where each rank brings so many tokens at most."""
    return _of(Compact(capacity=num_ranks * num_tokens), num_tokens, hidden, num_ranks)


def elastic(num_tokens: int, hidden: int, num_ranks: int, num_topk: int) -> int:
    """Of V2's calls in either layout, of as many rows as Compact has at most; a call of more makes room by itself."""
    topk = num_topk or MIN_TOPK
    capacity = num_ranks * num_tokens
    return max(
        _of(layout, num_tokens, hidden, num_ranks, num_topk=topk)
        for layout in (Compact(capacity=capacity), Expanded(capacity=capacity))
    )


def _of(
    layout: Layout,
    num_tokens: int,
    hidden: int,
    num_ranks: int,
    *,
    num_experts: int | None = None,
    num_topk: int = MIN_TOPK,
    num_slots: int = 1,
) -> int:
    experts = num_experts or num_ranks * num_topk
    reduce_at_rank = not isinstance(layout, Padded)
    spec = Spec(
        num_experts=experts,
        num_topk=min(num_topk, experts),
        hidden=hidden,
        max_tokens=max(1, num_tokens),
        layout=layout,
        reduce="rank" if reduce_at_rank else "token",
        num_slots=num_slots,
    )
    return bytes_of(spec, num_ranks)
