"""V1's handles: tuples of tensors, behind each of which stands a plan, by the storage of its tensors or made again.

A program may keep a handle in autograd, which gives new tensor objects back, over the same memory. One whose memory is
other (copied by a checkpoint, say) still says all that a plan needs: which tokens go to which ranks, and how many come.

Letters: R ranks, T tokens here, N rows that came, E experts, W counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossdock.backends.base import PlanTensors
from crossdock.buffer import Buffer
from crossdock.compat.deep_ep.by_storage import ByStorage
from crossdock.errors import ConfigError
from crossdock.plan import Plan
from crossdock.routing import picks_of_ranks

MAX_INTRANODE = 8
"""Ranks up to which a handle has six tensors, as programs expect."""
_SIX, _TEN = 6, 10


class Parts(NamedTuple):
    """What a handle says of its routing, whichever of its two forms it has."""

    rank_prefix: Tensor  # int32 [R, R]: how many rows ranks 0 .. s send to d
    is_token_in_rank: Tensor  # bool [T, R]
    src_idx: Tensor  # int32 [N], the source token of each row; -1 where none came
    max_tokens: Tensor | int
    """Tokens of a rank that its Buffer had room for, the same on all ranks; 0 in handles that are not ours."""


class Record:
    """A routing: its plan in the Buffer that made it, and in others that carry rows of other formats.

    Args:
        src_idx: of the rows that came, as the native dispatch has it.
        is_token_in_rank: the caller's.
        num_sms: by which the tensors of a handle are shaped that say how SMs share out rows.
    """

    def __init__(
        self, buffer: Buffer, plan: Plan, src_idx: Tensor, is_token_in_rank: Tensor, *, asks_host: bool, num_sms: int
    ) -> None:
        self.buffer = buffer
        self.plan = plan
        self.asks_host = asks_host
        """Whether the host knows how many rows came."""
        self.num_sms = num_sms
        self.num_rows = src_idx.shape[0]
        self.num_real_rows: int | None = None
        """Of a plan that was made again where the client has more rows than came: how many did."""
        self._src_idx = src_idx
        self._is_token_in_rank = is_token_in_rank
        self._plans: dict[Buffer, Plan] = {}

    def parts(self) -> Parts:
        """What its handle says, in tensors that nothing here keeps."""
        spec, num_ranks = self.buffer.spec, self.buffer.topology.num_ranks
        per_rank = self.plan.counts[:, spec.num_experts : spec.num_experts + num_ranks]
        tokens = self._src_idx.remainder(spec.max_tokens).where(self._src_idx >= 0, self._src_idx)
        return Parts(per_rank.cumsum(0).to(torch.int32), self._is_token_in_rank, tokens, spec.max_tokens)

    def plan_in(self, buffer: Buffer) -> Plan:
        """The plan for calls of a Buffer over the same ranks."""
        if buffer is self.buffer:
            return self.plan
        plan = self._plans.get(buffer)
        if plan is None:
            plan = self._plans[buffer] = buffer.remake_plan(plan_tensors(self.parts(), buffer))
        return plan


class Handle(tuple):  # type: ignore[type-arg] # noqa: SLOT001 - tuples of a varying size have no slots
    """Six tensors, or ten of more than eight ranks; made when one of them is first looked at."""

    record: Record
    records: ByStorage[Record]
    made: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, record: Record, records: ByStorage[Record]) -> Handle:
        """One that stands for a record, which is found by the tensors too, once there are some."""
        is_intranode = record.buffer.topology.num_ranks <= MAX_INTRANODE
        handle = tuple.__new__(cls, (None,) * (_SIX if is_intranode else _TEN))
        handle.record, handle.records, handle.made = record, records, None
        return handle

    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors."""
        if self.made is None:
            parts = self.record.parts()
            self.made = tensors_of(parts, self.record.num_sms)
            self.records.keep(parts.src_idx, self.record)
        return self.made

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors())

    def __getitem__(self, index: Any) -> Any:
        return self.tensors()[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self.tensors(),)

    def __repr__(self) -> str:
        return repr(self.tensors())

    def __add__(self, other: Any) -> Any:
        return self.tensors() + tuple(other)

    def __radd__(self, other: Any) -> Any:
        return tuple(other) + self.tensors()

    def __mul__(self, times: Any) -> Any:
        return self.tensors() * times

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


def parts_of(handle: object) -> Parts:
    """The parts of a handle's tensors.

    Raises:
        ConfigError: it is no handle.
    """
    tensors = tuple(handle) if isinstance(handle, (tuple, list)) else ()
    if len(tensors) not in (_SIX, _TEN) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ConfigError(
            f"handle is a {type(handle).__name__} of {len(tensors)}; pass what dispatch has given, a tuple of tensors"
        )
    if len(tensors) == _SIX:
        return Parts(tensors[0], tensors[4], tensors[3], tensors[1][0, 0])
    return Parts(tensors[2], tensors[0], tensors[6], tensors[1][0, 0])


def tensors_of(parts: Parts, num_sms: int) -> tuple[Tensor, ...]:
    """A handle's tensors. Those that say how another library's channels share out rows have no meaning here: zeros.

    The first number of the first of these is ``max_tokens``.
    """
    num_ranks, num_tokens = parts.rank_prefix.shape[0], parts.is_token_in_rank.shape[0]
    device = parts.rank_prefix.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    channels = num_sms // 2
    is_intranode = num_ranks <= MAX_INTRANODE
    nodes = -(-num_ranks // MAX_INTRANODE)
    channel = zeros(num_ranks if is_intranode else nodes, channels)
    channel[0, 0] = parts.max_tokens
    if is_intranode:
        head = zeros(num_tokens, num_ranks)
        return parts.rank_prefix, channel, zeros(num_ranks, channels), parts.src_idx, parts.is_token_in_rank, head
    head = zeros(num_tokens, nodes)
    return (
        *(parts.is_token_in_rank, channel, parts.rank_prefix, zeros(nodes, channels), zeros(nodes)),
        *(zeros(num_ranks, channels), parts.src_idx, zeros(len(parts.src_idx), 8).to(torch.uint8), head),
        zeros(num_tokens, MAX_INTRANODE),
    )


def plan_tensors(parts: Parts, buffer: Buffer) -> PlanTensors:
    """What decides a Compact plan of that routing: a rank that a token goes to counts as a pick of its first expert."""
    spec, num_ranks = buffer.spec, buffer.topology.num_ranks
    num_local = spec.num_local_experts(num_ranks)
    per_rank = parts.rank_prefix.to(torch.int64)
    per_rank = torch.cat([per_rank[:1], per_rank[1:] - per_rank[:-1]])
    counts = torch.zeros(num_ranks, spec.num_counts(buffer.topology), dtype=torch.int64, device=per_rank.device)
    counts[:, : spec.num_experts : num_local] = per_rank
    counts[:, spec.num_experts : spec.num_experts + num_ranks] = per_rank
    picks = picks_of_ranks(parts.is_token_in_rank, num_local=num_local, num_topk=spec.num_topk)
    num_rows = parts.src_idx.shape[0]
    local_idx = torch.full((num_rows, spec.num_topk), -1, dtype=torch.int32, device=per_rank.device)
    local_idx[:, 0] = 0
    return PlanTensors(picks, counts, picks.new_empty((0, spec.num_topk), dtype=torch.int32), parts.src_idx, local_idx)
