"""Topology (the ranks as a mesh) and Spec (what all ranks of a buffer agree on). Frozen values; no hardware query.

Letters: T tokens, K top-k, H hidden, E experts, L local experts, P ranks, U ranks of a node, N nodes, M max_tokens,
C capacity in rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from crossdock.errors import ConfigError
from crossdock.fields import is_positive, set_integer
from crossdock.layout import Compact, Expanded, Layout, Padded
from crossdock.wire import Bf16, Wire

MAX_COUNT = 2**24 - 1
"""The largest row count that a count word can hold: 24 bits."""
MAX_DEFAULT_BYTES = 2 * 2**30
"""The worst case is the default capacity while the rows of one receive slot take at most this many bytes."""
MAX_SLOTS = 6
"""The largest ``num_slots``; a begin word has three bits for a slot, and one of their values means *pushed*."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Ranks as a mesh, scale-out x scale-up: rank = node * scale_up + local index.

    Args:
        num_ranks: P, the ranks of the group.
        scale_up: U, the ranks of one scale-up domain (ranks whose memory a kernel can load from and store to); must
            divide ``num_ranks``. None: one domain of all ranks.
        link_bandwidth: bytes per second of a rank's scale-up links, in each direction. The default is that of
            fourth-generation NVLink (H100, H200: 900 GB/s for both directions together, NVIDIA's data sheets).
        memory_bandwidth: bytes per second of a rank's own memory, reads and writes together. The default was measured
            on an H200 (docs/performance.md).
        nic_bandwidth: bytes per second of a rank's part of its node's network cards, in each direction. The default is
            one card of 400 Gbit/s for each GPU.

    Raises:
        ConfigError: a bandwidth or a number of ranks is not positive, or domains would differ in size.

    >>> Topology(num_ranks=128, scale_up=8).num_nodes
    16
    """

    num_ranks: int
    scale_up: int | None = None
    link_bandwidth: float = 450e9
    memory_bandwidth: float = 4.1e12
    nic_bandwidth: float = 50e9

    def __post_init__(self) -> None:
        for name in ("link_bandwidth", "memory_bandwidth", "nic_bandwidth"):
            value = getattr(self, name)
            if not (is_positive(value) and value < math.inf):
                raise ConfigError(f"{name}={value!r} bytes per second; pass a positive, finite number")
        set_integer(self, "num_ranks", "; a group has at least one rank", least=1)
        if self.scale_up is not None:
            set_integer(self, "scale_up", "; pass the ranks of a scale-up domain, or None for one of all", least=1)
        if self.scale_up is not None and self.num_ranks % self.scale_up:
            raise ConfigError(
                f"num_ranks={self.num_ranks} is not divisible by scale_up={self.scale_up}; "
                f"all scale-up domains must have the same number of ranks"
            )

    @staticmethod
    def grid(*, nodes: int, local: int) -> Topology:
        """N nodes of U ranks each; rank = node * local + local index.

        >>> Topology.grid(nodes=2, local=4).num_nodes
        2
        """
        if nodes < 1 or local < 1:
            raise ConfigError(f"nodes={nodes}, local={local}; pass positive numbers of nodes and of ranks of a node")
        return Topology(num_ranks=nodes * local, scale_up=local)

    @staticmethod
    def flat(num_ranks: int) -> Topology:
        """One scale-up domain of all ranks."""
        return Topology(num_ranks=num_ranks)

    @staticmethod
    def of(group: Any) -> Topology:
        """The ranks of a group as nodes, each a set of ranks that can map each other's memory. Collective.

        Found by trying: each rank opens what the others have left in their shared memory. To be told to ``Buffer``,
        which without a topology takes all ranks for one domain.

        Args:
            group: as for ``Buffer``, of processes on CPUs; of threads it is one domain.

        Raises:
            ConfigError: nodes would differ in size, or their ranks do not follow each other; the list says who sees
                whom.
        """
        from crossdock.transport import base, domains  # noqa: PLC0415 - it is made of what lies above

        return domains.find(base.group_of(group))

    @property
    def node_size(self) -> int:
        """U, the ranks of one scale-up domain."""
        return self.scale_up or self.num_ranks

    @property
    def num_nodes(self) -> int:
        """N, the number of scale-up domains."""
        return self.num_ranks // self.node_size


def check_experts(num_experts: int, num_ranks: int) -> None:
    """Raises ConfigError unless every rank holds the same number of experts."""
    if num_experts % num_ranks:
        padded = -(-num_experts // num_ranks) * num_ranks
        raise ConfigError(
            f"num_experts={num_experts} is not divisible by num_ranks={num_ranks}; pass a multiple of {num_ranks}: "
            f"{padded}, with {padded - num_experts} experts that no token picks, or copies of popular ones "
            f"(crossdock.nn.Placement)"
        )


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What all ranks of a buffer agree on; if Specs differ, ``Buffer`` raises the same ConfigError on all ranks.

    Args:
        num_experts: E, the experts of all ranks; rank r holds experts ``r * L .. (r + 1) * L - 1`` with L = E / P.
        num_topk: K, picks per token.
        hidden: H, values per row.
        max_tokens: M, the most tokens that a rank passes to one call; M * K is at most 2**24 - 1.
        wire: row format of a dispatch.
        layout: how received rows lie in memory.
        reduce: where a token's rows are summed. ``"token"``: every row returns, and the token's owner sums the rows in
            the order of picks. ``"rank"``: each rank first sums its own rows of the token in the order of picks and
            casts the sum once to the combine format; one row per rank returns, and the owner sums these in the order
            of ranks. ``"node"``: each node (``Topology``) first sums the token's rows that are there, in the order of
            picks (Compact: of ranks), and casts the sum once; the owner sums these in the order of nodes. All sums are
            float32, with one cast at the end.
        combine_wire: row format of a combine and of its result, an unquantized one. None: ``wire``, or Bf16() if
            ``wire`` is a quantised one, such as Fp8 or Opaque.
        extra_bytes: bytes per token for opaque tensors that travel with a row (``extras=``).
        num_slots: receive slots, used in turn, 1 to 6; also the most calls that may be started and not yet waited for.

    Raises:
        ConfigError: a field is out of range, or fields do not fit together.

    >>> Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=4096).num_local_experts(8)
    32
    """

    num_experts: int
    num_topk: int
    hidden: int
    max_tokens: int
    wire: Wire = field(default_factory=Bf16)
    layout: Layout = field(default_factory=Compact)
    reduce: Literal["token", "rank", "node"] = "token"
    combine_wire: Wire | None = None
    extra_bytes: int = 0
    num_slots: int = 2

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_topk", "hidden", "max_tokens"):
            set_integer(self, name, "; pass a positive integer", least=1)
        self._check_kinds()
        if self.num_topk > self.num_experts:
            raise ConfigError(
                f"num_topk={self.num_topk} picks of num_experts={self.num_experts}; picks are distinct: pass at most "
                f"{self.num_experts}"
            )
        if self.max_tokens * self.num_topk > MAX_COUNT:
            raise ConfigError(
                f"max_tokens * num_topk = {self.max_tokens * self.num_topk} rows of one rank; a count has 24 bits, "
                f"so at most {MAX_COUNT}: pass fewer tokens per call"
            )
        if self.reduce not in ("token", "rank", "node"):
            raise ConfigError(f"reduce={self.reduce!r} is not a place to sum at; pass 'token', 'rank' or 'node'")
        if self.combine_wire is not None and not self.combine_wire.is_unquantized:
            raise ConfigError(
                f"combine_wire={self.combine_wire} cannot be summed; pass an unquantized one: Bf16(), Fp16() or Fp32()"
            )
        set_integer(self, "extra_bytes", "; pass 0 or the bytes that travel with each token", least=0)
        set_integer(self, "num_slots", f" receive slots; pass 1 to {MAX_SLOTS}", least=1, most=MAX_SLOTS)
        self.wire.check_hidden(self.hidden)

    @property
    def combine_dtype(self) -> torch.dtype:
        """Dtype of the experts' outputs and of the combined result."""
        if self.combine_wire is not None:
            return self.combine_wire.dtype
        return self.wire.dtype if self.wire.is_unquantized else torch.bfloat16

    @property
    def ranks_sum_picks(self) -> bool:
        """Whether a rank sums several rows of a token before one returns; it then needs to know which rows they are."""
        return self.reduce == "rank" and self.layout.per_pick

    @property
    def is_staged(self) -> bool:
        """Whether rows arrive once per rank, and the receiver expands them into a tensor of its caller's."""
        return isinstance(self.layout, Expanded) and self.layout.staged

    def num_local_experts(self, num_ranks: int) -> int:
        """L, the experts of one rank. Raises ConfigError if ``num_ranks`` does not divide E."""
        check_experts(self.num_experts, num_ranks)
        return self.num_experts // num_ranks

    def row_bytes(self) -> int:
        """Bytes of a dispatched row: data and scales, without metadata."""
        num_scales = self.wire.num_scales(self.hidden)
        return self.wire.data_bytes(self.hidden) + num_scales * self.wire.scale_dtype.itemsize

    def capacity(self, num_ranks: int) -> int:
        """C, rows of a receive slot (Padded: of one expert): the layout's capacity, limited to the worst case.

        Where rows are staged (``Expanded(staged=True)``): rows of the tensor with ``rows="capacity"``.

        A layout without a capacity gets the worst case.

        Raises:
            ConfigError: the layout has no capacity, and the worst case exceeds ``MAX_DEFAULT_BYTES``.
        """
        worst = self._worst_case(num_ranks)
        if self.layout.capacity is not None or self.is_staged:
            return min(self.layout.capacity or worst, worst)
        num_bytes = worst * self._segments(num_ranks) * self.row_bytes()
        if num_bytes > MAX_DEFAULT_BYTES:
            raise ConfigError(
                f"{self.layout} has a worst case of {worst} rows{self._per_expert()}, {num_bytes / 2**30:.1f} GiB for "
                f"each receive slot; the default stops at {MAX_DEFAULT_BYTES / 2**30:.0f} GiB: pass capacity= with the "
                f"rows you want room for (a call that needs more raises CapacityError on all ranks), or "
                f"capacity={worst} to have the worst case all the same{self._or_staged()}"
            )
        return worst

    def num_slot_rows(self, num_ranks: int) -> int:
        """Rows of one receive slot, all segments together."""
        return self.capacity(num_ranks) * self._segments(num_ranks)

    def most_rows(self, num_ranks: int) -> int:
        """Rows that a call may bring to a rank: those of a slot; where they are staged, any routing's."""
        return self._worst_case(num_ranks) if self.is_staged else self.num_slot_rows(num_ranks)

    def num_counts(self, topology: Topology) -> int:
        """W, the counts that a rank sends to each rank that has mapped its memory: E per expert, and P per rank."""
        return self.num_experts + topology.num_ranks

    def num_node_counts(self, topology: Topology) -> int:
        """W, the counts that a rank tells another node: of its rows there per expert, per rank, and over the rail."""
        return self.num_experts // topology.num_nodes + topology.node_size + 1

    def differences(self, other: Spec) -> list[str]:
        """The fields in which the Specs differ, each as ``name: mine != theirs``; empty if they are equal."""
        pairs: list[tuple[str, Any, Any]] = [
            (f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        ]
        return [f"{name}: {mine!r} != {theirs!r}" for name, mine, theirs in pairs if mine != theirs]

    def _check_kinds(self) -> None:
        kinds: list[tuple[str, object, type, str]] = [
            ("wire", self.wire, Wire, "Bf16() or Fp8(block=128)"),
            ("combine_wire", Bf16() if self.combine_wire is None else self.combine_wire, Wire, "Fp32(), or None"),
            ("layout", self.layout, Layout, "Compact(), Expanded() or Padded()"),
        ]
        for name, value, kind, examples in kinds:
            if not isinstance(value, kind):
                raise ConfigError(f"{name}={value!r} is no {kind.__name__}; pass one such as {examples}")

    def _worst_case(self, num_ranks: int) -> int:
        return self.layout.worst_case(
            num_ranks=num_ranks,
            max_tokens=self.max_tokens,
            num_topk=self.num_topk,
            num_local_experts=self.num_local_experts(num_ranks),
        )

    def _or_staged(self) -> str:
        """What Expanded may do besides."""
        is_expanded = isinstance(self.layout, Expanded)
        return ", or staged=True to have rows in a tensor of your own, exactly as many as came" if is_expanded else ""

    def _segments(self, num_ranks: int) -> int:
        return self.num_local_experts(num_ranks) if isinstance(self.layout, Padded) else 1

    def _per_expert(self) -> str:
        return " per expert" if isinstance(self.layout, Padded) else ""
