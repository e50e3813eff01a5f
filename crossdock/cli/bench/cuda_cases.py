"""The operations measured on GPUs, each with the bits that its result must have: those of gloo on CPU copies.

Letters: T tokens here, K top-k, H hidden, L local experts, P ranks, R received rows, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from crossdock import autograd
from crossdock.buffer import Buffer
from crossdock.cli.bench.cases import Rows, bits, draw_outputs, draw_rows, name_of, name_of_wire, parts_of
from crossdock.cli.bench.config import Job
from crossdock.cli.bench.exchange import AllToAll
from crossdock.cli.bench.traffic import traffic
from crossdock.cli.world import Member
from crossdock.layout import Padded
from crossdock.spec import Spec
from crossdock.wire import Bf16, Fp8, Opaque, Quantized

CACHED, STEP = "dispatch (cached plan, graph)", "training step"
FUSED, PULL, PUSH = "dispatch (fused cast, graph)", "combine (pull)", "combine (push)"
FRESH, WEIGHTED = "dispatch (from picks, graph)", "combine (pull, weighted)"
WEIGHT = 0.5
"""The weight of every pick: a power of two, so that a weighted sum is exactly the sum times the weight."""

Results: TypeAlias = tuple[Rows, ...]


@dataclass(frozen=True, kw_only=True)
class CudaCase:
    """One operation, and the bytes that this rank moves.

    num_bytes, link_bytes: payload, as in ``Case``.
    write_bytes: bytes of the rows that this rank sends; each row is read once and written to several destinations.
    copy_bytes: all other bytes that this rank reads and writes.
    """

    op: str
    wire: str
    spec: Spec
    num_bytes: int
    link_bytes: int
    write_bytes: int
    copy_bytes: int
    num_sms: int | None
    in_graph: bool
    ready: Callable[[], Callable[[], Results]]
    """Prepares the operation, untimed, and returns the call to be timed."""
    wanted: list[Tensor]
    """The bits that its results must have, on the GPU."""
    baseline: Callable[[], object] | None


@contextmanager
def open_cuda_cases(member: Member, job: Job) -> Iterator[tuple[list[CudaCase], list[CudaCase], Buffer]]:
    """The cases of one rank; the cases of the SM sweep, as pairs of dispatch and combine; and the buffer.

    Buffers are open within the block. Collective.
    """
    with ExitStack() as stack:
        side = stack.enter_context(_side(job.spec, member, job))
        cases = [side.cached(), side.eager(), *side.homes()]
        if not isinstance(job.spec.wire, Opaque):  # which has no gradients
            cases.append(side.step())
        if isinstance(job.spec.layout, Padded):
            cases[1:1] = [side.fresh()]
            cases += [side.weighted()] if job.spec.reduce == "token" else []
        if isinstance(job.spec.wire, Fp8):
            wide = stack.enter_context(_side(replace(job.spec, wire=Bf16()), member, job))
            cases[1:1] = [side.fused_cast(), wide.cached()]
        sweep = [case for num_sms in job.sweep_sms for case in (side.cached(num_sms), side.homes(num_sms)[0])]
        yield cases, sweep, side.buffer


@contextmanager
def _side(spec: Spec, member: Member, job: Job) -> Iterator[_Side]:
    with Buffer(None, spec, device=member.device, **job.buffer_options) as buffer:
        yield _Side(buffer, member, job)


class _Side:
    """The buffer of one Spec, rows on the GPU and as CPU copies, and the results of exchanging the copies."""

    def __init__(self, buffer: Buffer, member: Member, job: Job) -> None:
        spec, rank, self._device = buffer.spec, member.rank, member.device
        self.buffer = buffer
        self._asks_host = job.buffer_options.get("mover") == "copy"
        """Whether the host takes part in a dispatch (``mover="copy"``), which then cannot be captured."""
        picks = torch.from_numpy(job.topk_idx).view(member.num_ranks, -1, spec.num_topk)
        self._traffic = traffic(spec, picks, rank)
        self._unquantised, self._x = draw_rows(spec, picks.shape[1], seed=job.seed + rank)
        self._grad = draw_outputs(spec, self._unquantised.shape, seed=job.seed + member.num_ranks + rank)
        self._exchange = AllToAll(spec, member.num_ranks)
        self._route = self._exchange.route(picks[rank])
        self._rows = self._exchange.send(parts_of(self._x), self._route)
        lead = self._rows.parts[0].shape[:-1]
        self._y = draw_outputs(spec, torch.Size((*lead, spec.hidden)), seed=job.seed + rank)
        self._wanted_rows = self._on_gpu((self._rows,))
        self._wanted_sums = self._on_gpu((self._exchange.combine(self._y, self._route),))
        self.topk_idx, self.x = picks[rank].to(self._device), _to(self._x, self._device)
        self.unquantised, self.y = self._unquantised.to(self._device), self._y.to(self._device)
        self.plan = buffer.dispatch(self.x, self.topk_idx).plan
        self._nccl = AllToAll(spec, member.num_ranks) if member.has_nccl else None
        self._nccl_route = self._nccl.route(self.topk_idx) if self._nccl else None

    def cached(self, num_sms: int | None = None) -> CudaCase:
        """A dispatch on a plan of an earlier one."""
        options = _sms_option(num_sms)
        nccl, route, parts = self._nccl, self._nccl_route, parts_of(self.x)
        baseline = (lambda: nccl.send(parts, route)) if nccl and route else None
        call = lambda: (self.buffer.dispatch(self.x, self.plan, **options),)  # noqa: E731 - one of two in a line
        return self._out(CACHED, lambda: call, baseline, num_sms=num_sms)

    def eager(self) -> CudaCase:
        """A fresh dispatch with the default options, from picks to rows."""
        syncs = "" if isinstance(self.buffer.spec.layout, Padded) else ", host sync"
        nccl, parts = self._nccl, parts_of(self.x)
        baseline = (lambda: nccl.dispatch(parts, self.topk_idx)) if nccl else None
        call = lambda: (self.buffer.dispatch(self.x, self.topk_idx),)  # noqa: E731 - as above
        return self._out(f"dispatch (eager{syncs})", lambda: call, baseline, in_graph=False)

    def fused_cast(self) -> CudaCase:
        """A cached dispatch of unquantised rows, cast to FP8 as they are sent."""
        return self._out(FUSED, lambda: lambda: (self.buffer.dispatch(self.unquantised, self.plan),), None)

    def fresh(self) -> CudaCase:
        """A fresh dispatch without a host sync, as in a decode step, of rows that are quantised as they are sent.

        Opaque ones are given as they travel.
        """
        x = self.x if isinstance(self.buffer.spec.wire, Opaque) else self.unquantised
        call = lambda: (self.buffer.dispatch(x, self.topk_idx),)  # noqa: E731 - as above
        return self._out(FRESH, lambda: call, None)

    def weighted(self) -> CudaCase:
        """A pulled combine with a weight per pick, as in a decode step."""

        def pull() -> Callable[[], Results]:
            recv = self.buffer.dispatch(self.x, self.plan)
            rows = recv.output_rows()
            rows.copy_(self.y)
            weights = torch.full(self.topk_idx.shape, WEIGHT, device=self._device)
            return lambda: (self.buffer.combine(rows, recv.plan, weights=weights),)

        sums = self._exchange.combine(self._y, self._route)
        moved_rows = self._traffic.home_received + self._traffic.num_tokens
        return replace(self._home(WEIGHTED, pull, moved_rows, None), wanted=self._on_gpu((sums * WEIGHT,)))

    def homes(self, num_sms: int | None = None) -> list[CudaCase]:
        """A pulled and a pushed combine; only the pushed one where ranks sum first, or outputs lie in no slot."""
        options, spec, moved = _sms_option(num_sms), self.buffer.spec, self._traffic

        def pull() -> Callable[[], Results]:
            recv = self.buffer.dispatch(self.x, self.plan)
            rows = recv.output_rows()
            rows.copy_(self.y)
            return lambda: (self.buffer.combine(rows, recv.plan, **options),)

        def push() -> Callable[[], Results]:
            return lambda: (self.buffer.combine(self.y, self.plan, **options),)

        sums = moved.home_received + moved.num_tokens
        pushed = self._home(PUSH, push, sums + moved.out_received + moved.home_sent, num_sms)
        return [pushed] if spec.ranks_sum_picks or spec.is_staged else [self._home(PULL, pull, sums, num_sms), pushed]

    def step(self) -> CudaCase:
        """A training step, eager: dispatch, combine and their backward passes, with identity experts."""
        buffer, spec, moved = self.buffer, self.buffer.spec, self._traffic
        x = self.unquantised.detach().requires_grad_()
        grad = self._grad.to(self._device)

        def call() -> Results:
            recv = autograd.dispatch(buffer, x, self.topk_idx)
            out = autograd.combine(buffer, recv.x.to(spec.combine_dtype), recv.plan)
            (grad_x,) = torch.autograd.grad(out, x, grad)
            return out.detach(), grad_x

        row_bytes = spec.hidden * spec.combine_dtype.itemsize
        pushed = moved.out_received + moved.home_sent + moved.home_received + moved.num_tokens
        return CudaCase(
            op=STEP,
            wire=name_of_wire(spec.wire),
            spec=spec,
            num_bytes=moved.out_received * (spec.row_bytes() + row_bytes) + 2 * moved.home_sent * row_bytes,
            link_bytes=moved.out_from_others * (spec.row_bytes() + row_bytes) + 2 * moved.home_to_others * row_bytes,
            write_bytes=moved.out_sent * (spec.row_bytes() + row_bytes),
            copy_bytes=2 * pushed * row_bytes,
            num_sms=_num_sms(buffer, None),
            in_graph=False,
            ready=lambda: call,
            wanted=self._on_gpu(self._steps_results()),
            baseline=None,
        )

    def _steps_results(self) -> Results:
        """What a step must give, from CPU copies: the combined rows, and the combined gradients of rows."""
        spec, exchange, route = self.buffer.spec, self._exchange, self._route
        rows = self._rows.parts[0]
        if isinstance(spec.wire, Fp8):
            rows = spec.wire.dequantize(Quantized(*self._rows.parts), spec.combine_dtype)
        grads = exchange.send((self._grad,), route).parts[0]
        return exchange.combine(rows, route), exchange.combine(grads, route)

    def _out(
        self,
        op: str,
        ready: Callable[[], Callable[[], Results]],
        baseline: Callable[[], object] | None,
        *,
        num_sms: int | None = None,
        in_graph: bool = True,
    ) -> CudaCase:
        spec, row_bytes = self.buffer.spec, self.buffer.spec.row_bytes()
        if self._asks_host:
            op, in_graph = op.replace(", graph)", ", eager)"), False
        return CudaCase(
            op=op,
            wire=name_of_wire(spec.wire),
            spec=spec,
            num_bytes=self._traffic.out_received * row_bytes,
            link_bytes=self._traffic.out_from_others * row_bytes,
            write_bytes=self._traffic.out_sent * row_bytes,
            copy_bytes=0,
            num_sms=_num_sms(self.buffer, num_sms),
            in_graph=in_graph,
            ready=ready,
            wanted=self._wanted_rows,
            baseline=baseline,
        )

    def _home(
        self, op: str, ready: Callable[[], Callable[[], Results]], moved_rows: int, num_sms: int | None
    ) -> CudaCase:
        spec = self.buffer.spec
        row_bytes = spec.hidden * spec.combine_dtype.itemsize
        nccl, route = self._nccl, self._nccl_route
        return CudaCase(
            op=op,
            wire=name_of(spec.combine_dtype),
            spec=spec,
            num_bytes=self._traffic.home_sent * row_bytes,
            link_bytes=self._traffic.home_to_others * row_bytes,
            write_bytes=0,
            copy_bytes=moved_rows * row_bytes,
            num_sms=_num_sms(self.buffer, num_sms, loads=op != PUSH),
            in_graph=True,
            ready=ready,
            wanted=self._wanted_sums,
            baseline=(lambda: nccl.combine(self.y, route)) if nccl and route else None,
        )

    def _on_gpu(self, results: Results) -> list[Tensor]:
        return [part.to(self._device) for part in result_bits(results, self.buffer.spec)]


def result_bits(results: Results, spec: Spec) -> list[Tensor]:
    """The rows of all results, as bytes [R, ...]."""
    return [part for result in results for part in bits(result, spec)]


def _to(x: Tensor | Quantized, device: torch.device) -> Tensor | Quantized:
    return Quantized(*(part.to(device) for part in x)) if isinstance(x, Quantized) else x.to(device)


def _sms_option(num_sms: int | None) -> dict[str, Any]:
    return {} if num_sms is None else {"num_sms": num_sms}


def _num_sms(buffer: Buffer, asked: int | None, *, loads: bool = False) -> int | None:
    if asked is not None or buffer.launch is None:
        return asked
    return buffer.launch.num_load_sms if loads else buffer.launch.num_sms
