"""V1's normal calls, in terms of native ones: Compact rows, added up in the order of ranks.

Letters: R ranks, E experts, L local experts, T tokens here, K picks per token, H hidden, N rows that came, M tokens of
a rank that there is room for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossdock.buffer import Buffer
from crossdock.compat.deep_ep.by_storage import ByStorage
from crossdock.compat.deep_ep.engine import Engine, plain
from crossdock.compat.deep_ep.events import Previous
from crossdock.compat.deep_ep.formats import Rows, as_given, as_native, bad_picks, read, wire_of
from crossdock.compat.deep_ep.handles import Handle, Parts, Record, parts_of, plan_tensors
from crossdock.errors import CapacityError, ConfigError
from crossdock.layout import Compact
from crossdock.spec import Spec
from crossdock.wire import Opaque

_CHANNELS_SMS = 20
"""SMs by which a handle's channel tensors are shaped where no config says how many."""


class Sizes(NamedTuple):
    """What a Spec is made of, beside the format of rows."""

    num_experts: int
    num_topk: int
    hidden: int
    max_tokens: int
    capacity: int = 0
    """Rows of a slot; 0: as many as can come."""
    extra_bytes: int = 0


class Wanted(NamedTuple):
    """A dispatch as it was asked for; see ``Buffer.dispatch``."""

    x: Rows
    num_tokens_per_rank: Tensor | None
    is_token_in_rank: Tensor | None
    num_tokens_per_expert: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    expert_alignment: int
    num_worst_tokens: int
    num_sms: int | None


Dispatched = tuple[Rows, "Tensor | None", "Tensor | None", "list[int] | None", "Handle | None"]


class Normal:
    """The normal calls of one V1 buffer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._records: ByStorage[Record] = ByStorage()

    def dispatch(self, wanted: Wanted, handle: tuple[Tensor, ...] | None) -> Dispatched:
        """Rows, picks, weights, the list and the handle; with a handle, rows alone."""
        data, scales = read(wanted.x)
        if handle is not None:
            return self._again(wanted, handle, data, scales)
        if wanted.is_token_in_rank is None or wanted.num_tokens_per_expert is None:
            raise ConfigError(
                "dispatch without a handle needs num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert; pass "
                "what get_dispatch_layout gives"
            )
        if (wanted.topk_idx is None) != (wanted.topk_weights is None):
            raise ConfigError("topk_idx and topk_weights come together or not at all; pass both, or neither")
        if wanted.topk_idx is None and wanted.num_worst_tokens:
            raise ConfigError("num_worst_tokens needs topk_idx and topk_weights; pass them too, or leave it out")
        if wanted.topk_idx is not None and wanted.topk_idx.dim() != 2:
            raise bad_picks(wanted.topk_idx)
        if wanted.expert_alignment < 1:
            raise ConfigError(f"expert_alignment={wanted.expert_alignment}; pass 1 or more")
        return self._fresh(wanted, data, scales)

    def _fresh(self, wanted: Wanted, data: Tensor, scales: Tensor | None) -> Dispatched:
        topk_idx, topk_weights, num_worst = wanted.topk_idx, wanted.topk_weights, wanted.num_worst_tokens
        is_in, per_expert = wanted.is_token_in_rank, wanted.num_tokens_per_expert
        assert is_in is not None
        assert per_expert is not None
        engine, (num_tokens, hidden) = self._engine, data.shape
        num_experts = per_expert.shape[0]
        num_topk = min(engine.num_ranks, num_experts) if topk_idx is None else topk_idx.shape[1]
        room = self._room(num_tokens, num_worst) if num_worst else engine.num_tokens
        buffer = self._buffer_for(Sizes(num_experts, num_topk, hidden, room, num_worst), data, scales)
        try:
            recv = buffer.dispatch(
                as_native(data, scales, buffer.spec.wire, hidden),
                is_in if topk_idx is None else topk_idx,
                weights=None if topk_weights is None else plain(topk_weights),
                rows="capacity" if num_worst else "exact",
                copy=True,
                num_sms=self._sms(wanted.num_sms),
            )
        except CapacityError as error:  # the same on all ranks
            if error.num_tokens is None or num_worst:
                raise
            engine.grow(error.num_tokens)
            return self._fresh(wanted, data, scales)
        record = Record(
            buffer, recv.plan, recv.src_idx, is_in, asks_host=not num_worst, num_sms=wanted.num_sms or _CHANNELS_SMS
        )
        handle = Handle.of(record, self._records)
        rows = as_given(recv.x, None if scales is None else scales.shape[1])
        if topk_idx is None:
            return rows, None, None, self._exchanged(per_expert, wanted.expert_alignment), handle
        picks = recv.topk_idx
        assert picks is not None
        listed = [] if num_worst else aligned(recv.num_tokens_per_expert_list, wanted.expert_alignment)
        return rows, picks.to(torch.int64), recv.weights, listed, handle

    def _room(self, num_tokens: int, num_worst: int) -> int:
        """Tokens of a rank, where the rows that come from all of them are bounded."""
        engine = self._engine
        room = -(-num_worst // engine.num_ranks)
        if num_tokens > room:
            raise ConfigError(
                f"num_worst_tokens={num_worst} rows of {engine.num_ranks} ranks, and this rank brings {num_tokens} "
                f"tokens; pass the most tokens of a rank times the ranks, or 0 to have the host wait"
            )
        engine.num_tokens = max(engine.num_tokens, room)
        return room

    def _again(self, wanted: Wanted, handle: tuple[Tensor, ...], data: Tensor, scales: Tensor | None) -> Dispatched:
        if wanted.topk_idx is not None or wanted.topk_weights is not None:
            raise ConfigError("a dispatch with a handle goes where that says; leave topk_idx and topk_weights out")
        hidden = data.shape[1]
        record = self._record_of(handle, hidden, 0)
        buffer = record.buffer
        spec, unquantized = buffer.spec, False
        if scales is None and not spec.wire.is_unquantized and hidden == spec.hidden:
            unquantized = True
        elif not _carries(spec, data, scales):
            capacity = spec.layout.capacity or 0
            buffer = self._buffer_for(
                Sizes(spec.num_experts, spec.num_topk, hidden, spec.max_tokens, capacity), data, scales
            )
        self._engine.use(buffer)
        recv = buffer.dispatch(
            as_native(data, scales, buffer.spec.wire, hidden),
            record.plan_in(buffer),
            rows="exact" if record.asks_host else "capacity",
            unquantized=unquantized,
            copy=True,
            num_sms=self._sms(wanted.num_sms),
        )
        rows = as_given(recv.x, None if scales is None else scales.shape[1])
        if record.num_real_rows is not None:
            rows = _with_tail(rows, record.num_rows)
        return rows, None, None, None, None

    def combine(
        self, x: Tensor, handle: tuple[Tensor, ...], topk_weights: Tensor | None, bias: Any, num_sms: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """The sums [T, H], and those of the weights [T, K]."""
        num_topk = 0 if topk_weights is None else topk_weights.shape[-1]
        record = self._record_of(handle, x.shape[-1], num_topk)
        buffer, plan = record.buffer, record.plan
        self._engine.use(buffer)
        num_sms, num_rows = self._sms(num_sms), record.num_real_rows
        if topk_weights is None:
            return buffer.combine(plain(x)[:num_rows], plan, bias=bias_of(bias), num_sms=num_sms), None
        extras = (plain(topk_weights)[:num_rows],)
        out, (weights,) = buffer.combine(plain(x)[:num_rows], plan, bias=bias_of(bias), extras=extras, num_sms=num_sms)
        return out, weights

    def _sms(self, num_sms: int | None) -> int | None:
        return num_sms if self._engine.device.type == "cuda" else None

    def _buffer_for(self, sizes: Sizes, data: Tensor, scales: Tensor | None) -> Buffer:
        """The Buffer of such rows."""
        given = None if scales is None else (scales.shape[1], scales.dtype)

        def make_spec() -> Spec:
            return Spec(
                num_experts=sizes.num_experts,
                num_topk=sizes.num_topk,
                hidden=sizes.hidden,
                max_tokens=sizes.max_tokens,
                wire=wire_of(data.dtype, sizes.hidden, given),
                layout=Compact(capacity=sizes.capacity or self._engine.num_ranks * sizes.max_tokens),
                reduce="rank",
                extra_bytes=sizes.extra_bytes,
                num_slots=1,
            )

        return self._engine.buffer(("normal", sizes, data.dtype, given), make_spec, data.device)

    def _record_of(self, handle: tuple[Tensor, ...], hidden: int, num_topk: int) -> Record:
        """The record behind a handle: by its tensors' memory, or made again from what they say, on all ranks alike."""
        if type(handle) is Handle and not handle.record.buffer.connection.is_closed:
            return handle.record
        parts = parts_of(handle)
        known = self._records.find(parts.src_idx)
        if known is not None and not known.buffer.connection.is_closed:
            return known
        num_ranks = self._engine.num_ranks
        self._make_room(parts, num_ranks)
        sizes = Sizes(num_ranks, num_ranks, hidden, self._engine.num_tokens, extra_bytes=4 * num_topk)
        buffer = self._buffer_for(sizes, parts.src_idx.new_empty(0, dtype=torch.bfloat16), None)
        plan = buffer.remake_plan(plan_tensors(parts, buffer))
        record = Record(buffer, plan, parts.src_idx, parts.is_token_in_rank, asks_host=True, num_sms=_CHANNELS_SMS)
        record.num_real_rows = plan.num_rows
        return record

    def _make_room(self, parts: Parts, num_ranks: int) -> None:
        """As many tokens as the handle's buffer had room for: on all ranks alike, which see their own tokens alone.

        Raises:
            ConfigError: it is of another number of ranks, or of more tokens than it says.
        """
        if parts.rank_prefix.shape[0] != num_ranks:
            raise ConfigError(
                f"the handle is of {parts.rank_prefix.shape[0]} ranks, and this buffer has {num_ranks}; pass one that "
                f"dispatch has given in a group of as many ranks"
            )
        engine, num_tokens = self._engine, parts.is_token_in_rank.shape[0]
        if not (parts.src_idx.is_cuda and torch.cuda.is_current_stream_capturing()):  # where the host asks nothing
            engine.grow(int(parts.max_tokens))
        if num_tokens > engine.num_tokens:
            raise ConfigError(
                f"the handle is of {num_tokens} tokens, and this buffer has room for {engine.num_tokens} of a rank; "
                f"dispatch so many here first, on any rank"
            )

    def _exchanged(self, num_tokens_per_expert: Tensor, alignment: int) -> list[int]:
        """Tokens of every rank for each expert of this one, where no pick says so: a dispatch of its own."""
        num_ranks = self._engine.num_ranks
        num_local = num_tokens_per_expert.shape[0] // num_ranks

        def make_spec() -> Spec:
            return Spec(
                num_experts=num_ranks, num_topk=1, hidden=num_local, max_tokens=num_ranks,
                wire=Opaque(dtype=torch.int32), layout=Compact(), num_slots=1,
            )  # fmt: skip

        device = num_tokens_per_expert.device
        buffer = self._engine.buffer(("counts", num_local), make_spec, device)
        to_each = torch.arange(num_ranks, dtype=torch.int64, device=device).view(-1, 1)
        counts = buffer.dispatch(num_tokens_per_expert.to(torch.int32).view(num_ranks, num_local), to_each).x
        assert isinstance(counts, Tensor)
        return aligned(counts.sum(dim=0).tolist(), alignment)


def aligned(counts: list[int], alignment: int) -> list[int]:
    """Each rounded up to a multiple.

    >>> aligned([0, 3, 4], 4)
    [0, 4, 4]
    """
    return counts if alignment == 1 else [-(-count // alignment) * alignment for count in counts]


def bias_of(bias: Any) -> Tensor | None:
    """What is added to the sums: one tensor, or two that are added in float32."""
    if bias is None or isinstance(bias, Tensor):
        return None if bias is None else plain(bias)
    if not (isinstance(bias, tuple) and len(bias) == 2 and all(isinstance(part, Tensor) for part in bias)):
        raise ConfigError(f"bias is a {type(bias).__name__}; pass a tensor [tokens, hidden], two of them, or None")
    if bias[0].shape != bias[1].shape:
        raise ConfigError(
            f"bias is a pair of {list(bias[0].shape)} and {list(bias[1].shape)}; pass two of [tokens, hidden]"
        )
    return plain(bias[0]).float() + plain(bias[1]).float()


def check_streams(previous: Previous, is_async: bool, allocates_there: bool) -> None:
    """Raises ConfigError where results are to be of the communication stream's memory, and the call is not on it."""
    if allocates_there and (previous is None or not is_async):
        raise ConfigError(
            "allocate_on_comm_stream=True needs previous_event= and async_finish=True; pass both, or leave it out"
        )


def _with_tail(rows: Rows, num_rows: int) -> Rows:
    """The rows, and behind them as many more as there are to be, of zeros."""
    if isinstance(rows, tuple):
        data, scales = (_longer(part, num_rows) for part in rows)
        return data, scales
    return _longer(rows, num_rows)


def _longer(rows: Tensor, num_rows: int) -> Tensor:
    longer = torch.zeros(num_rows, rows.shape[1] * rows.element_size(), dtype=torch.uint8, device=rows.device)
    longer[: rows.shape[0]] = rows.contiguous().view(torch.uint8)
    return longer.view(rows.dtype)


def _carries(spec: Spec, data: Tensor, scales: Tensor | None) -> bool:
    """Whether rows are of a Spec's wire."""
    wire = spec.wire
    if data.shape[1] != spec.hidden or data.dtype != wire.dtype or (scales is None) != wire.is_unquantized:
        return False
    return scales is None or (scales.dtype == wire.scale_dtype and scales.shape[1] == wire.num_scales(spec.hidden))
