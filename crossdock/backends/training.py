"""Row operations of training on CPUs, outside of calls: copies of received rows, gradients of weighted rows.

Rows are processed a few at a time, which fit in a core's cache. Letters: R rows, L local experts, C capacity, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crossdock.spec import Spec
from crossdock.wire import Fp8, Quantized

_FEW_ROWS = 32
"""Rows processed at a time: their float32 values fit in a core's L2 cache."""


def own_rows(spec: Spec, rows: Tensor | Quantized, src_idx: Tensor | None) -> Tensor:
    """A copy of rows ``[R, H]`` or ``[L, C, H]``; quantised rows are dequantised to the combine dtype. See Backend.

    Args:
        src_idx: int32 [R] or [L, C]; rows where it is negative are 0. None: every row is copied.

    >>> own_rows(Spec(num_experts=1, num_topk=1, hidden=2, max_tokens=2), torch.ones(2, 2), torch.tensor([3, -1]))
    tensor([[1., 1.],
            [0., 0.]])
    """
    data, wire = rows.data if isinstance(rows, Quantized) else rows, spec.wire
    dtype = spec.combine_dtype if isinstance(rows, Quantized) else data.dtype
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    for few in _few_rows(data.shape[:-1]):
        is_none = None if src_idx is None else src_idx[few] < 0
        if is_none is not None and bool(is_none.all()):
            out[few].zero_()
            continue
        if isinstance(rows, Quantized):
            assert isinstance(wire, Fp8)
            wire.dequantize_into(out[few], Quantized(rows.data[few], rows.scale[few]))
        else:
            out[few].copy_(rows[few])
        if is_none is not None and bool(is_none.any()):
            out[few].masked_fill_(is_none.unsqueeze(-1), 0)
    return out


def weigh_gradients(grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``weights[r] * y[r]``: of y in its dtype, and of weights in float32. See Backend.

    Args:
        grads: gradients of the products, shaped as y: [R, H] or [L, C, H].
        weights: float32 [R] or [L, C].
        src_idx: int32 [R] or [L, C]; gradients are 0 where it is negative, whatever y and weights hold.

    >>> grads, y = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [float("nan")] * 2])
    >>> weigh_gradients(grads, y, torch.tensor([0.5, float("inf")]), torch.tensor([3, -1]))
    (tensor([[0.5000, 1.0000],
            [0.0000, 0.0000]]), tensor([11.,  0.]))
    """
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    grad_weights = torch.empty(y.shape[:-1], dtype=torch.float32, device=y.device)
    for few in _few_rows(y.shape[:-1]):
        is_none, grad = src_idx[few] < 0, grads[few].float()
        torch.mul(grad, weights[few].masked_fill(is_none, 0.0).unsqueeze(-1), out=grad_y[few])
        grad_weights[few] = (grad * y[few]).sum(dim=-1).masked_fill_(is_none, 0.0)
    return grad_y, grad_weights


def _few_rows(lead: torch.Size) -> Iterator[tuple[int | slice, ...]]:
    """Indices of ``_FEW_ROWS`` rows of one segment at a time, into tensors ``[R, ...]`` or ``[L, C, ...]``."""
    if len(lead) > 1:
        for i in range(lead[0]):
            yield from ((i, *few) for few in _few_rows(lead[1:]))
        return
    for start in range(0, lead[0], _FEW_ROWS):
        yield (slice(start, start + _FEW_ROWS),)
