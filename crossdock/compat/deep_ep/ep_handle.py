"""V2's ``EPHandle``: a routing that was dispatched, whose tables are made when somebody reads them.

Letters: R ranks, L local experts, T tokens here, K picks per token, M the most tokens of a rank, N tokens that came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from crossdock.backends.base import PlanTensors
from crossdock.buffer import Buffer
from crossdock.compat.deep_ep import tables
from crossdock.plan import Plan
from crossdock.received import Received


@dataclass(eq=False)
class Routed:
    """The native side of a handle.

    Args:
        recv: what came, without rows.
        num_tokens: M, as the call had it.
        asks_host: whether the host knows how many rows came.
    """

    buffer: Buffer
    recv: Received
    num_tokens: int
    alignment: int
    is_expanded: bool
    asks_host: bool
    plans: dict[Buffer, Plan] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """Of the Buffer that made it."""
        return self.recv.plan

    def plan_in(self, buffer: Buffer) -> Plan:
        """The plan for calls of a Buffer that carries rows of another format."""
        if buffer is self.buffer:
            return self.recv.plan
        plan = self.plans.get(buffer)
        if plan is None:
            plan = self.plans[buffer] = buffer.remake_plan(self._tensors())
        return plan

    def _tensors(self) -> PlanTensors:
        plan, recv = self.recv.plan, self.recv
        nothing = plan.topk_idx.new_empty((0, self.buffer.spec.num_topk), dtype=torch.int32)
        pairs, local_idx = plan.partial_rows, recv.topk_idx
        return PlanTensors(
            plan.topk_idx,
            plan.counts,
            nothing if pairs is None else pairs,
            recv.src_idx,
            nothing if local_idx is None else local_idx,
        )

    def psum_of_ranks(self) -> Tensor:
        """int32 [R]: tokens that came from ranks 0 .. r."""
        return tables.rows_of_ranks(self.plan.counts, self.buffer.spec.num_experts, self.buffer.rank)

    def psum_of_experts(self) -> Tensor:
        """int32 [L]: see ``tables.ends_of_experts``."""
        tokens = self.plan.num_tokens_per_expert
        return tables.ends_of_experts(tokens, self.alignment, is_expanded=self.is_expanded)

    def metadata(self) -> Tensor:
        """int32 [N, K + 2], or [R * M, K + 2] where the host does not know N."""
        recv = self.recv
        if not self.is_expanded:
            local_idx = recv.topk_idx
            assert local_idx is not None
            return tables.metadata(recv.src_idx, local_idx >= 0, None, self.num_tokens)
        num_pairs = self.psum_of_ranks()[-1]
        pairs, num_ranks = self.plan.partial_rows, self.buffer.topology.num_ranks
        if pairs is None:
            ends = self.plan.segment_starts[1:]
            first = self.buffer.rank * self.plan.num_tokens_per_expert.shape[0]
            pairs = tables.pairs_of_rows(recv.src_idx, recv.extras[0], ends, first, num_ranks * self.num_tokens)
        num_rows = int(num_pairs) if self.asks_host else num_ranks * self.num_tokens
        if pairs.shape[0] < num_rows:
            pairs = torch.cat([pairs, pairs.new_full((num_rows - pairs.shape[0], pairs.shape[1]), -1)])
        return tables.expanded_metadata(recv.src_idx, pairs[:num_rows], num_pairs, self.num_tokens)

    def slots(self, topk_idx: Tensor) -> Tensor:
        """int32 [T, K]: a number for each pick, the same whenever the input is."""
        tokens = torch.arange(topk_idx.shape[0], dtype=torch.int32, device=topk_idx.device)
        slot = (tokens + self.buffer.rank * self.num_tokens).unsqueeze(1)
        return slot.where(topk_idx >= 0, -1)


class EPHandle:
    """A routing that was dispatched. Its attributes may be read, set, and written in place.

    Of these ``recv_src_metadata`` decides what a combine of an expanded dispatch adds up: int32 [N, K + 2] of source
    rank * M + token, source rank * K + the token's last pick here, and the row of each pick or -1. Those of handles
    that a dispatch has given are made when they are first read.
    """

    def __init__(
        self,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: Tensor,
        psum_num_recv_tokens_per_expert: Tensor,
        num_unaligned_recv_tokens_per_expert: Tensor,
        recv_src_metadata: Tensor,
        dst_buffer_slot_idx: Tensor,
        token_metadata_at_forward: Tensor | None,
        channel_linked_list: Tensor | None,
    ) -> None:
        fields = dict(locals())
        del fields["self"]
        topk_idx = fields.pop("topk_idx")
        self.__dict__.update(fields)
        self.topk_idx = topk_idx

    @property
    def topk_idx(self) -> Tensor:
        """int64 [T, K] of this rank's tokens: the caller's own tensor, or a copy.

        Raises:
            AssertionError: the caller's was written to since (V2.5; inference tensors are not looked at).
        """
        idx: Tensor = self.__dict__["_topk_idx"]
        version = self.__dict__["_version"]
        assert version is None or version == idx._version, (  # noqa: SLF001 - there is no other way to ask
            "topk_idx was written to after the dispatch, and the handle has no copy of it; write to a clone"
        )
        return idx

    @topk_idx.setter
    def topk_idx(self, topk_idx: Tensor) -> None:
        self.__dict__.update(_topk_idx=topk_idx, _version=None)

    @property
    def psum_num_recv_tokens_per_rank(self) -> Tensor:
        """Another name of ``psum_num_recv_tokens_per_scaleup_rank``."""
        psum: Tensor = self.psum_num_recv_tokens_per_scaleup_rank
        return psum

    @classmethod
    def of(
        cls, routed: Routed, topk_idx: Tensor, num_sms: int, counts: list[int], *, copies: bool, watches: bool
    ) -> EPHandle:
        """That of a dispatch.

        Args:
            counts: aligned tokens of each local expert, [] where the host does not know them.
            copies: keep a copy of ``topk_idx``.
            watches: see that nobody writes to it.
        """
        handle = cls.__new__(cls)
        fields = handle.__dict__
        spec = routed.buffer.spec
        fields["do_expand"], fields["num_experts"] = routed.is_expanded, spec.num_experts
        fields["expert_alignment"], fields["num_max_tokens_per_rank"] = routed.alignment, routed.num_tokens
        fields["num_sms"], fields["num_recv_tokens_per_expert_list"] = num_sms, counts
        fields["token_metadata_at_forward"] = fields["channel_linked_list"] = None
        fields["_routed"] = routed
        fields["_topk_idx"] = topk_idx = topk_idx.clone() if copies else topk_idx
        fields["_version"] = topk_idx._version if watches and not topk_idx.is_inference() else None  # noqa: SLF001 - as above
        return handle

    def __getattr__(self, name: str) -> Any:
        """A table is made when it is first asked for."""
        routed = self.__dict__.get("_routed")
        if routed is None or name not in _TABLES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = self.__dict__[name] = _TABLES[name](self, routed)
        if name == "recv_src_metadata":
            self.__dict__["_given_metadata"] = value, None if value.is_inference() else value._version  # noqa: SLF001
        return value

    def make_all(self) -> None:
        """Makes all tables, in a capture: so that a replay writes them too."""
        for name in _TABLES:
            getattr(self, name)

    @property
    def routed(self) -> Routed | None:
        """What a call on it needs; None where it was made of its parts, or copied with its tensors."""
        routed: Routed | None = self.__dict__.get("_routed")
        return routed

    @routed.setter
    def routed(self, routed: Routed) -> None:
        self.__dict__["_routed"] = routed

    def __copy__(self) -> EPHandle:
        """One with the same tensors, over the same routing."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Its tensors and numbers, which say all that a routing is made of again."""
        if self.routed is not None:
            self.make_all()
        state = dict(self.__dict__)
        for native in ("_routed", "_given_metadata"):
            state.pop(native, None)
        return state | {"_version": None}

    def rewritten_rows(self) -> Tensor | None:
        """Rows of picks [N, K] where the client may have written its own; None where it has not.

        Inference tensors do not say whether they were written to.
        """
        table = self.__dict__.get("recv_src_metadata")
        if table is None:
            return None
        given, version = self.__dict__.get("_given_metadata", (None, None))
        if table is given and version is not None and version == table._version:  # noqa: SLF001 - as above
            return None
        rows: Tensor = table[:, 2:]
        return rows


_TABLES: dict[str, Callable[[EPHandle, Routed], Any]] = {
    "num_recv_tokens": lambda _, routed: _num_tokens(routed),
    "num_expanded_tokens": lambda _, routed: _num_expanded(routed),
    "psum_num_recv_tokens_per_scaleup_rank": lambda _, routed: routed.psum_of_ranks(),
    "psum_num_recv_tokens_per_expert": lambda _, routed: routed.psum_of_experts(),
    "num_unaligned_recv_tokens_per_expert": lambda _, routed: routed.plan.num_tokens_per_expert.clone(),
    "recv_src_metadata": lambda _, routed: routed.metadata(),
    "dst_buffer_slot_idx": lambda handle, routed: routed.slots(handle.topk_idx),
}


def _num_tokens(routed: Routed) -> int:
    """N; the most that can come where the host does not know it."""
    plan = routed.plan
    if not routed.asks_host:
        return routed.buffer.topology.num_ranks * routed.num_tokens
    if not routed.is_expanded:
        return plan.num_rows or 0
    return int(routed.psum_of_ranks()[-1]) if plan.partial_rows is None else plan.num_partial_rows


def _num_expanded(routed: Routed) -> int:
    """Rows of an expanded dispatch, with gaps; as many as tokens came where it is not expanded."""
    if routed.asks_host:
        return routed.plan.num_rows or 0
    return routed.plan.extent.slot_rows
