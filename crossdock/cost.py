"""Cost model of a dispatch: bytes over links, seconds, and whether sender or receiver should expand rows.

Letters: K top-k, E experts, L local experts, P ranks. Picks are assumed to be uniform and distinct.
"""

from __future__ import annotations

import math
from typing import Literal

from crossdock.spec import Spec, Topology

SM_BANDWIDTH = 59e9
"""Bytes per second that one SM of an H200 stores, measured with 1 to 32 SMs; the same for every store instruction."""


def ranks_per_token(spec: Spec, num_ranks: int) -> float:
    """Expected number of ranks that hold one of a token's K picks: ``P * (1 - C(E - L, K) / C(E, K))``.

    >>> round(ranks_per_token(Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=1), 8), 2)
    5.29
    """
    others = spec.num_experts - spec.num_local_experts(num_ranks)
    return num_ranks * (1 - math.comb(others, spec.num_topk) / math.comb(spec.num_experts, spec.num_topk))


def link_bytes(spec: Spec, topology: Topology, *, expand: Literal["sender", "receiver"]) -> float:
    """Expected bytes per token that cross a link in a dispatch: K rows, or one per rank, less those of the own rank."""
    num_ranks = topology.num_ranks
    each = spec.layout.per_pick and expand == "sender"
    rows = spec.num_topk if each else ranks_per_token(spec, num_ranks)
    return rows * (num_ranks - 1) / num_ranks * spec.row_bytes()


def dispatch_s(spec: Spec, topology: Topology, *, expand: Literal["sender", "receiver"]) -> float:
    """Seconds per token of a dispatch: link time, plus memory time of the copies if the receiver expands.

    The write at the receiver is part of the link time. A receiver that expands reads each arrived row once and writes K
    rows per token.
    """
    over_link = link_bytes(spec, topology, expand=expand) / topology.link_bandwidth
    if not spec.layout.per_pick or expand == "sender":
        return over_link
    copies = (
        ranks_per_token(spec, topology.num_ranks) + spec.num_topk
    ) * spec.row_bytes()  # read once, written K times
    return over_link + copies / topology.memory_bandwidth


def receiver_can_expand(spec: Spec) -> bool:
    """Whether a receiver can expand arrived rows; False for Compact, which has no copies.

    Rows are staged in the ``outputs`` region: data and scales of a row must fit in one output row, and both sizes be
    multiples of 16 bytes.
    """
    out_bytes = spec.hidden * spec.combine_dtype.itemsize
    data_bytes = spec.wire.data_bytes(spec.hidden)
    fits = spec.row_bytes() <= out_bytes and data_bytes % 16 == 0 and out_bytes % 16 == 0
    return spec.layout.per_pick and fits


def cheaper_expand(spec: Spec, topology: Topology) -> Literal["sender", "receiver"]:
    """Who copies a row for each expert of a rank that picked it: whichever takes less time by ``dispatch_s``.

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
    """SMs whose stores fill a link of that many bytes per second; 8 for 450 GB/s."""
    return math.ceil(bandwidth / SM_BANDWIDTH)
