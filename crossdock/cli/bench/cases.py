"""What is measured: each operation as Crossdock does it, and as the baseline does it, from the same rows.

Letters: T tokens here, K top-k, H hidden, L local experts, P ranks, R received rows, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.buffer import Buffer
from crossdock.cli.bench.exchange import Arrived, GlooExchange
from crossdock.layout import Padded
from crossdock.received import Received
from crossdock.spec import Spec
from crossdock.wire import Bf16, Fp8, Quantized

Rows: TypeAlias = Received | Arrived | Tensor
Ready: TypeAlias = Callable[[], Callable[[], Rows]]
"""Makes ready what is not timed, and gives the call that is."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation, both ways, and the bytes of this rank.

    ``num_bytes`` are the payload (rows and scales, without the small records beside them) that this rank receives in a
    dispatch and sends in a combine; ``link_bytes`` are those of them that come from, or go to, another rank. A row that
    stays on its rank is in the first and not in the second.

    ``copy_bytes`` is what this rank must move at least, in bytes that are read once and written once: in a dispatch the
    rows that it sends; in a combine half of the rows it gets back (they are read) and half of the results (they are
    written).
    """

    op: str
    wire: str
    num_bytes: int
    link_bytes: int
    copy_bytes: int
    ours: Ready
    baseline: Ready


@contextmanager
def open_cases(spec: Spec, topk_idx: Tensor, *, seed: int, keeps_buffers: bool) -> Iterator[list[Case]]:
    """The cases of one rank. Buffers are open until the block ends. Collective.

    A combine is timed on a plan that has not been combined with before, as in training: what Crossdock or the baseline
    works out from a plan when it is first combined with is part of the figure.
    """
    with ExitStack() as stack:
        side = stack.enter_context(_side(spec, topk_idx, seed=seed, keeps_buffers=keeps_buffers))
        cases = [side.dispatch(), side.cached_dispatch(), side.pull(), side.push()]
        if isinstance(spec.wire, Fp8):
            spec = replace(spec, wire=Bf16())
            wide = stack.enter_context(_side(spec, topk_idx, seed=seed, keeps_buffers=keeps_buffers))
            cases[1:1] = [side.fused_cast(), wide.dispatch()]
        yield cases


@contextmanager
def _side(spec: Spec, topk_idx: Tensor, *, seed: int, keeps_buffers: bool) -> Iterator[_Side]:
    exchange = GlooExchange(spec, dist.get_world_size(), keeps_buffers)
    with Buffer(None, spec) as buffer:
        yield _Side(buffer, exchange, topk_idx, seed=seed)


class _Side:
    """One Spec's buffer and baseline with the rows that both move."""

    def __init__(self, buffer: Buffer, exchange: GlooExchange, topk_idx: Tensor, *, seed: int) -> None:
        self.buffer = buffer
        self.exchange = exchange
        self.topk_idx = topk_idx
        spec, generator = buffer.spec, torch.Generator().manual_seed(seed + buffer.rank)
        values = torch.randn(topk_idx.shape[0], spec.hidden, generator=generator)
        self.unquantised = values.to(spec.combine_dtype if isinstance(spec.wire, Fp8) else spec.wire.dtype)
        self.x = spec.wire.quantize(self.unquantised) if isinstance(spec.wire, Fp8) else self.unquantised
        recv = buffer.dispatch(self.x, topk_idx)
        self.plan = recv.plan
        self.route = exchange.route(topk_idx)
        self.y = torch.randn(recv.output_rows().shape, generator=generator).to(spec.combine_dtype)

    def dispatch(self) -> Case:
        """Fresh: from picks to rows."""
        return self._out("dispatch", lambda: self.buffer.dispatch(self.x, self.topk_idx), self._send_fresh)

    def cached_dispatch(self) -> Case:
        """Rows alone, on a plan (a route) that is known."""
        return self._out(
            "dispatch (cached plan)",
            lambda: self.buffer.dispatch(self.x, self.plan),
            lambda: self.exchange.send(_parts(self.x), self.route),
        )

    def fused_cast(self) -> Case:
        """Fresh, from rows that are cast on their way; the baseline casts first."""
        wire = self.buffer.spec.wire
        assert isinstance(wire, Fp8)
        return self._out(
            "dispatch (fused cast)",
            lambda: self.buffer.dispatch(self.unquantised, self.topk_idx),
            lambda: self.exchange.dispatch(_parts(wire.quantize(self.unquantised)), self.topk_idx),
        )

    def pull(self) -> Case:
        """Outputs stay where the experts wrote them, and their owners fetch them."""

        def ready() -> Callable[[], Rows]:
            recv = self.buffer.dispatch(self.x, self.topk_idx)
            rows = recv.output_rows().copy_(self.y)
            return lambda: self.buffer.combine(rows, recv.plan)

        return self._home("combine (pull)", ready)

    def push(self) -> Case:
        """Outputs are an ordinary tensor."""

        def ready() -> Callable[[], Rows]:
            plan = self.buffer.dispatch(self.x, self.topk_idx).plan
            return lambda: self.buffer.combine(self.y, plan)

        return self._home("combine (push)", ready)

    def _send_fresh(self) -> Rows:
        return self.exchange.dispatch(_parts(self.x), self.topk_idx)

    def _out(self, op: str, ours: Callable[[], Rows], baseline: Callable[[], Rows]) -> Case:
        spec = self.buffer.spec
        row_bytes, received, from_others = spec.row_bytes(), sum(self.route.recv_splits), self._from_others()
        return Case(
            op=op,
            wire=_name(spec.wire.dtype),
            num_bytes=received * row_bytes,
            link_bytes=from_others * row_bytes,
            copy_bytes=sum(self.route.send_splits) * row_bytes,
            ours=lambda: ours,
            baseline=lambda: baseline,
        )

    def _home(self, op: str, ours: Ready) -> Case:
        spec = self.buffer.spec
        row_bytes = spec.hidden * spec.combine_dtype.itemsize
        num_back, num_sums = sum(self.route.send_splits), self.topk_idx.shape[0]
        return Case(
            op=op,
            wire=_name(spec.combine_dtype),
            num_bytes=sum(self.route.recv_splits) * row_bytes,
            link_bytes=self._from_others() * row_bytes,
            copy_bytes=(num_back + num_sums) * row_bytes // 2,
            ours=ours,
            baseline=lambda: lambda: self.exchange.combine(self.y, self.route),
        )

    def _from_others(self) -> int:
        return sum(self.route.recv_splits) - self.route.recv_splits[self.buffer.rank]


def bits(rows: Rows, spec: Spec) -> list[Tensor]:
    """The rows that a call gave, as bytes [R, ...], by part (data, scales); without what pads experts' blocks."""
    if isinstance(rows, Tensor):
        return [rows.view(torch.uint8)]
    if isinstance(rows, Received):
        parts, counts = _parts(rows.x), rows.num_tokens_per_expert
    else:
        parts, counts = rows.parts, torch.tensor(rows.route.num_tokens_per_expert)
    as_bytes = [part.view(torch.uint8) for part in parts]
    if not isinstance(spec.layout, Padded):
        return as_bytes
    is_real = torch.arange(as_bytes[0].shape[1]) < counts.unsqueeze(1)  # [L, C]
    return [part[is_real] for part in as_bytes]


def _parts(rows: Tensor | Quantized) -> tuple[Tensor, ...]:
    return tuple(rows) if isinstance(rows, Quantized) else (rows,)


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8"}[dtype]
