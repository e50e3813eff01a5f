"""What a dispatch or a combine takes: bytes and seconds of each hop, and which of them bounds it.

Bytes are rows counted (``Rows``) times the bytes of one; metadata, under 1 % of a large model's row, are left out.
Within a hop the link and the SMs that serve it wait for each other in part: ``hypot(link, SMs)`` is what 2 to 132 SMs
did between two H200 and within one. Hops overlap, chunk by chunk, so the slower one counts, and what a call costs
beside its bytes is added.

Letters: K top-k, M max_tokens, P ranks, U ranks of a node, N nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from crossdock.cost.methods import SM_BANDWIDTH, TWO_HOPS, Method
from crossdock.cost.rows import Rows, uniform_rows
from crossdock.spec import Spec, Topology

Op = Literal["dispatch", "combine"]
Expand = Literal["sender", "receiver"]


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One axis of a call, of the busiest rank.

    Args:
        name: ``"scale_out"`` over the rail, ``"scale_up"`` within the node, ``"memory"`` of a GPU that all ranks share.
        num_bytes: over the link, in each direction.
        link_s: seconds of these bytes at the rate that the method reaches.
        sms_s: seconds of the rows that SMs store or load for them; 0 where nobody said how many there are.
        copies_s: seconds of the copies that a receiver makes of its rows.
    """

    name: str
    num_bytes: float
    link_s: float
    sms_s: float = 0.0
    copies_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the hop alone."""
        return math.hypot(self.link_s, self.sms_s) + self.copies_s

    @property
    def bound(self) -> str:
        """What it waits for: ``NIC``, ``NVLink``, ``SMs`` or ``memory``."""
        link = "NIC" if self.name == "scale_out" else "memory" if self.name == "memory" else "NVLink"
        return max((self.link_s, link), (self.sms_s, "SMs"), (self.copies_s, "memory"))[1]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A call: its hops, and seconds beside its bytes."""

    op: Op
    hops: tuple[Hop, ...]
    fixed_s: float

    @property
    def seconds(self) -> float:
        """Of the whole call."""
        return max(hop.seconds for hop in self.hops) + self.fixed_s

    @property
    def bottleneck(self) -> str:
        """``NIC``, ``NVLink``, ``memory`` or ``SMs``; ``fixed`` where bytes are less than half of the time."""
        slowest = max(self.hops, key=lambda hop: hop.seconds)
        return "fixed" if self.fixed_s > slowest.seconds else slowest.bound

    def of(self, name: str) -> Hop | None:
        """The hop of that name, if there is one."""
        return next((hop for hop in self.hops if hop.name == name), None)


def predict(
    op: Op,
    spec: Spec,
    topology: Topology,
    rows: Rows | None = None,
    *,
    method: Method = TWO_HOPS,
    num_sms: int | None = None,
    expand: Expand | None = None,
) -> Prediction:
    """A call in which each rank has ``max_tokens`` tokens.

    Args:
        op: ``"dispatch"``, or ``"combine"`` of outputs that the owner pulls.
        spec: row formats, layout, and where sums are made.
        topology: nodes, and rates of their links.
        rows: of the routing; None: all picks are equally likely.
        method: what moves rows.
        num_sms: SMs that a rank's call uses; None: as many as it takes.
        expand: who copies a row for several experts of a rank; None: whoever takes less time (``cheaper_expand``).

    >>> spec = Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=4096, reduce="node")
    >>> call = predict("dispatch", spec, Topology.grid(nodes=2, local=8))
    >>> f"{call.seconds * 1e6:.0f} us, {call.bottleneck}, {call.of('scale_out').num_bytes / 1e6:.1f} MB over the rail"
    '1350 us, NIC, 58.5 MB over the rail'
    """
    rows = rows or uniform_rows(spec, topology)
    if op == "dispatch" and spec.layout.per_pick and not method.per_pick and expand is None:
        expand = cheaper_expand(spec, topology, method=method)
    is_copied = op == "dispatch" and spec.layout.per_pick and expand == "receiver"
    once_per_rank = not spec.layout.per_pick or is_copied or (op == "combine" and spec.reduce != "token")
    arriving = rows.ranks if once_per_rank and not method.per_pick else rows.picks
    each = spec.max_tokens * (
        spec.row_bytes() if op == "dispatch" else spec.hidden * spec.combine_dtype.itemsize
    )  # bytes of all tokens, a row of each
    foreign, away = 1 - 1 / topology.num_nodes, 1 - 1 / topology.node_size
    over_rail = (rows.nodes if method.num_hops == 2 else arriving) * foreign * rows.skew_out
    over_link = arriving * away * rows.skew_up * (1 if method.num_hops == 2 else 1 - foreign)

    bandwidth = SM_BANDWIDTH if op == "dispatch" else method.load_bandwidth
    sms_s = each * arriving * rows.skew_up / (num_sms * bandwidth) if num_sms else 0.0
    memory = topology.memory_bandwidth * method.memory_share / (topology.num_ranks if method.through_memory else 1)
    copies_s = 0.0
    if is_copied:  # staged rows are read once, and written for each pick
        by_sms = each * rows.picks / (num_sms * SM_BANDWIDTH) if num_sms else 0.0
        copies_s = math.hypot(each * (rows.ranks + rows.picks) / memory, by_sms)
    if method.through_memory:  # a row is read once and written to each rank, or the other way round
        name, num_bytes = "memory", each * (1 + arriving * rows.skew_up)
        link_s = num_bytes / memory
    else:
        name, num_bytes = "scale_up", each * over_link
        link_s = num_bytes / (topology.link_bandwidth * method.link_share)
    hops = [Hop(name=name, num_bytes=num_bytes, link_s=link_s, sms_s=sms_s, copies_s=copies_s)]
    if topology.num_nodes > 1:
        rail_s = each * over_rail / (topology.nic_bandwidth * method.nic_share)
        hops.insert(0, Hop(name="scale_out", num_bytes=each * over_rail, link_s=rail_s))
    fixed_s = method.fixed_s + (method.rail_s if topology.num_nodes > 1 else 0.0)
    return Prediction(op=op, hops=tuple(hops), fixed_s=fixed_s)


def receiver_can_expand(spec: Spec) -> bool:
    """Whether a receiver can expand arrived rows; False for Compact, which has no copies.

    Rows of ``Expanded(staged=True)`` have memory for that. Others are staged in the ``outputs`` region: data and scales
    of a row must fit in one output row, and both sizes be multiples of 16 bytes.
    """
    if spec.is_staged:
        return True
    out_bytes = spec.hidden * spec.combine_dtype.itemsize
    data_bytes = spec.wire.data_bytes(spec.hidden)
    fits = spec.row_bytes() <= out_bytes and data_bytes % 16 == 0 and out_bytes % 16 == 0
    return spec.layout.per_pick and fits


def cheaper_expand(spec: Spec, topology: Topology, *, method: Method = TWO_HOPS, more_s: float = 0.0) -> Expand:
    """Who copies a row for each expert of a rank that picked it: whoever takes less time in a dispatch.

    Args:
        more_s: seconds that the receiver's copies take beside their bytes.

    >>> from crossdock.layout import Expanded
    >>> spec = Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=4096, layout=Expanded(capacity=65536))
    >>> cheaper_expand(spec, Topology(num_ranks=8)), cheaper_expand(spec, Topology(num_ranks=64))
    ('receiver', 'sender')
    """
    if spec.is_staged or not receiver_can_expand(spec):
        return "receiver" if spec.is_staged else "sender"
    by_receiver, by_sender = (
        predict("dispatch", spec, topology, method=method, expand=who).seconds for who in ("receiver", "sender")
    )
    return "receiver" if by_receiver + more_s < by_sender else "sender"


def link_bytes(spec: Spec, topology: Topology, *, expand: Expand) -> float:
    """Expected bytes per token over a rank's scale-up links in a dispatch: K rows, or one per rank, less its own."""
    hop = predict("dispatch", spec, topology, expand=expand).of("scale_up")
    assert hop is not None
    return hop.num_bytes / spec.max_tokens
