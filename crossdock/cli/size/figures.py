"""What ``crossdock size`` is asked, and its answer, as values.

Letters: P ranks, N nodes, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crossdock import cost
from crossdock.arena import Arena, Control
from crossdock.cli.bench.config import WIRES
from crossdock.cli.load.recording import read
from crossdock.errors import ConfigError
from crossdock.layout import Compact, Expanded, Layout, Padded
from crossdock.spec import Spec, Topology
from crossdock.transport.rail import Box

LAYOUTS = ("compact", "expanded", "padded")
_EXPERTS = 256


@dataclass(frozen=True, kw_only=True)
class Question:
    """The command line's terms; rates are GB/s in each direction, ``tokens`` those of a rank."""

    ranks: tuple[int, ...]
    node_size: int
    tokens: int
    hidden: int
    experts: int | None
    topk: int
    wire: str
    layout: str | None
    topk_groups: int | None
    groups: int | None
    load: Path | None
    method: str
    link: float
    nic: float
    memory: float
    num_sms: int | None
    room: float

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens of each rank, hidden {self.hidden}, top-{self.topk}, {self.wire}, "
            f"{self.layout_name}; nodes of {self.node_size}, {self.link:g} GB/s within and {self.nic:g} between them; "
            f"{cost.METHODS[self.method].name}"
        )

    @property
    def layout_name(self) -> str:
        """The layout, also where none was named."""
        return self.layout or ("padded" if cost.METHODS[self.method].per_pick else "compact")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A routing on a number of ranks."""

    picks: str
    """How experts are picked: ``uniform``, ``4 of 8 groups``, ``recorded``."""
    spec: Spec
    topology: Topology
    rows: cost.Rows
    dispatch: cost.Prediction
    combine: cost.Prediction
    one_hop: cost.Prediction
    """A dispatch whose rows go to each rank at once, over the network too."""
    chunks: cost.Chunks | None
    sms: tuple[int, int]
    """That a dispatch and a combine use."""
    memory_bytes: int
    """Of each rank: its segment, and the boxes of its rail."""


def answer(question: Question) -> list[Size]:
    """Sizes in the order of ranks; for each the uniform routing first.

    Raises:
        ConfigError: sizes do not fit together, or the recording cannot be read.
    """
    if (
        question.node_size < 1
        or not 1 <= question.room < math.inf
        or (question.num_sms is not None and question.num_sms < 1)
    ):
        raise ConfigError(
            f"node_size={question.node_size}, num_sms={question.num_sms}, room={question.room}; pass positive numbers, "
            f"and room for the mean load at least"
        )
    if question.groups is not None and question.topk_groups is None:
        raise ConfigError(f"groups={question.groups} limits nothing alone; pass --topk-groups with it")
    return [
        _size(question, num_ranks, picks, rows)
        for num_ranks in question.ranks
        for picks, rows in _routings(question, num_ranks)
    ]


def as_values(question: Question, size: Size) -> dict[str, Any]:
    """A size as one flat JSON object; times in microseconds."""

    def of(call: cost.Prediction) -> dict[str, Any]:
        hops = {f"{hop.name}_us": hop.seconds * 1e6 for hop in call.hops}
        moved = {f"{hop.name}_bytes": hop.num_bytes for hop in call.hops}
        return {
            "us": call.seconds * 1e6,
            "bottleneck": call.bottleneck,
            "fixed_us": call.fixed_s * 1e6,
            **hops,
            **moved,
        }

    asked = {name: getattr(question, name) for name in Question.__dataclass_fields__ if name not in ("ranks", "load")}
    return {
        **asked,
        "ranks": size.topology.num_ranks,
        "nodes": size.topology.num_nodes,
        "experts": size.spec.num_experts,
        "picks": size.picks,
        "nodes_per_token": size.rows.nodes,
        "ranks_per_token": size.rows.ranks,
        "skew_out": size.rows.skew_out,
        "skew_up": size.rows.skew_up,
        "dispatch": of(size.dispatch),
        "combine": of(size.combine),
        "one_hop_dispatch_us": size.one_hop.seconds * 1e6,
        "chunks": None if size.chunks is None else size.chunks.number,
        "sms": size.sms,
        "memory_bytes": size.memory_bytes,
    }


def make_topology(question: Question, num_ranks: int) -> Topology:
    """Nodes of equal size; few ranks are one node."""
    return Topology(
        num_ranks=num_ranks,
        scale_up=min(num_ranks, question.node_size),
        link_bandwidth=question.link * 1e9,
        memory_bandwidth=question.memory * 1e9,
        nic_bandwidth=question.nic * 1e9,
    )


def make_spec(question: Question, num_ranks: int) -> Spec:
    """The Spec of such a buffer, with sums where the method makes them; its capacity is chosen later."""
    layouts: dict[str, Layout] = {"compact": Compact(), "expanded": Expanded(), "padded": Padded()}
    layout = layouts[question.layout_name]
    return Spec(
        num_experts=max(_EXPERTS, num_ranks) if question.experts is None else question.experts,
        num_topk=question.topk,
        hidden=question.hidden,
        max_tokens=question.tokens,
        wire=WIRES[question.wire],
        layout=layout,
        reduce="token" if cost.METHODS[question.method].num_hops == 1 else "node",
    )


def memory_bytes(spec: Spec, topology: Topology, rows: cost.Rows, *, room: float) -> int:
    """Bytes of a rank: its segment with room for so many mean loads, and between nodes the boxes of its rail."""
    is_over_rail = topology.num_nodes > 1
    mean = {
        Compact: spec.max_tokens * rows.ranks,
        Expanded: spec.max_tokens * spec.num_topk,
        Padded: topology.num_ranks * spec.max_tokens * spec.num_topk / spec.num_experts,
    }[type(spec.layout)]
    spec = replace(spec, layout=replace(spec.layout, capacity=max(1, round(room * mean))))
    control = Control(
        topology=topology, max_experts=spec.num_experts, max_in_flight=spec.num_slots, over_rail=is_over_rail
    )
    box = Box()
    boxes = 2 * topology.num_nodes * box.num_chunks * box.chunk_bytes if is_over_rail else 0
    return Arena(spec, topology, control).num_bytes + boxes


def _routings(question: Question, num_ranks: int) -> Iterator[tuple[str, cost.Rows]]:
    spec, topology = make_spec(question, num_ranks), make_topology(question, num_ranks)
    yield "uniform", cost.uniform_rows(spec, topology)
    limit, groups = question.topk_groups, question.groups or topology.num_nodes
    if limit is not None and limit < groups:
        rows = cost.group_limited_rows(spec, topology, num_topk_groups=limit, num_groups=groups)
        yield f"{limit} of {groups} groups", rows
    if question.load is not None:
        recording = read(question.load, num_experts=spec.num_experts, num_ranks=num_ranks)
        spec = replace(spec, num_topk=recording.picks.shape[2])
        yield "recorded", cost.recorded_rows(recording.picks, spec, topology)


def _size(question: Question, num_ranks: int, picks: str, rows: cost.Rows) -> Size:
    spec, topology = make_spec(question, num_ranks), make_topology(question, num_ranks)
    method = cost.METHODS[question.method]
    wanted = cost.sms_to_store(topology.link_bandwidth), cost.sms_to_load(topology.link_bandwidth)
    sms = wanted if question.num_sms is None else (question.num_sms, question.num_sms)
    dispatch = cost.predict("dispatch", spec, topology, rows, method=method, num_sms=sms[0])
    combine = cost.predict("combine", spec, topology, rows, method=method, num_sms=sms[1])
    one_hop = replace(method, num_hops=1)
    return Size(
        picks=picks,
        spec=spec,
        topology=topology,
        rows=rows,
        dispatch=dispatch,
        combine=combine,
        one_hop=cost.predict("dispatch", spec, topology, rows, method=one_hop, num_sms=sms[0]),
        chunks=cost.best_chunks(dispatch) if method.num_hops == 2 else None,
        sms=sms,
        memory_bytes=memory_bytes(spec, topology, rows, room=question.room),
    )
