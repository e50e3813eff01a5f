"""What a dispatch costs on a topology: bytes over links and through memory, and who makes copies for less.

Letters: K top-k, E experts, L local experts, P ranks.
"""

from __future__ import annotations

import math
from typing import Literal

from crossdock.spec import Spec, Topology

SM_BANDWIDTH = 59e9
"""Bytes per second that one SM of an H200 writes (1 to 32 of them, whatever the instruction)."""


def ranks_per_token(spec: Spec, num_ranks: int) -> float:
    """Ranks that a token visits, when its K picks are uniform: ``P * (1 - C(E - L, K) / C(E, K))``.

    >>> round(ranks_per_token(Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=1), 8), 2)
    5.29
    """
    others = spec.num_experts - spec.num_local_experts(num_ranks)
    return num_ranks * (1 - math.comb(others, spec.num_topk) / math.comb(spec.num_experts, spec.num_topk))


def link_bytes(spec: Spec, topology: Topology, *, expand: Literal["sender", "receiver"]) -> float:
    """Bytes of one token's rows that cross a link in a dispatch, with uniform picks; a rank's own do not."""
    num_ranks = topology.num_ranks
    each = spec.layout.per_pick and expand == "sender"
    rows = spec.num_topk if each else ranks_per_token(spec, num_ranks)
    return rows * (num_ranks - 1) / num_ranks * spec.row_bytes()


def dispatch_s(spec: Spec, topology: Topology, *, expand: Literal["sender", "receiver"]) -> float:
    """Seconds that one token's rows take in a dispatch: over the link, and then through memory where copies are made.

    What lands is written to memory in any case, so the link's time has it.
    """
    over_link = link_bytes(spec, topology, expand=expand) / topology.link_bandwidth
    if not spec.layout.per_pick or expand == "sender":
        return over_link
    copies = (
        ranks_per_token(spec, topology.num_ranks) + spec.num_topk
    ) * spec.row_bytes()  # read once, written K times
    return over_link + copies / topology.memory_bandwidth


def receiver_can_expand(spec: Spec) -> bool:
    """Whether a receiver can make the copies of landed rows, if there are any.

    Arrived rows need room where outputs are written: a row of data, and behind it its scales, in an output row.
    """
    out_bytes = spec.hidden * spec.combine_dtype.itemsize
    data_bytes = spec.hidden * spec.wire.dtype.itemsize
    fits = spec.row_bytes() <= out_bytes and data_bytes % 16 == 0 and out_bytes % 16 == 0
    return spec.layout.per_pick and fits


def cheaper_expand(spec: Spec, topology: Topology) -> Literal["sender", "receiver"]:
    """Who makes the copies of a row that several experts of a rank get.

    >>> from crossdock.layout import Expanded
    >>> spec = Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=4096, layout=Expanded(capacity=65536))
    >>> cheaper_expand(spec, Topology(num_ranks=8)), cheaper_expand(spec, Topology(num_ranks=64))
    ('receiver', 'sender')
    """
    if receiver_can_expand(spec) and dispatch_s(spec, topology, expand="receiver") < dispatch_s(
        spec, topology, expand="sender"
    ):
        return "receiver"
    return "sender"


def sms_to_fill(bandwidth: float) -> int:
    """Multiprocessors whose stores fill a link: 8 for 450 GB/s."""
    return math.ceil(bandwidth / SM_BANDWIDTH)
