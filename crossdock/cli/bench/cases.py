"""The operations measured on CPUs, each by Crossdock and by the baseline, with the same rows.

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
from crossdock.cli.bench.config import WIRES, Job
from crossdock.cli.bench.exchange import AllToAll, Arrived
from crossdock.cli.bench.traffic import Traffic, traffic
from crossdock.layout import Padded
from crossdock.received import Received
from crossdock.spec import Spec
from crossdock.wire import Bf16, Fp8, Opaque, Quantized, Wire

Rows: TypeAlias = Received | Arrived | Tensor
Ready: TypeAlias = Callable[[], Callable[[], Rows]]
"""Prepares an operation, untimed, and returns the call to be timed."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation by Crossdock and by the baseline, and the bytes that this rank moves.

    num_bytes: payload (rows and scales, without metadata) that this rank receives in a dispatch, or sends in a combine.
    link_bytes: the part of ``num_bytes`` that comes from, or goes to, another rank.
    copy_bytes: the least that this rank must move, in bytes that are read once and written once. In a dispatch: the
        rows that it sends. In a combine: half of the returned rows (they are only read) and half of the results (they
        are only written).
    """

    op: str
    wire: str
    num_bytes: int
    link_bytes: int
    copy_bytes: int
    ours: Ready
    baseline: Ready


@contextmanager
def open_cases(job: Job) -> Iterator[list[Case]]:
    """The cases of one rank; buffers are open within the block. Collective.

    Each timed combine uses a plan for the first time, as in training: what a side computes from a plan at its first
    combine is part of the figure.
    """
    with ExitStack() as stack:
        side = stack.enter_context(_side(job.spec, job))
        cases = [side.dispatch(), side.cached_dispatch(), side.pull(), side.push()]
        if job.spec.ranks_sum_picks or job.spec.is_staged:
            del cases[2]  # where ranks sum first, or outputs lie in no slot, they are always pushed
        if isinstance(job.spec.wire, Fp8):
            wide = stack.enter_context(_side(replace(job.spec, wire=Bf16()), job))
            cases[1:1] = [side.fused_cast(), wide.dispatch()]
        yield cases


@contextmanager
def _side(spec: Spec, job: Job) -> Iterator[_Side]:
    exchange = AllToAll(spec, dist.get_world_size(), job.keeps_buffers)
    with Buffer(None, spec) as buffer:
        yield _Side(buffer, exchange, job)


class _Side:
    """The buffer and the baseline of one Spec, and the rows that both move."""

    def __init__(self, buffer: Buffer, exchange: AllToAll, job: Job) -> None:
        self.buffer = buffer
        self.exchange = exchange
        picks = torch.from_numpy(job.topk_idx).view(exchange.num_ranks, -1, buffer.spec.num_topk)
        self.topk_idx = picks[buffer.rank]
        self.traffic: Traffic = traffic(buffer.spec, picks, buffer.rank)
        self.unquantised, self.x = draw_rows(buffer.spec, len(self.topk_idx), seed=job.seed + buffer.rank)
        recv = buffer.dispatch(self.x, self.topk_idx)
        self.plan = recv.plan
        self.route = exchange.route(self.topk_idx)
        self.y = draw_outputs(buffer.spec, recv.output_rows().shape, seed=job.seed + buffer.rank)

    def dispatch(self) -> Case:
        """A fresh dispatch, from picks to rows."""
        return self._out("dispatch", lambda: self.buffer.dispatch(self.x, self.topk_idx), self._send_fresh)

    def cached_dispatch(self) -> Case:
        """A dispatch on a plan of an earlier one; the baseline reuses its route."""
        return self._out(
            "dispatch (cached plan)",
            lambda: self.buffer.dispatch(self.x, self.plan),
            lambda: self.exchange.send(parts_of(self.x), self.route),
        )

    def fused_cast(self) -> Case:
        """A fresh dispatch of unquantised rows, cast to FP8 as they are sent; the baseline casts first."""
        wire = self.buffer.spec.wire
        assert isinstance(wire, Fp8)
        return self._out(
            "dispatch (fused cast)",
            lambda: self.buffer.dispatch(self.unquantised, self.topk_idx),
            lambda: self.exchange.dispatch(parts_of(wire.quantize(self.unquantised)), self.topk_idx),
        )

    def pull(self) -> Case:
        """A combine of ``recv.output_rows()``: owners pull the rows."""

        def ready() -> Callable[[], Rows]:
            recv = self.buffer.dispatch(self.x, self.topk_idx)
            rows = recv.output_rows().copy_(self.y)
            return lambda: self.buffer.combine(rows, recv.plan)

        return self._home("combine (pull)", ready)

    def push(self) -> Case:
        """A combine of an ordinary tensor: this rank pushes the rows."""

        def ready() -> Callable[[], Rows]:
            plan = self.buffer.dispatch(self.x, self.topk_idx).plan
            return lambda: self.buffer.combine(self.y, plan)

        return self._home("combine (push)", ready)

    def _send_fresh(self) -> Rows:
        return self.exchange.dispatch(parts_of(self.x), self.topk_idx)

    def _out(self, op: str, ours: Callable[[], Rows], baseline: Callable[[], Rows]) -> Case:
        spec, row_bytes = self.buffer.spec, self.buffer.spec.row_bytes()
        return Case(
            op=op,
            wire=name_of_wire(spec.wire),
            num_bytes=self.traffic.out_received * row_bytes,
            link_bytes=self.traffic.out_from_others * row_bytes,
            copy_bytes=self.traffic.out_sent * row_bytes,
            ours=lambda: ours,
            baseline=lambda: baseline,
        )

    def _home(self, op: str, ours: Ready) -> Case:
        spec = self.buffer.spec
        row_bytes = spec.hidden * spec.combine_dtype.itemsize
        return Case(
            op=op,
            wire=name_of(spec.combine_dtype),
            num_bytes=self.traffic.home_sent * row_bytes,
            link_bytes=self.traffic.home_to_others * row_bytes,
            copy_bytes=(self.traffic.home_received + self.traffic.num_tokens) * row_bytes // 2,
            ours=ours,
            baseline=lambda: lambda: self.exchange.combine(self.y, self.route),
        )


def draw_rows(spec: Spec, num_tokens: int, *, seed: int) -> tuple[Tensor, Tensor | Quantized]:
    """Random rows [T, H]: unquantised, and as passed to a dispatch.

    These are quantised for Fp8, of any bits for Opaque, and else the same tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_tokens, spec.hidden, generator=generator)
    if isinstance(spec.wire, Opaque):
        wire, hidden = spec.wire, spec.hidden
        parts = (wire.num_columns(hidden), wire.dtype), (wire.num_scales(hidden), wire.scale_dtype)
        sizes = [(num_tokens, columns * dtype.itemsize) for columns, dtype in parts]
        raw = [torch.randint(256, size, dtype=torch.uint8, generator=generator) for size in sizes]
        data, scale = (part.view(dtype) for part, (_, dtype) in zip(raw, parts, strict=True))
        return values.to(spec.combine_dtype), Quantized(data, scale)
    if isinstance(spec.wire, Fp8):
        rows = values.to(spec.combine_dtype)
        return rows, spec.wire.quantize(rows)
    rows = values.to(spec.wire.dtype)
    return rows, rows


def draw_outputs(spec: Spec, shape: torch.Size, *, seed: int) -> Tensor:
    """Random outputs of experts, in the combine dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(~seed)).to(spec.combine_dtype)


def bits(rows: Rows, spec: Spec) -> list[Tensor]:
    """The rows of a result as bytes [R, ...], by part (data, scales); without the padding of Padded blocks."""
    if isinstance(rows, Tensor):
        return [rows.view(torch.uint8)]
    if isinstance(rows, Received):
        parts, counts = parts_of(rows.x), rows.num_tokens_per_expert
    else:
        parts, counts = rows.parts, torch.tensor(rows.route.num_tokens_per_expert)
    as_bytes = [part.view(torch.uint8) for part in parts]
    if not isinstance(spec.layout, Padded):
        return as_bytes
    slots = torch.arange(as_bytes[0].shape[1], device=counts.device)
    is_real = (slots < counts.unsqueeze(1)).to(as_bytes[0].device)  # [L, C]
    return [part[is_real] for part in as_bytes]


def parts_of(rows: Tensor | Quantized) -> tuple[Tensor, ...]:
    """The rows' tensors: data, and scales if quantised."""
    return tuple(rows) if isinstance(rows, Quantized) else (rows,)


def name_of_wire(wire: Wire) -> str:
    """The command line's name of a wire."""
    return next(name for name, known in WIRES.items() if known == wire)


def name_of(dtype: torch.dtype) -> str:
    """The command line's name of a dtype."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8"}[dtype]
