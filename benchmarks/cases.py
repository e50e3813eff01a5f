"""The cases of Crossdock and of each peer, over one recipe. Peers are imported when they are opened."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.recipe import Case, Recipe, Turn
from crossdock import Buffer, Compact, Fp8, Received, autograd
from crossdock.cli.bench.cases import bits, draw_outputs, parts_of
from crossdock.cli.bench.exchange import AllToAll

SYNC, FRESH, CACHED = "dispatch, host sync", "dispatch, no host sync", "dispatch, cached plan"
CAST = "dispatch, cast on the way"
PULL, PUSH, WEIGHTED = "combine, in place", "combine, any tensor", "combine, weighted"
ROUND, STEP = "round trip", "training step"
OPS = (SYNC, FRESH, CAST, CACHED, PULL, PUSH, WEIGHTED, ROUND, STEP)

Opener = Callable[[Recipe], AbstractContextManager[list[Case]]]


@contextmanager
def open_crossdock(recipe: Recipe) -> Iterator[list[Case]]:
    """Crossdock's cases; the buffer is open within the block. Collective."""
    with Buffer(None, recipe.spec, device=recipe.device, **recipe.job.buffer_options) as buffer:
        yield _Crossdock(buffer, recipe).cases()


class _Crossdock:
    def __init__(self, buffer: Buffer, recipe: Recipe) -> None:
        self.buffer, self.recipe = buffer, recipe
        self.waits = recipe.device.type == "cpu"
        recv = buffer.dispatch(recipe.x, recipe.topk_idx)
        self.plan, self.y = recv.plan, recipe.outputs(parts_of(recv.x))

    def cases(self) -> list[Case]:
        """All cases: Compact adds a dispatch with a host sync and a training step, other layouts a weighted combine."""
        dispatch, recipe = self.buffer.dispatch, self.recipe
        fresh = functools.partial(dispatch, recipe.x, recipe.topk_idx, rows="capacity")
        cast = functools.partial(dispatch, recipe.unquantised, recipe.topk_idx, rows="capacity")
        cases = [self._dispatch(FRESH, fresh), self._dispatch(CACHED, lambda: dispatch(recipe.x, self.plan))]
        if isinstance(recipe.spec.wire, Fp8):
            cases.append(self._dispatch(CAST, cast))
        cases += [self._combine(PULL), self._combine(PUSH), self._round()]
        if not isinstance(recipe.spec.layout, Compact):
            return [*cases, self._combine(WEIGHTED)]
        exact = Turn(lambda: dispatch(recipe.x, recipe.topk_idx, rows="exact"))
        check = lambda recv: recipe.check_rows(bits(recv, recipe.spec))  # noqa: E731 - it is short
        return [Case(op=SYNC, ready=lambda: exact, check=check, in_graph=False, waits=True), *cases, self._step()]

    def _dispatch(self, op: str, call: Callable[[], Received]) -> Case:
        def check(recv: Received) -> None:  # rows="capacity": the slot may be longer than the rows
            self.recipe.check_rows([part[: self.recipe.num_rows] for part in bits(recv, self.recipe.spec)])

        return Case(op=op, ready=lambda: Turn(call), check=check, waits=self.waits)

    def _combine(self, op: str) -> Case:
        buffer, recipe, weights = self.buffer, self.recipe, self.recipe.weights if op == WEIGHTED else None

        def ready() -> Turn:
            recv = buffer.dispatch(recipe.x, self.plan)
            y = self.y if op == PUSH else recv.output_rows().copy_(self.y)
            return Turn(lambda: buffer.combine(y, recv.plan, weights=weights))

        check = functools.partial(recipe.check_sums, is_weighted=weights is not None)
        return Case(op=op, ready=ready, check=check, waits=self.waits)

    def _round(self) -> Case:
        """A round trip: dispatch without a host sync, then a combine of its output rows."""

        def play(experts: Callable[[Received], object]) -> Tensor:
            recv = self.buffer.dispatch(self.recipe.x, self.recipe.topk_idx, rows="capacity")
            experts(recv)
            return self.buffer.combine(recv.output_rows(), recv.plan)

        write = lambda recv: recv.output_rows().copy_(self.recipe.outputs(parts_of(recv.x)))  # noqa: E731 - it is short
        return Case(
            op=ROUND,
            ready=lambda: Turn(lambda: play(lambda _: None)),
            check=self.recipe.check_sums,
            checked=lambda: play(write),
            waits=self.waits,
        )

    def _step(self) -> Case:
        """A training step: dispatch, combine and their backward passes, with identity experts."""
        buffer, recipe = self.buffer, self.recipe
        x = recipe.unquantised.detach().requires_grad_()
        grad = draw_outputs(recipe.spec, x.shape, seed=recipe.job.seed + recipe.rank).to(recipe.device)

        def call() -> tuple[Tensor, Tensor]:
            recv = autograd.dispatch(buffer, x, recipe.topk_idx)
            out = autograd.combine(buffer, recv.x, recv.plan)
            (grad_x,) = torch.autograd.grad(out, x, grad)
            return out.detach(), grad_x

        check = functools.partial(recipe.check_step, grad=grad)
        return Case(op=STEP, ready=lambda: Turn(call), check=check, in_graph=False, waits=True)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A peer's dispatch and combine, as functions. The other functions take the result of ``dispatch``.

    parts: the received tensors (data, scales), with all rows of the peer's buffer.
    real: mask or slice of the flattened ``parts`` that selects the received rows.
    in_place: the tensor from which combine can read outputs without a copy; None: there is none.
    is_ordered: whether rows arrive in the layout's order.
    alternates: whether a combine must follow each dispatch.
    is_weighted: whether combine applies ``recipe.weights``.
    in_graph: whether calls can be captured in a CUDA graph.
    tolerance: relative error allowed for a peer's own cast to FP8; 0: results are compared bit for bit.
    """

    recipe: Recipe
    dispatch: Callable[[], Any]
    combine: Callable[[Tensor, Any], Tensor]
    parts: Callable[[Any], tuple[Tensor, ...]]
    real: Callable[[Any], Tensor | slice] = lambda _: slice(None)
    in_place: Callable[[], Tensor] | None = None
    close: Callable[[], object] = lambda: None
    op: str = FRESH
    is_ordered: bool = True
    alternates: bool = False
    is_weighted: bool = False
    in_graph: bool = True
    tolerance: float = 0.0

    def cases(self) -> list[Case]:
        """All cases: dispatch, combine of any tensor and in place, and a round trip."""
        in_place = self.in_place is not None
        cases = [self._dispatch(), self._home(WEIGHTED if self.is_weighted else PUSH), self._home(ROUND, in_place)]
        return [*cases, self._home(PULL, in_place)] if in_place else cases

    def _dispatch(self) -> Case:
        def ready() -> Turn:
            dispatch, combine = self._steps(in_place=self.in_place is not None)
            return Turn(dispatch, after=combine if self.alternates else None)

        return self._case(op=self.op, ready=ready, check=self.check_rows)

    def _home(self, op: str, in_place: bool = False) -> Case:  # noqa: FBT001, FBT002 - private, and used twice
        def ready() -> Turn:
            dispatch, combine = self._steps(in_place=in_place)
            if op == ROUND:
                return Turn(lambda: (dispatch(), combine())[1])
            return Turn(combine, before=dispatch if self.alternates else None)

        def checked() -> Tensor:
            got = self.dispatch()
            return self.combine(self._outputs(got, in_place=in_place), got)

        check = functools.partial(self.recipe.check_sums, is_weighted=self.is_weighted, tolerance=self.tolerance)
        return self._case(op=op, ready=ready, check=check, checked=checked)

    def _case(self, **fields: Any) -> Case:
        return Case(in_graph=self.in_graph, waits=not self.in_graph, **fields)

    def check_rows(self, got: Any) -> None:
        """Raises WrongRows unless the result of a dispatch has the recipe's rows."""
        lead = 2 if self.recipe.spec.layout.per_pick else 1
        rows = [part.flatten(0, lead - 1)[self.real(got)] for part in self.parts(got)]
        self.recipe.check_rows(rows, is_ordered=self.is_ordered, tolerance=self.tolerance)

    def _steps(self, *, in_place: bool) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
        """A dispatch, and the combine of the latest dispatch's result. Each has been called once."""
        last = [self.dispatch()]
        y, room = self._outputs(last[0], in_place=in_place), self.in_place

        def dispatch() -> Any:
            last[0] = self.dispatch()
            return last[0]

        def combine() -> Tensor:
            return self.combine(room() if in_place and room else y, last[0])

        combine()
        return dispatch, combine

    def _outputs(self, got: Any, *, in_place: bool) -> Tensor:
        y = self.recipe.outputs(self.parts(got))
        return self.in_place().copy_(y) if in_place and self.in_place else y


def _all_to_all(recipe: Recipe) -> Exchange:
    """``all_to_all_single``: exchanges counts, then rows, and returns outputs in the same way."""
    exchange = AllToAll(recipe.spec, recipe.num_ranks)

    def real(got: Any) -> Tensor | slice:
        if isinstance(recipe.spec.layout, Compact):
            return slice(None)
        slots = torch.arange(got.parts[0].shape[1])
        return (slots < torch.tensor(got.route.num_tokens_per_expert).unsqueeze(1)).flatten().to(recipe.device)

    return Exchange(
        recipe=recipe,
        dispatch=lambda: exchange.dispatch(recipe.parts, recipe.topk_idx),
        combine=lambda y, got: exchange.combine(y, got.route),
        parts=lambda got: got.parts,
        real=real,
        op=SYNC,
        in_graph=False,
    )


def _flashinfer(recipe: Recipe) -> Exchange:
    """FlashInfer's one-sided all-to-all: a row per (token, rank), in unordered blocks by source; no cached plan."""
    mnnvl: Any = importlib.import_module("flashinfer.comm.mnnvl")
    mnnvl.MnnvlMemory.supports_mnnvl = staticmethod(lambda: True)  # within a host it goes on with file descriptors
    moe_ep: Any = importlib.import_module("flashinfer.moe_ep")
    one_sided: Any = importlib.import_module("flashinfer.moe_ep.backends.split.comm.nvlink_one_sided.communication")
    spec, topk_idx = recipe.spec, recipe.topk_idx.to(torch.int32)
    comm = one_sided.NVLinkOneSidedAlltoAll(
        moe_ep.BootstrapConfig(world_size=recipe.num_ranks, rank=recipe.rank, device=torch.cuda.current_device()),
        moe_ep.MoEEpCommParams(
            num_experts=spec.num_experts,
            top_k=spec.num_topk,
            max_tokens_per_rank=recipe.num_tokens,
            hidden_size=spec.hidden,
            dtype=spec.combine_dtype,
        ),
    )
    data, scale = recipe.parts if len(recipe.parts) == 2 else (recipe.parts[0], None)
    x = data if scale is None else data.view(torch.uint8)

    def parts(got: Any) -> tuple[Tensor, ...]:
        rows = got.hidden_states.view(data.dtype)
        return (rows,) if scale is None else (rows, got.hidden_states_scale)

    return Exchange(
        recipe=recipe,
        dispatch=lambda: comm.dispatch(x, topk_idx, hidden_states_scale=scale),
        combine=lambda y, _: comm.combine(y),
        parts=parts,
        real=lambda got: (got.topk_ids >= 0).any(dim=1),
        in_place=lambda: comm.get_combine_input_buffer(spec.combine_dtype),
        close=comm.destroy,
        is_ordered=False,
        alternates=True,
    )


_FACADE = "crossdock.compat.deep_ep"
"""The same code with Crossdock in DeepEP's place."""


def _deepep_v1(recipe: Recipe, module: str = "deep_ep") -> Exchange:
    """``deep_ep.Buffer``'s high-throughput calls, with tensors for the worst case, hence without a host sync."""
    buffer_class: Any = importlib.import_module(module).Buffer
    buffer_class.set_num_sms(_num_sms())
    num_ranks, x = recipe.num_ranks, _given(recipe)
    configs = (buffer_class.get_dispatch_config(num_ranks), buffer_class.get_combine_config(num_ranks))
    hint = max(config.get_nvl_buffer_size_hint(recipe.spec.hidden * 2, num_ranks) for config in configs)
    buffer = buffer_class(dist.group.WORLD, num_nvl_bytes=hint, explicitly_destroy=True)

    def dispatch() -> Any:
        per_rank, _, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(recipe.topk_idx, recipe.spec.num_experts)
        return buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=recipe.topk_idx,
            topk_weights=recipe.weights,
            num_worst_tokens=num_ranks * recipe.num_tokens,
        )

    return Exchange(
        recipe=recipe,
        dispatch=dispatch,
        combine=lambda y, got: buffer.combine(y, got[4])[0],
        parts=_came,
        real=lambda got: (got[1] >= 0).any(dim=1),
        close=buffer.destroy,
    )


def _deepep_low_latency(recipe: Recipe, module: str = "deep_ep") -> Exchange:
    """``deep_ep.Buffer``'s low-latency calls: rows by expert, cast as they are sent if the wire is FP8."""
    buffer_class: Any = importlib.import_module(module).Buffer
    spec, num_ranks, num_tokens = recipe.spec, recipe.num_ranks, recipe.num_tokens
    is_fp8 = isinstance(spec.wire, Fp8)
    buffer = buffer_class(
        dist.group.WORLD,
        num_rdma_bytes=buffer_class.get_low_latency_rdma_size_hint(
            num_tokens, spec.hidden, num_ranks, spec.num_experts
        ),
        low_latency_mode=True,
        num_qps_per_rank=spec.num_local_experts(num_ranks),
        explicitly_destroy=True,
    )

    return Exchange(
        recipe=recipe,
        dispatch=lambda: buffer.low_latency_dispatch(
            recipe.unquantised, recipe.topk_idx, num_tokens, spec.num_experts, use_fp8=is_fp8
        ),
        combine=lambda y, got: buffer.low_latency_combine(y, recipe.topk_idx, recipe.weights, got[2])[0],
        parts=_came,
        real=lambda got: (torch.arange(_came(got)[0].shape[1], device=got[1].device) < got[1].unsqueeze(1)).flatten(),
        close=buffer.destroy,
        op=CAST if is_fp8 else FRESH,
        alternates=True,
        is_weighted=True,
        tolerance=2.0**-3 if is_fp8 else 0.0,
    )


def _deepep_v2(recipe: Recipe, module: str = "deep_ep") -> Exchange:
    """``deep_ep.ElasticBuffer``: a row per (token, rank), without a host sync."""
    spec, num_sms, x = recipe.spec, _num_sms(), _given(recipe)
    buffer = importlib.import_module(module).ElasticBuffer(
        dist.group.WORLD,
        num_max_tokens_per_rank=recipe.num_tokens,
        hidden=spec.hidden,
        num_topk=spec.num_topk,
        use_fp8_dispatch=isinstance(spec.wire, Fp8),
        explicitly_destroy=True,
    )
    return Exchange(
        recipe=recipe,
        dispatch=lambda: buffer.dispatch(
            x, recipe.topk_idx, num_experts=spec.num_experts, num_sms=num_sms, do_cpu_sync=False
        ),
        combine=lambda y, got: buffer.combine(y, got[3], num_sms=num_sms)[0],
        parts=_came,
        real=lambda got: slice(int(got[3].psum_num_recv_tokens_per_scaleup_rank[-1])),
        close=buffer.destroy,
        is_ordered=False,
    )


def _given(recipe: Recipe) -> Tensor | tuple[Tensor, ...]:
    """Rows in the form that DeepEP takes."""
    return recipe.parts if len(recipe.parts) == 2 else recipe.parts[0]


def _came(got: Any) -> tuple[Tensor, ...]:
    """Received rows from DeepEP's result."""
    return (got[0],) if isinstance(got[0], Tensor) else tuple(got[0])


def _num_sms() -> int:
    """SMs for DeepEP: three quarters of those that the rank sees, an even number, at most 24; 20, of none, on CPUs."""
    if not torch.cuda.is_available():
        return 20
    visible = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return min(24, visible * 3 // 8 * 2)


def _opener(compact: Callable[[Recipe], Exchange], padded: Callable[[Recipe], Exchange] | None = None) -> Opener:
    @contextmanager
    def opened(recipe: Recipe) -> Iterator[list[Case]]:
        make = compact if isinstance(recipe.spec.layout, Compact) else padded
        if make is None:
            yield []
            return
        exchange = make(recipe)
        yield exchange.cases()
        exchange.close()  # collective, so not after an error

    return opened


OPENERS: dict[str, Opener] = {
    "crossdock": open_crossdock,
    "flashinfer": _opener(_flashinfer),
    "facade-v1": _opener(
        functools.partial(_deepep_v1, module=_FACADE), functools.partial(_deepep_low_latency, module=_FACADE)
    ),
    "facade-v2": _opener(functools.partial(_deepep_v2, module=_FACADE)),
    "deepep-v1": _opener(_deepep_v1, _deepep_low_latency),
    "deepep-v2": _opener(_deepep_v2),
    "nccl": _opener(_all_to_all, _all_to_all),
    "gloo": _opener(_all_to_all, _all_to_all),
}
