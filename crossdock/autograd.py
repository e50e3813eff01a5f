"""Dispatch and combine that autograd differentiates: each is the other's backward, on the same plan.

Letters: T tokens here, K top-k, H hidden, R rows received, L local experts, C capacity, P ranks, W counts.

Rows are the caller's own, dequantised, and zero where no row is. Gradients travel in the combine format. What
autograd, ``torch.compile`` and checkpoints see are the ops of ``crossdock.ops``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossdock import inputs, ops
from crossdock.buffer import Buffer
from crossdock.errors import ConfigError
from crossdock.extent import RowCount
from crossdock.layout import Expanded, Padded
from crossdock.plan import Plan

_ANCHOR = torch.zeros(0, dtype=torch.float32, device="cpu", requires_grad=True)
"""An input of every dispatch, so that its rows want gradients on all ranks: where a rank's own tokens do not, or it has
none, its peers' rows still do. It never gets a gradient itself."""


class SavedPlan(NamedTuple):
    """A plan as tensors, for autograd, compiled graphs and checkpoints; good for any number of sends and combines."""

    topk_idx: Tensor
    """int64 [T, K], this rank's picks."""
    counts: Tensor
    """int64 [P, W], what every rank told every rank."""
    partial_rows: Tensor
    """int32 [pairs, K]: the rows this rank sums for each (token, rank) pair; [0, K] unless ranks sum picks."""
    src_idx: Tensor
    """int32 [R] or [L, C]: source rank * max_tokens + source token of each row, -1 where none is."""
    local_idx: Tensor
    """Compact: int32 [R, K], local experts of each row, -1 for picks of other ranks; else [0, K]."""
    link: Tensor
    """Empty, and differentiable: through it the backward of a combine is followed by that of its dispatch where the
    outputs want no gradient, as those of a rank without rows may."""
    rows: RowCount
    """Whether rows are as many as came, or as the slot has room for."""

    def tensors(self) -> list[Tensor]:
        """What decides the plan, as the ops take it."""
        return [self.topk_idx, self.counts, self.partial_rows, self.src_idx, self.local_idx]


class Dispatched(NamedTuple):
    """What a differentiable dispatch gives. Leading dimensions are [R] for Compact and Expanded, [L, C] for Padded."""

    x: Tensor
    """Rows [R, H] or [L, C, H] in the wire's dtype; of a narrow wire dequantised, in the combine format."""
    weights: Tensor | None
    """float32, when dispatch was given weights: [R, K] for Compact (0 for picks of other ranks), one per row else."""
    num_tokens_per_expert: Tensor
    """int32 [L], the picks of each local expert."""
    expert_offsets: Tensor | None
    """Expanded: int32 [L + 1], where each expert's rows start, and the end."""
    topk_idx: Tensor | None
    """Compact: int32 [R, K], the local experts each row is for; -1 for picks of other ranks."""
    src_idx: Tensor
    """int32: source rank * max_tokens + source token; -1 where no row is."""
    plan: SavedPlan


def dispatch(
    buffer: Buffer,
    x: Tensor,
    routing: Tensor | SavedPlan,
    *,
    weights: Tensor | None = None,
    rows: RowCount | None = None,
) -> Dispatched:
    """``Buffer.dispatch`` that records its gradient. Collective, and its backward too: a combine without weights.

    Under grad mode rows want gradients on every rank, also where x does not, so that all ranks run the same backward
    passes. A rank whose loss leaves the result out must ``touch`` it.

    Args:
        buffer: of the plain verbs; layers may share one. Keep it until the backward pass is over.
        x: [T, H] in the wire's dtype, or any of bfloat16, float16 and float32 where the wire is narrow.
        routing: ``topk_idx`` [T, K], or the plan of an earlier dispatch, to send other rows the same way.
        weights: float32 [T, K], which travel with the rows; their gradients come home with those of the rows.
        rows: as in ``Buffer.dispatch``; not given with a plan.

    Raises:
        ConfigError, CapacityError, PeerFailed, PeerTimeout: as ``Buffer.dispatch``, also in the backward pass.

    >>> from crossdock import Expanded, Fp32, Spec, run_local
    >>> spec = Spec(num_experts=4, num_topk=2, hidden=2, max_tokens=1, wire=Fp32(), layout=Expanded())
    >>> def program(group):
    ...     x = torch.full((1, 2), group.rank + 1.0, requires_grad=True)
    ...     with Buffer(group, spec) as buffer:
    ...         recv = dispatch(buffer, x, torch.tensor([[0, 3]]))
    ...         out = combine(buffer, recv.x**2, recv.plan, weights=torch.tensor([[0.25, 0.75]]))
    ...         out.sum().backward()
    ...     return out.tolist(), x.grad.tolist()
    >>> run_local(program, num_ranks=2)
    [([[1.0, 1.0]], [[2.0, 2.0]]), ([[4.0, 4.0]], [[4.0, 4.0]])]
    """
    if isinstance(routing, Plan):
        raise ConfigError("routing is the plan of a plain dispatch; pass topk_idx, or recv.plan of autograd.dispatch")
    inputs.check_trains(buffer.spec)
    if isinstance(routing, Tensor) and routing.dtype == torch.bool:
        raise ConfigError("routing is bool, a mask of ranks; with gradients pass topk_idx, int64 or int32 [T, K]")
    order = buffer.order
    if isinstance(routing, SavedPlan):
        mode = routing.rows
        x_rows, row_weights, link, done = ops.send(
            x, weights, _ANCHOR, routing.tensors(), buffer.handle, mode, False, order.last
        )
        plan = routing._replace(link=link)
    else:
        mode = rows or ("capacity" if isinstance(buffer.spec.layout, Padded) else "exact")
        x_rows, row_weights, link, topk_idx, counts, partial_rows, src_idx, local_idx, done = ops.dispatch(
            x, routing, weights, _ANCHOR, buffer.handle, mode, order.last
        )
        plan = SavedPlan(topk_idx, counts, partial_rows, src_idx, local_idx, link, mode)
    order.hand_on(done)
    num_tokens = _num_tokens_per_expert(buffer, plan.counts)
    return Dispatched(
        x=x_rows,
        weights=None if weights is None else row_weights,
        num_tokens_per_expert=num_tokens,
        expert_offsets=_expert_offsets(buffer, num_tokens),
        topk_idx=None if buffer.spec.layout.per_pick else plan.local_idx,
        src_idx=plan.src_idx,
        plan=plan,
    )


def combine(
    buffer: Buffer,
    y: Tensor,
    plan: SavedPlan | Dispatched,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``Buffer.combine`` that records its gradient. Collective, and its backward too: a dispatch in the combine format.

    With weights of picks ([T, K], ``reduce="token"``) the backward has one small exchange more, which brings their
    gradients home; with weights of rows (``reduce="rank"``: ``recv.weights``) their gradients are where the rows are.

    Args:
        buffer: that made the plan.
        y: outputs [R, H] or [L, C, H] in the combine format, where their rows came; pushed.
        plan: of the dispatch that brought the rows: ``recv``, or ``recv.plan``. With ``recv`` the backward pass of that
            dispatch follows whatever y was made of. With ``recv.plan``, which may be used again in later steps, y must
            depend on the rows if it wants a gradient at all, or this rank would leave that backward pass out and its
            peers would wait: experts without rows must not answer with ``0 * parameter.sum()`` alone.
        weights: float32, [T, K] or one per row, as in ``Buffer.combine``.
        bias: [T, H] or [H], added to each sum.

    Returns:
        [T, H] in the combine format.

    Raises:
        ConfigError, PeerFailed, PeerTimeout: as ``Buffer.combine``, also in the backward pass.
    """
    link: Tensor | None
    if isinstance(plan, Dispatched):
        plan = plan.plan
        link = plan.link
    elif isinstance(plan, SavedPlan):
        link = None if y.requires_grad else plan.link  # else a plan would tie the graphs of all steps that use it
    else:
        raise ConfigError(f"plan is a {type(plan).__name__}; pass recv or recv.plan of an autograd.dispatch")
    out: Tensor
    out, done = ops.combine(y, weights, bias, link, plan.tensors(), buffer.handle, plan.rows, buffer.order.last)
    buffer.order.hand_on(done)
    return out


def touch(loss: Tensor, *outputs: Tensor) -> Tensor:
    """The loss, unchanged, with gradients of zero for ``outputs``.

    A backward pass through a dispatch or combine is collective. A rank whose loss does not depend on a layer's output
    (it skips a batch, or leaves a branch out) never runs it, and the other ranks' wait ends in an error; with
    ``touch(loss, output)`` it takes part, with gradients of zero. Unlike ``loss + 0 * output.sum()`` this also holds
    where outputs are infinite or NaN.

    >>> loss, out = torch.zeros((), requires_grad=True), torch.tensor([float("inf")], requires_grad=True)
    >>> touch(loss, out).backward()
    >>> loss.grad, out.grad
    (tensor(1.), tensor([0.]))
    """
    touched: Tensor = _Touch.apply(loss, *outputs)  # type: ignore[no-untyped-call]
    return touched


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *outputs: Tensor) -> Tensor:
        ctx.shapes = [(output.shape, output.dtype, output.device) for output in outputs]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)
        return (grad, *zeros)


def _num_tokens_per_expert(buffer: Buffer, counts: Tensor) -> Tensor:
    return counts[:, buffer.arena.counts_of_experts(buffer.rank)].sum(dim=0, dtype=torch.int32)


def _expert_offsets(buffer: Buffer, num_tokens_per_expert: Tensor) -> Tensor | None:
    layout = buffer.spec.layout
    if not isinstance(layout, Expanded):
        return None
    num_rows = (num_tokens_per_expert + layout.alignment - 1) // layout.alignment * layout.alignment
    return torch.nn.functional.pad(num_rows.cumsum(dim=0, dtype=torch.int32), (1, 0))
