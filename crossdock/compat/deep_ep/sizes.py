"""How many bytes Specs need, as far as a client can ask before there is a buffer: hints that grow with every argument.

Letters: R ranks, M most tokens of a rank, H hidden, K picks per token.
"""

from __future__ import annotations

from crossdock.arena import PAGE, Arena
from crossdock.layout import Compact, Expanded, Layout, Padded
from crossdock.spec import Spec, Topology

_LINE = 64
LITTLE_ROWS = 16384
"""The worst case is what a call of V2 begins with up to so many rows."""
_LOCAL_EXPERTS, _ALIGNMENT = 32, 128
"""Hints leave room for the rows between so many experts."""
MIN_TOPK = 16
"""Picks that hints leave room for where nobody has said how many there are."""


def bytes_of(spec: Spec, num_ranks: int) -> int:
    """At least what the Spec needs; never fewer for a larger hidden, as rows begin at multiples of their own size."""
    arena = Arena(spec, Topology(num_ranks=num_ranks))
    rows = [region.num_bytes for name, region in arena.regions.items() if name not in arena.control_words.regions]
    slack = 2 * _LINE * spec.hidden * spec.combine_dtype.itemsize + (len(rows) + 1) * PAGE
    return sum(rows) + slack


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
    """Of V2's calls in either layout, of as many rows as there is room for at first."""
    topk, most = num_topk or MIN_TOPK, num_ranks * num_tokens
    aligned = Expanded(alignment=_ALIGNMENT)
    worst = aligned.worst_case(
        num_ranks=num_ranks, max_tokens=num_tokens, num_topk=topk, num_local_experts=_LOCAL_EXPERTS
    )
    rows = rows_at_first(worst, num_ranks=num_ranks, num_tokens=num_tokens, num_topk=topk)
    experts = _LOCAL_EXPERTS * num_ranks
    return max(
        _of(layout, num_tokens, hidden, num_ranks, num_topk=topk, num_experts=experts)
        for layout in (Compact(capacity=most), Expanded(alignment=_ALIGNMENT, capacity=rows))
    )


def rows_at_first(worst: int, *, num_ranks: int, num_tokens: int, num_topk: int) -> int:
    """Rows of a slot that a call begins with where the host knows how many come: the worst case, if that is little.

    Else twice what comes when experts are picked alike, or tokens go to all ranks. A call that needs more makes room.

    >>> rows_at_first(4096, num_ranks=8, num_tokens=64, num_topk=8)
    4096
    >>> rows_at_first(8 * 4096 * 8, num_ranks=8, num_tokens=4096, num_topk=8)
    65536
    """
    return worst if worst <= LITTLE_ROWS else min(worst, 2 * max(num_ranks, num_topk) * num_tokens)


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
