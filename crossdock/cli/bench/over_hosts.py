"""``crossdock bench --hosts 2x4``: two hops between hosts, beside plain TCP for as many bytes, and beside all-to-all.

Letters: T tokens of a rank, K top-k, P ranks, N hosts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from crossdock import cost
from crossdock.backends.nodes.places import place_dtype
from crossdock.buffer import Buffer
from crossdock.cli.bench.cases import Rows, bits, draw_outputs, draw_rows, parts_of
from crossdock.cli.bench.config import LAYOUTS, WIRES, with_room_for
from crossdock.cli.bench.exchange import AllToAll
from crossdock.cli.bench.measure import check_bits
from crossdock.cli.bench.sockets import PlainTcp
from crossdock.cli.hosts.network import bits_per_s, parse_grid, sent_bytes
from crossdock.cli.line import StartingLine
from crossdock.cli.world import Member
from crossdock.errors import ConfigError, CrossdockError
from crossdock.routing import group_limited_topk, uniform_load
from crossdock.spec import Spec, Topology

Counts = npt.NDArray[np.int64]
_COUNTED = 2
"""Calls whose bytes on the link are counted together."""


@dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """A run, in the command line's terms; ``tokens`` are those of a rank."""

    hosts: str
    rate: str
    rail: str
    tokens: int
    hidden: int
    experts: int
    topk: int
    topk_groups: int | None
    wire: str
    layout: str
    seed: int
    repeats: int

    def __str__(self) -> str:
        return (
            f"{self.hosts} ranks at {self.rate}, {self.tokens} tokens each, hidden {self.hidden}, top-{self.topk} of "
            f"{self.experts} experts, {self.wire}, {self.layout}, reduce=node, rail={self.rail}"
        )

    @property
    def topology(self) -> Topology:
        """Hosts as nodes; a rank's part of its host's link."""
        nodes, local = parse_grid(self.hosts)
        nic = bits_per_s(self.rate) / 8 / local
        return replace(Topology.grid(nodes=nodes, local=local), nic_bandwidth=nic)


@dataclass(frozen=True, kw_only=True)
class HostsJob:
    """What every rank is told."""

    config: HostsConfig
    loads: dict[str, npt.NDArray[np.int64]]
    """By name, picks [P * T, K]."""


@dataclass(frozen=True, kw_only=True)
class HostSample:
    """One operation on one rank: seconds of calls by each way, and bytes of a call that its host sends over its link.

    Args:
        num_bytes: that were counted on the link, headers of packets included.
        bound_bytes: the least: one row for each token and foreign node, with its metadata and places.
    """

    picks: str
    op: str
    ours_s: list[float]
    tcp_s: list[float]
    flat_s: list[float]
    num_bytes: float
    bound_bytes: int


def make_hosts_job(config: HostsConfig) -> HostsJob:
    """The picks of all ranks: uniform, and those of a group-limited gate if one was asked for.

    Raises:
        ConfigError: the arguments do not fit together.
    """
    topology = config.topology
    if topology.num_nodes < 2:
        raise ConfigError(f"hosts={config.hosts}: one host has no network; pass two at least, such as 2x4")
    if config.repeats < 1:
        raise ConfigError(f"repeats={config.repeats}; pass a positive number")
    num_tokens = topology.num_ranks * config.tokens
    generator = torch.Generator().manual_seed(config.seed)
    loads = {"uniform": uniform_load(num_tokens, config.experts, num_topk=config.topk, generator=generator)}
    if config.topk_groups is not None:
        scores = torch.randn(num_tokens, config.experts, generator=generator)
        name = f"{config.topk_groups} of {topology.num_nodes} groups"
        loads[name] = group_limited_topk(
            scores, config.topk, num_groups=topology.num_nodes, num_topk_groups=config.topk_groups
        ).topk_idx
    for picks in loads.values():
        _spec(config, picks).capacity(topology.num_ranks)
    return HostsJob(config=config, loads={name: picks.numpy() for name, picks in loads.items()})


def measure_over_hosts(member: Member, job: HostsJob) -> list[HostSample]:
    """Compares rows and sums with those of ``all_to_all_single``, counts bytes, then times. Collective.

    Raises:
        WrongRows: an operation gave other bits.
        CrossdockError: ranks found other nodes than there are.
    """
    samples: list[HostSample] = []
    for name, picks in job.loads.items():
        samples += _measure(member, job.config, name, torch.from_numpy(picks))
    return samples


def _measure(member: Member, config: HostsConfig, name: str, topk_idx: Tensor) -> list[HostSample]:
    topology, spec = Topology.of(dist.group.WORLD), _spec(config, topk_idx)
    if topology.num_nodes != config.topology.num_nodes:
        raise CrossdockError(f"ranks that share memory form {topology}, and hosts are {config.hosts}")
    by_rank = topk_idx.view(member.num_ranks, -1, config.topk)
    mine = by_rank[member.rank]
    _, x = draw_rows(spec, len(mine), seed=config.seed + member.rank)
    exchange = AllToAll(spec, member.num_ranks, node_size=topology.node_size)
    over_rail = rail_rows(by_rank, spec, topology)  # [P, N]
    node, local = divmod(member.rank, topology.node_size)
    out = over_rail[member.rank]
    home = over_rail.reshape(topology.num_nodes, topology.node_size, -1)[:, local, node]
    going, coming = rail_row_bytes(spec, topology)
    with (
        Buffer(None, spec, topology=topology, rail=config.rail, timeout_s=300) as buffer,  # type: ignore[arg-type]
        PlainTcp(topology, member.rank) as tcp,
    ):
        plan = buffer.dispatch(x, mine).plan
        arrived = exchange.dispatch(parts_of(x), mine)
        y = draw_outputs(spec, torch.Size((*arrived.parts[0].shape[:-1], spec.hidden)), seed=config.seed + member.rank)
        dispatches = lambda: buffer.dispatch(x, mine), lambda: exchange.dispatch(parts_of(x), mine)
        combines = lambda: buffer.combine(y, plan), lambda: exchange.combine(y, arrived.route)
        cases: list[tuple[str, Callable[[], Rows], Callable[[], Rows], Counts, Counts, int]] = [
            ("dispatch", *dispatches, out, home, going),
            ("combine", *combines, home, out, coming),
        ]
        samples: list[HostSample] = []
        for op, ours, flat, sent, received, row_bytes in cases:
            what = f"{op}, {name}, rank {member.rank}"
            check_bits(bits(ours(), spec), [part.clone() for part in bits(flat(), spec)], what=what)
            counted = _bytes_of(ours)
            host = over_rail[node * topology.node_size : (node + 1) * topology.node_size].sum()
            to_host = over_rail[:, node].sum()
            ways: list[list[float]] = [[], [], []]

            plain = partial(tcp.exchange, sent * row_bytes, received * row_bytes)
            calls: tuple[Callable[[], object], ...] = ours, plain, flat
            for i in range(config.repeats + 1):
                for way, call in zip(ways, calls, strict=True):
                    way.append(_timed(member.line, call))
                member.tell(len(samples) * (config.repeats + 1) + i, 2 * (config.repeats + 1))
            samples.append(
                HostSample(
                    picks=name, op=op, ours_s=ways[0][1:], tcp_s=ways[1][1:], flat_s=ways[2][1:], num_bytes=counted,
                    bound_bytes=int((host if op == "dispatch" else to_host) * row_bytes),
                )
            )  # fmt: skip
    return samples


def rail_rows(by_rank: Tensor, spec: Spec, topology: Topology) -> Counts:
    """[P, N]: rows that each rank sends to each node, one for each token with a pick there; none to its own.

    >>> spec = Spec(num_experts=4, num_topk=2, hidden=8, max_tokens=1)
    >>> rail_rows(torch.tensor([[[0, 1]], [[0, 3]]]), spec, Topology(num_ranks=2, scale_up=1)).tolist()
    [[0, 0], [1, 0]]
    """
    nodes = torch.where(by_rank < 0, -1, by_rank // (spec.num_experts // topology.num_nodes))
    rows = torch.stack([(nodes == node).any(2).sum(1) for node in range(topology.num_nodes)], dim=1)
    counts: Counts = rows.numpy()
    ranks = np.arange(topology.num_ranks)
    counts[ranks, ranks // topology.node_size] = 0
    return counts


def rail_row_bytes(spec: Spec, topology: Topology) -> tuple[int, int]:
    """Bytes of a row over the rail: of a dispatch, with source, picks and places; of a combine."""
    num_local = spec.num_local_experts(topology.num_ranks)
    blocks = topology.node_size * (num_local if spec.layout.per_pick else 1)
    ids = 4 * (1 + (0 if spec.layout.per_pick else spec.num_topk))
    going = spec.row_bytes() + ids + spec.num_topk * np.dtype(place_dtype(spec, blocks)).itemsize
    return going, spec.hidden * spec.combine_dtype.itemsize


def predicted_s(op: cost.Op, config: HostsConfig, picks: npt.NDArray[np.int64]) -> float:
    """What the cost model says of these picks over TCP."""
    spec, topology = _spec(config, torch.from_numpy(picks)), config.topology
    return cost.predict(op, spec, topology, cost.recorded_rows(picks, spec, topology), method=cost.SOCKETS).seconds


def _spec(config: HostsConfig, topk_idx: Tensor) -> Spec:
    spec = Spec(
        num_experts=config.experts, num_topk=config.topk, hidden=config.hidden, max_tokens=config.tokens,
        wire=WIRES[config.wire], layout=LAYOUTS[config.layout], reduce="node",
    )  # fmt: skip
    return with_room_for(topk_idx, spec, config.topology)


def _bytes_of(call: Callable[[], object]) -> float:
    """Bytes that this host sends over its link in a call, once all of its ranks have ended theirs."""
    dist.barrier()
    before = sent_bytes()
    dist.barrier()  # no rank of the host sends rows before the others have looked
    for _ in range(_COUNTED):
        call()
    dist.barrier()
    after = sent_bytes()
    dist.barrier()
    return (after - before) / _COUNTED


def _timed(line: StartingLine, call: Callable[[], object]) -> float:
    line.wait()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def slowest(ways: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    """p10, median and p90 of the rank with the largest median, in seconds."""
    chosen = max(ways, key=lambda way: float(np.median(way)))
    percentiles: npt.NDArray[np.float64] = np.percentile(chosen, (10, 50, 90))
    return percentiles
