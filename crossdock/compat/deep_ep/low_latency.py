"""V1's low-latency calls, in terms of native ones: Padded rows, one block of R * M for each local expert.

Letters: R ranks, E experts, L local experts, T tokens here, K picks per token, H hidden, M the most tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossdock.backends.base import Counters
from crossdock.buffer import Buffer as NativeBuffer
from crossdock.compat.deep_ep import refused
from crossdock.compat.deep_ep.by_storage import ByStorage
from crossdock.compat.deep_ep.engine import Engine, Started, collective, plain
from crossdock.compat.deep_ep.events import EventOverlap
from crossdock.compat.deep_ep.formats import bad_picks, no_rows
from crossdock.compat.deep_ep.masks import Masks
from crossdock.compat.deep_ep.scratch import Scratch
from crossdock.errors import ConfigError
from crossdock.layout import Padded
from crossdock.received import Received
from crossdock.spec import Spec
from crossdock.wire import Bf16, Fp8, Quantized

Hook = Callable[[], None]
Handle = tuple[Tensor, Tensor, int, int, int]
"""src_info int32 [L, R * M], layout_range int64 [L, R] of begin << 32 | count, M, hidden, E."""


class Packed(NamedTuple):
    """What a dispatch gives its client, who may have it before the rows are in it."""

    x: Tensor  # [L, R * M, H]
    scale: Tensor | None
    num_rows: Tensor  # int32 [L]
    src_info: Tensor  # int32 [L, R * M]
    layout_range: Tensor  # int64 [L, R]


class Round:
    """One dispatch and the combines behind it."""

    def __init__(self, buffer: NativeBuffer, finish: Callable[[], Received] | Received) -> None:
        self.buffer = buffer
        self._finish = finish

    @property
    def recv(self) -> Received:
        """What came, once it has been waited for; waits for it if nobody has."""
        if not isinstance(self._finish, Received):
            self._finish = self._finish()
        return self._finish


class LowLatency:
    """The low-latency half of V1's ``Buffer``."""

    _engine: Engine
    low_latency_mode: bool
    enable_shrink: bool
    num_nvl_bytes: int
    num_rdma_bytes: int

    def _begin_low_latency(self) -> None:
        self._rounds: ByStorage[Round] = ByStorage()
        self._rooms: dict[NativeBuffer, Room] = {}
        self._masks = Masks(self._engine, is_enabled=self.enable_shrink)
        self._scratch = Scratch(self._engine.device, self.num_nvl_bytes, self.num_rdma_bytes)

    @collective
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, Handle, EventOverlap, Hook | None]:
        """Sends each token to its experts, as one row each; the host waits for nothing. Collective.

        Args:
            x: bfloat16 [T, H], T of at most M.
            topk_idx: [T, K], -1 for no pick.
            num_max_dispatch_tokens_per_rank: M, the same on all ranks.
            cumulative_local_expert_recv_stats: int32 [L], to which the picks of each local expert are added.
            dispatch_wait_recv_cost_stats: int64 [R], to which the waits for each rank are added, in nanoseconds.
            use_fp8: rows are cast as they are sent, with a scale for 128 values each.
            round_scale: scales are powers of two.
            use_ue8m0: scales arrive as four exponents in an int32; needs ``round_scale``.
            return_recv_hook: give a hook, before which nothing that this gives is to be read.

        Returns:
            Rows [L, R * M, H], with scales [L, R * M, H / 128] behind them if they were cast; rows that came for each
            local expert, int32 [L]; the handle; an event; the hook, or None.
        """
        if not self.low_latency_mode or (async_finish and return_recv_hook):
            raise self._refusal()
        if use_ue8m0 and not round_scale:
            raise ConfigError("use_ue8m0=True has scales that are powers of two; pass round_scale=True with it")
        if x.dim() != 2:
            raise no_rows(x)
        if topk_idx.dim() != 2:
            raise bad_picks(topk_idx)
        x = plain(x) if x.requires_grad else x
        num_tokens, hidden = x.shape
        sizes = num_experts, topk_idx.shape[1], hidden, num_max_dispatch_tokens_per_rank
        if num_max_dispatch_tokens_per_rank < 1:
            raise ConfigError(f"num_max_dispatch_tokens_per_rank={sizes[3]}; pass the most tokens that a rank brings")
        if use_fp8 and hidden % Fp8.block:
            raise ConfigError(
                f"x has hidden={hidden}, which is not divisible by the {Fp8.block} values of a scale; pass "
                f"use_fp8=False, or pad the rows"
            )
        if num_tokens > num_max_dispatch_tokens_per_rank:
            raise ConfigError(
                f"x has {num_tokens} tokens, and num_max_dispatch_tokens_per_rank={sizes[3]}; pass a larger number on "
                f"all ranks, or fewer tokens"
            )
        wire = ("ue8m0" if use_ue8m0 else "pow2" if round_scale else "f32") if use_fp8 else "bf16"
        buffer = self._engine.buffer(
            ("low-latency", sizes, wire), lambda: _spec(sizes, wire, self._engine.num_ranks), x.device
        )
        if self._engine.unfinished and not return_recv_hook:
            self._engine.settle()  # or its slot could be that of a call whose hook nobody calls
        counters = None
        if cumulative_local_expert_recv_stats is not None or dispatch_wait_recv_cost_stats is not None:
            counters = Counters(cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats)
        if return_recv_hook:
            return self._dispatch_with_hook(buffer, x, topk_idx, counters)
        if not async_finish:
            recv = buffer.dispatch(x, topk_idx, copy=True, counters=counters)
            return (*self._packed(buffer, recv), EventOverlap(), None)
        with self._engine.beside(None) as overlap:
            recv = buffer.dispatch(x, topk_idx, copy=True, counters=counters)
            packed = self._packed(buffer, recv)
            self._engine.lend(x, topk_idx)
        self._engine.hand_out(packed)
        return (*packed, overlap, None)

    @collective
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Handle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Brings outputs home and adds those of a token up, with its weights, in float32. Collective.

        Args:
            x: bfloat16 [L, R * M, H]; what stands in rows that did not come is not read.
            topk_idx: as the dispatch was given it; the handle says the same.
            topk_weights: float32 [T, K].
            zero_copy: outputs are in ``get_next_low_latency_combine_buffer(handle)`` already; x is not read.
            out: contiguous bfloat16 [T, H] for the sums, which is then what is returned.
            combine_wait_recv_cost_stats: int64 [R], to which the waits for each rank are added, in nanoseconds.

        Returns:
            The sums [T, H], an event, the hook or None.
        """
        if not self.low_latency_mode or (async_finish and return_recv_hook):
            raise self._refusal()
        if use_logfmt:
            raise refused.error("use_logfmt")
        if not isinstance(topk_weights, Tensor):
            raise ConfigError(f"topk_weights is a {type(topk_weights).__name__}; pass float32 [tokens, picks]")
        of = self._round_of(handle) or self._found_again(handle, topk_idx)
        buffer, recv, weights = of.buffer, of.recv, plain(topk_weights)
        self._engine.use(buffer)
        y = recv.output_rows() if zero_copy else plain(x)
        counters = None if combine_wait_recv_cost_stats is None else Counters(wait_ns=combine_wait_recv_cost_stats)
        if return_recv_hook:
            if out is None:
                out = torch.empty(topk_idx.shape[0], handle[3], dtype=torch.bfloat16, device=y.device)
            pending = buffer.combine_start(y, recv.plan, weights=weights, out=out, counters=counters)
            return out, EventOverlap(), self._engine.started(buffer, pending.wait)
        if not async_finish:
            out = buffer.combine(y, recv.plan, weights=weights, out=out, counters=counters)
            return out, EventOverlap(), None
        with self._engine.beside(None) as overlap:
            out = buffer.combine(y, recv.plan, weights=weights, out=out, counters=counters)
            self._engine.lend(y, topk_weights)
        self._engine.hand_out(out)
        return out, overlap, None

    def get_next_low_latency_combine_buffer(self, handle: Handle) -> Tensor:
        """bfloat16 [L, R * M, H]: where outputs may be written, for a combine with ``zero_copy=True``."""
        if (of := self._round_of(handle)) is None:
            raise ConfigError(
                "the handle's tensors were copied, or are another buffer's, so there are no rows of it here; pass the "
                "handle that low_latency_dispatch gave, or outputs of your own to low_latency_combine"
            )
        return of.recv.output_rows()

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Finishes low-latency calls that nobody has waited for. Calls leave nothing to clean."""
        self._engine.settle()

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """A scratch area of the client's, as large as the buffer that it names; no call reads it or writes there.

        Args:
            size: of the result; None: one dimension, of all there is.
            offset: its first element.
        """
        return self._scratch.view(dtype, size, offset, is_rdma=use_rdma_buffer)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Goes on without a rank that is gone, by agreement of all that are left, for good; ``Connection.mask``."""
        self._masks.update(rank_to_mask, mask=mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Fills int32 [R]: 1 where a rank is masked, else 0. Local; the host waits for nothing."""
        self._masks.query(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Nothing, as long as nobody is masked; a mask is for good."""
        self._masks.clean()

    def _round_of(self, handle: object) -> Round | None:
        """The round of a handle, by the memory of its tensors; None where that is not known here.

        Raises:
            ConfigError: it is no handle.
        """
        if not (isinstance(handle, tuple) and len(handle) == 5 and isinstance(handle[1], Tensor)):
            raise ConfigError(
                f"handle is a {type(handle).__name__}; pass what low_latency_dispatch gave: a tuple of two tensors and "
                f"three numbers"
            )
        found = self._rounds.find(handle[1])
        return None if found is None or found.buffer.connection.is_closed else found

    def _found_again(self, handle: Handle, topk_idx: Tensor) -> Round:
        """That of a handle whose tensors were copied, by a dispatch of empty rows: on all ranks alike."""
        _, layout_range, num_tokens, hidden, num_experts = handle
        empty = topk_idx.new_zeros((topk_idx.shape[0], hidden), dtype=torch.bfloat16)
        _, _, again, _, _ = self.low_latency_dispatch(empty, topk_idx, num_tokens, num_experts, use_fp8=False)
        found = self._round_of(again)
        assert found is not None, "a dispatch has just given it"
        self._rounds.keep(layout_range, found)
        return found

    def _refusal(self) -> ConfigError:
        if self.low_latency_mode:
            return ConfigError("async_finish and return_recv_hook are both True; pass one of them")
        return ConfigError("a low-latency call of a buffer without low_latency_mode=True; pass that when it is made")

    def _packed(self, buffer: NativeBuffer, recv: Received) -> tuple[Any, Tensor, Handle]:
        """Rows, counts and the handle of a dispatch that has been waited for, in memory of their own."""
        x = recv.x
        rows, scale = x if isinstance(x, Quantized) else (x, None)
        packed = Packed(rows, scale, recv.num_tokens_per_expert.clone(), _src_info(recv, buffer), _ranges(recv, buffer))
        return self._given(packed, Round(buffer, recv.without_copy()))

    def _dispatch_with_hook(
        self, buffer: NativeBuffer, x: Tensor, topk_idx: Tensor, counters: Counters | None
    ) -> tuple[Any, Tensor, Handle, EventOverlap, Hook]:
        pending = buffer.dispatch_start(x, topk_idx, counters=counters)
        room = self._rooms.get(buffer)
        if room is None:
            room = self._rooms[buffer] = Room.of(buffer)
        packed, num_tokens = room.packed(x.device), buffer.spec.max_tokens

        def receive() -> Received:
            recv = pending.wait()
            buffer.copy_rows(recv, packed.x if packed.scale is None else Quantized(packed.x, packed.scale))
            packed.num_rows.copy_(recv.num_tokens_per_expert)
            torch.remainder(recv.src_idx, num_tokens, out=packed.src_info)
            packed.layout_range.copy_(_ranges(recv, buffer))
            return recv

        hook = Started(buffer, receive, self._engine.unfinished)
        return (*self._given(packed, Round(buffer, hook.result)), EventOverlap(), hook)

    def _given(self, packed: Packed, of: Round) -> tuple[Any, Tensor, Handle]:
        self._rounds.keep(packed.layout_range, of)
        spec = of.buffer.spec
        handle = packed.src_info, packed.layout_range, spec.max_tokens, spec.hidden, spec.num_experts
        rows = packed.x if packed.scale is None else (packed.x, packed.scale)
        return rows, packed.num_rows, handle


def _spec(sizes: tuple[int, int, int, int], wire: str, num_ranks: int) -> Spec:
    num_experts, num_topk, hidden, num_tokens = sizes
    wires = {
        "bf16": Bf16(),
        "f32": Fp8(column_major=True),
        "pow2": Fp8(column_major=True, pow2=True),
        "ue8m0": Fp8(column_major=True, scale="ue8m0", packed=True),
    }
    return Spec(
        num_experts=num_experts,
        num_topk=num_topk,
        hidden=hidden,
        max_tokens=num_tokens,
        wire=wires[wire],
        layout=Padded(capacity=num_ranks * num_tokens),
    )


class Room(NamedTuple):
    """What tensors to be filled are made of."""

    num_local: int
    num_ranks: int
    num_rows: int
    hidden: int
    dtype: torch.dtype
    num_scales: int
    scale_dtype: torch.dtype

    @classmethod
    def of(cls, buffer: NativeBuffer) -> Room:
        """Of a Buffer's calls."""
        spec, num_ranks = buffer.spec, buffer.topology.num_ranks
        num_local, num_scales = spec.num_local_experts(num_ranks), spec.wire.num_scales(spec.hidden)
        rows = num_ranks * spec.max_tokens
        return cls(num_local, num_ranks, rows, spec.hidden, spec.wire.dtype, num_scales, spec.wire.scale_dtype)

    def packed(self, device: torch.device) -> Packed:
        """Tensors to be filled when rows have come."""
        lead, scale = (self.num_local, self.num_rows), None
        if self.num_scales:
            aligned = -(-self.num_rows // 4) * 4
            scale = torch.empty(self.num_local, self.num_scales, aligned, dtype=self.scale_dtype, device=device)
            scale = scale.transpose(1, 2)[:, : self.num_rows]
        parts = (
            torch.empty(*lead, self.hidden, dtype=self.dtype, device=device),
            scale,
            torch.empty(self.num_local, dtype=torch.int32, device=device),
            torch.empty(lead, dtype=torch.int32, device=device),
            torch.empty(self.num_local, self.num_ranks, dtype=torch.int64, device=device),
        )
        return tuple.__new__(Packed, parts)  # Packed(*parts), without a call of Python


def _src_info(recv: Received, buffer: NativeBuffer) -> Tensor:
    """The source token of each row, int32 [L, R * M]."""
    return recv.src_idx.remainder(buffer.spec.max_tokens)


def _ranges(recv: Received, buffer: NativeBuffer) -> Tensor:
    """Of each local expert and source rank, its first row and how many there are: int64 [L, R]."""
    num_local = recv.plan.num_tokens_per_expert.shape[0]
    counts = recv.plan.counts[:, buffer.rank * num_local :][:, :num_local].t()
    return (counts.cumsum(1) - counts).bitwise_left_shift_(32).bitwise_or_(counts)
