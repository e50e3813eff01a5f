"""The verbs as ``torch.library`` ops, with their fake kernels and gradients: what compilers and checkpoints see.

Letters: T tokens here, K top-k, H hidden, R rows received, L local experts, C capacity.

An op takes and gives tensors, numbers and strings. So a buffer is its handle, and a plan is the tensors that decide it
(``SavedPlan.tensors()``: topk_idx, counts, partial_rows, src_idx, local_idx), from which it is made again::

    dispatch         picks -> rows, and the plan       gradient: bring
    send             rows along a plan                 gradient: bring
    combine          weighted sums at the owners       gradient: send, and return_weights for weights of picks
    bring            plain sums at the owners, and gradients of the weights that travelled with the rows
    return_weights   gradients of weights alone
    weigh_gradients  of rows and of their weights, where they are; local

The others are collective: all ranks make them in the same order, whatever comes of their results, and no compiler may
leave one out or move it past another, which it would decide by the shapes that one rank has. So each takes ``after``,
which the one before it gave as ``done``: one element, without a meaning, on which compilers see that it depends.

- Forward, ``autograd.dispatch`` and ``combine`` hand it on in ``Buffer.order``, which all buffers of a device share.
  The last one outlives a graph, so that none is left out.
- In backward graphs ``_after`` hands it on while AOTAutograd traces one. There the ops have an ordered effect too, so
  that none is left out. (Alone it would not do: inductor, in torch 2.13, loses the order of effects where it reorders
  for memory. And ``dispatch`` may have none: inductor knows no unbacked sizes that come with an effect, or a mutation.)

To keep what they gave when activations are recomputed, and so not to repeat them, save
``torch.ops.crossdock.dispatch.default`` and ``combine.default`` in the checkpoint's policy. Tensors that a call does
not have are empty.
"""

# no "from __future__ import annotations": torch.library reads the types of the arguments as they are

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from crossdock.backends.base import PlanTensors
from crossdock.buffer import Buffer
from crossdock.direct import Direct
from crossdock.errors import NotSupported, PeerFailed, PeerTimeout
from crossdock.extent import RowCount
from crossdock.layout import Padded
from crossdock.plan import Plan
from crossdock.received import Received
from crossdock.spec import Spec

_IN_BACKWARD = (
    "this was a backward pass, which all ranks run: where one rank's loss leaves a layer's output out, pass it through "
    "crossdock.autograd.touch(loss, output); where its experts answer no rows with what does not depend on them, pass "
    "recv in place of recv.plan to crossdock.autograd.combine"
)


_traced: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
"""What the last call of each backward graph gives that is being traced, by the mode that functionalizes it: the second
state of this library's modules beside buffers by handle, as gradient formulas are told nothing of each other."""


@torch.library.custom_op("crossdock::dispatch", mutates_args=())
def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    weights: Tensor | None,
    anchor: Tensor | None,
    buffer: str,
    rows: str,
    after: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows x [T, H], topk_idx [T, K], weights [T, K] -> rows, their weights, link, the plan's five tensors, done."""
    owner = Buffer.of(buffer)
    with torch.no_grad():
        recv = owner.dispatch(x, topk_idx, weights=weights, rows=cast("RowCount", rows))
        plan = recv.plan
        num_topk = owner.spec.num_topk
        saved = PlanTensors(
            topk_idx=_apart(plan.topk_idx, plan.counts),
            counts=plan.counts,
            partial_rows=_no_ids(x, num_topk) if plan.partial_rows is None else _apart(plan.partial_rows, plan.counts),
            src_idx=recv.src_idx,
            local_idx=_no_ids(x, num_topk) if recv.topk_idx is None else recv.topk_idx,
        )
        owner.keep_plan(plan, saved)
        return (*_own_rows(owner, recv, rows), *saved, _done(x))


@_dispatch.register_fake
def _(
    x: Tensor,
    topk_idx: Tensor,
    weights: Tensor | None,
    anchor: Tensor | None,
    buffer: str,
    rows: str,
    after: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    owner = Buffer.of(buffer)
    spec, num_ranks = owner.spec, owner.topology.num_ranks
    ctx = torch.library.get_ctx()
    lead: tuple[Any, ...]
    if isinstance(spec.layout, Padded):
        lead = (spec.num_local_experts(num_ranks), spec.capacity(num_ranks))
    else:
        lead = (ctx.new_dynamic_size() if rows == "exact" else spec.num_slot_rows(num_ranks),)
    num_pairs = ctx.new_dynamic_size() if owner.has_pairs else 0
    local_lead = (0,) if spec.layout.per_pick else lead
    ids = torch.int32
    return (
        x.new_empty(*lead, spec.hidden, dtype=_row_dtype(spec, unquantized=False)),
        _empty_weights(spec, x, lead, weights),
        x.new_empty(0, dtype=torch.float32),
        torch.empty_like(topk_idx, dtype=torch.int64),
        x.new_empty(num_ranks, owner.arena.num_counts, dtype=torch.int64),
        x.new_empty(num_pairs, spec.num_topk, dtype=ids),
        x.new_empty(*lead, dtype=ids),
        x.new_empty(*local_lead, spec.num_topk, dtype=ids),
        x.new_empty(1, dtype=torch.int64),
    )


@torch.library.custom_op("crossdock::send", mutates_args=())
def _send(  # noqa: PLR0913, PLR0917 - an op's arguments
    x: Tensor,
    weights: Tensor | None,
    anchor: Tensor | None,
    plan: Sequence[Tensor],
    buffer: str,
    rows: str,
    unquantized: bool,
    after: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows x [T, H], weights [T, K] along a plan -> rows, their weights, link, done; see ``Buffer.dispatch``."""
    owner = Buffer.of(buffer)
    with torch.no_grad(), _hint_in_backward(unquantized):
        recv = owner.dispatch(
            x, _plan(owner, plan), weights=weights, rows=cast("RowCount", rows), unquantized=unquantized
        )
        return (*_own_rows(owner, recv, rows), _done(x))


@_send.register_fake
def _(  # noqa: PLR0913, PLR0917 - an op's arguments
    x: Tensor,
    weights: Tensor | None,
    anchor: Tensor | None,
    plan: Sequence[Tensor],
    buffer: str,
    rows: str,
    unquantized: bool,
    after: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec, lead = Buffer.of(buffer).spec, plan[3].shape
    return (
        x.new_empty(*lead, spec.hidden, dtype=_row_dtype(spec, unquantized=unquantized)),
        _empty_weights(spec, x, lead, weights),
        x.new_empty(0, dtype=torch.float32),
        x.new_empty(1, dtype=torch.int64),
    )


@torch.library.custom_op("crossdock::combine", mutates_args=())
def _combine(  # noqa: PLR0913, PLR0917 - an op's arguments
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    link: Tensor | None,
    plan: Sequence[Tensor],
    buffer: str,
    rows: str,
    after: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs where rows came -> [T, H], as ``Buffer.combine``, and done."""
    owner = Buffer.of(buffer)
    with torch.no_grad():
        return owner.combine(y, _plan(owner, plan), weights=weights, bias=bias), _done(y)


@_combine.register_fake
def _(  # noqa: PLR0913, PLR0917 - an op's arguments
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    link: Tensor | None,
    plan: Sequence[Tensor],
    buffer: str,
    rows: str,
    after: Tensor | None,
) -> tuple[Tensor, Tensor]:
    spec = Buffer.of(buffer).spec
    out = y.new_empty(plan[0].shape[0], spec.hidden, dtype=spec.combine_dtype)
    return out, y.new_empty(1, dtype=torch.int64)


@torch.library.custom_op("crossdock::bring", mutates_args=())
def _bring(
    y: Tensor, row_weights: Tensor | None, plan: Sequence[Tensor], buffer: str, after: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows and of their weights -> of tokens [T, H] and of weights [T, K], done."""
    owner = Buffer.of(buffer)
    saved = _plan(owner, plan)
    with torch.no_grad(), _hint_in_backward(True):
        if row_weights is None:
            return owner.combine(y, saved), y.new_empty(0, dtype=torch.float32), _done(y)
        out, (weights,) = owner.combine(y, saved, extras=(row_weights,))
    return out, weights, _done(y)


@_bring.register_fake
def _(
    y: Tensor, row_weights: Tensor | None, plan: Sequence[Tensor], buffer: str, after: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    spec, num_tokens = Buffer.of(buffer).spec, plan[0].shape[0]
    shape = (0,) if row_weights is None else (num_tokens, spec.num_topk)
    return (
        y.new_empty(num_tokens, spec.hidden, dtype=spec.combine_dtype),
        y.new_empty(*shape, dtype=torch.float32),
        y.new_empty(1, dtype=torch.int64),
    )


@torch.library.custom_op("crossdock::return_weights", mutates_args=())
def _return_weights(
    row_weights: Tensor, plan: Sequence[Tensor], buffer: str, after: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of weights where rows came, one per row or [R, K] -> [T, K], done."""
    owner = Buffer.of(buffer)
    with torch.no_grad(), _hint_in_backward(True):
        (weights,) = owner.return_extras(_plan(owner, plan), (row_weights,))
    return weights, _done(row_weights)


@_return_weights.register_fake
def _(row_weights: Tensor, plan: Sequence[Tensor], buffer: str, after: Tensor | None) -> tuple[Tensor, Tensor]:
    weights = row_weights.new_empty(plan[0].shape[0], Buffer.of(buffer).spec.num_topk)
    return weights, row_weights.new_empty(1, dtype=torch.int64)


@torch.library.custom_op("crossdock::weigh_gradients", mutates_args=())
def _weigh_gradients(grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor, buffer: str) -> tuple[Tensor, Tensor]:
    """See ``Buffer.weigh_gradients``. Local; an op, because a kernel of ours is no operation that compilers know."""
    with torch.no_grad():
        return Buffer.of(buffer).weigh_gradients(grads, y, weights, src_idx)


@_weigh_gradients.register_fake
def _(grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor, buffer: str) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape[:-1], dtype=torch.float32)


def _keep_plan(ctx: Any, plan: Sequence[Tensor], buffer: str, rows: str, *more: Tensor | None) -> None:
    ctx.save_for_backward(*plan, *more)
    ctx.buffer, ctx.rows = buffer, rows


def _setup_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weights, _, buffer, rows, _ = inputs
    _keep_plan(ctx, output[3:8], buffer, rows)
    ctx.dtype, ctx.has_weights = x.dtype, weights is not None


def _setup_send(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, _, plan, buffer, rows, _, _ = inputs
    _keep_plan(ctx, plan, buffer, rows)
    ctx.dtype, ctx.has_weights = x.dtype, weights is not None


def _bring_back(ctx: Any, grad_rows: Tensor, grad_row_weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [T, H] and of weights [T, K]: what the rows' go home as."""
    spec = Buffer.of(ctx.buffer).spec
    plan, row_weights = ctx.saved_tensors, None
    if ctx.has_weights:
        row_weights = grad_row_weights
        if not spec.layout.per_pick:
            row_weights = row_weights.masked_fill(plan[4] < 0, 0.0)  # of another rank's pick, a constant here
    *grads, done = bring(grad_rows.to(spec.combine_dtype), row_weights, plan, ctx.buffer, _after())
    _hand_on(done)
    grad_x, grad_weights = grads
    return grad_x.to(ctx.dtype), grad_weights if ctx.has_weights else None


def _dispatch_backward(ctx: Any, grad_rows: Tensor, grad_row_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_x, grad_weights = _bring_back(ctx, grad_rows, grad_row_weights)
    return grad_x, None, grad_weights, None, None, None, None


def _send_backward(ctx: Any, grad_rows: Tensor, grad_row_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_x, grad_weights = _bring_back(ctx, grad_rows, grad_row_weights)
    return grad_x, grad_weights, None, [None] * 5, None, None, None, None


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, weights, bias, link, plan, buffer, rows, _ = inputs
    _keep_plan(ctx, plan, buffer, rows, weights, None if weights is None else y)
    ctx.dtype = y.dtype
    ctx.bias = None if bias is None else (bias.dtype, bias.dim())
    ctx.has_link = link is not None


def _combine_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    """With g the gradient of the row's sum and w its weight: of y, w * g; of w, g . y. Where no row is, 0."""
    *plan, weights, y = ctx.saved_tensors
    _, _, _, src_idx, local_idx = plan
    spec = Buffer.of(ctx.buffer).spec
    of_picks = weights if spec.reduce == "token" else None
    wide = grad.to(spec.combine_dtype)
    g, row_weights, _, done = send(wide, of_picks, None, plan, ctx.buffer, ctx.rows, True, _after())
    _hand_on(done)
    grad_y, grad_weights = g, None
    if weights is not None:
        w = row_weights if spec.reduce == "token" else weights
        if spec.reduce == "token" and not spec.layout.per_pick:
            w = w.sum(dim=-1)
        grad_y, grad_weights = weigh_gradients(g, y, w, src_idx, ctx.buffer)
        if spec.reduce == "token":
            if not spec.layout.per_pick:
                grad_weights = grad_weights.unsqueeze(-1).masked_fill(local_idx < 0, 0.0)
            grad_weights, done = return_weights(grad_weights, plan, ctx.buffer, _after())
            _hand_on(done)
    grad_bias = None
    if ctx.bias is not None:
        dtype, num_dims = ctx.bias
        grad_bias = (grad if num_dims == 2 else grad.sum(dim=0)).to(dtype)
    grad_link = _nothing(grad) if ctx.has_link else None
    return grad_y.to(ctx.dtype), grad_weights, grad_bias, grad_link, [None] * 5, None, None, None


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """What ``_refuse`` needs."""


def _refuse(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise NotSupported(
        "a gradient of a gradient was asked for, and the backward passes of dispatch and combine have none; leave out "
        "create_graph=True, or detach what goes through the layer"
    )


dispatch = Direct(_dispatch, _setup_dispatch, _dispatch_backward)
send = Direct(_send, _setup_send, _send_backward)
combine = Direct(_combine, _setup_combine, _combine_backward)
bring, return_weights, weigh_gradients = (
    Direct(op, _keep_nothing, _refuse) for op in (_bring, _return_weights, _weigh_gradients)
)
for _op in (_send, _bring, _return_weights):
    _register_effectful_op(_op._opoverload, _EffectType.ORDERED)  # noqa: SLF001 - there is no public way to say so


def _after() -> Tensor | None:
    """What the call before gave in the backward graph that is being traced; None where the host makes the calls."""
    mode = _functional_mode()
    return None if mode is None else _traced.get(mode)


def _hand_on(done: Tensor) -> None:
    """For the next call in that graph."""
    if (mode := _functional_mode()) is not None:
        _traced[mode] = done


def _functional_mode() -> Any:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)  # noqa: SLF001


def _done(like: Tensor) -> Tensor:
    """One element, of no inference mode: a graph that trains may be given it next."""
    if not torch.is_inference_mode_enabled():
        return like.new_empty(1, dtype=torch.int64)
    with torch.inference_mode(mode=False):
        return torch.empty(1, dtype=torch.int64, device=like.device)


def _plan(owner: Buffer, tensors: Sequence[Tensor]) -> Plan:
    return owner.remake_plan(PlanTensors(*tensors))


def _apart(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor, or a copy: a plan's tables may lie in one allocation, ``other`` first, an op's results may not."""
    is_shared = tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return tensor.clone() if is_shared else tensor


def _own_rows(owner: Buffer, recv: Received, rows: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that no later dispatch overwrites, zero where none came; their weights, or empty; a link."""
    x = owner.own_rows(recv, cast("RowCount", rows))
    weights = _nothing(x) if recv.weights is None else recv.weights
    return x, weights, _nothing(x)


def _nothing(like: Tensor) -> Tensor:
    """For what an op does not have."""
    return like.new_empty(0, dtype=torch.float32)


def _no_ids(like: Tensor, num_topk: int) -> Tensor:
    """In memory that is this tensor's alone: it may be the plan's token (``PlanMemo``)."""
    return like.new_empty(0, num_topk, dtype=torch.int32)


def _row_dtype(spec: Spec, *, unquantized: bool) -> torch.dtype:
    return spec.combine_dtype if unquantized or not spec.wire.is_unquantized else spec.wire.dtype


def _empty_weights(spec: Spec, like: Tensor, lead: Sequence[Any], weights: Tensor | None) -> Tensor:
    shape = (0,) if weights is None else lead if spec.layout.per_pick else (*lead, spec.num_topk)
    return like.new_empty(*shape, dtype=torch.float32)


@contextmanager
def _hint_in_backward(is_backward: bool) -> Iterator[None]:
    """What most often keeps a peer away from a backward pass, said with the error."""
    try:
        yield
    except (PeerFailed, PeerTimeout) as error:
        if not is_backward:
            raise
        if isinstance(error, PeerTimeout):
            raise PeerTimeout(error.rank, f"{error} ({_IN_BACKWARD})", error.hop) from error
        raise PeerFailed(error.rank, f"{error.reason} ({_IN_BACKWARD})") from error
