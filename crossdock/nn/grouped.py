"""One matrix product per expert over rows that lie expert-major, and the row maps that go with it.

Letters: R rows, L local experts, C capacity per expert, H values in, N values out.
"""

# no "from __future__ import annotations": torch.library reads the types of the arguments as they are

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from crossdock.errors import ConfigError

_NATIVE: Callable[..., Tensor] | None = getattr(torch.nn.functional, "grouped_mm", None)  # torch >= 2.10
_NATIVE_DTYPES = {"cpu": (torch.bfloat16, torch.float16, torch.float32), "cuda": (torch.bfloat16,)}
"""By the type of the device; on GPUs the one for which torch has a kernel, where others are a loop of its own."""
_NATIVE_CAPABILITY = (9, 0)
"""The oldest GPU with that kernel."""
_TRACED_DTYPES = (torch.bfloat16,)
"""torch.compile's view of that function, in torch 2.13, knows no other; there a loop is one op, ``grouped_product``."""
_STRIDE_BYTES = 16


def grouped_mm(
    x: Float[Tensor, "R H"], weights: Float[Tensor, "L N H"], num_tokens_per_expert: Int[Tensor, "L"]
) -> Float[Tensor, "R N"]:
    """``x[r] @ weights[e].T`` for each row ``r`` of expert ``e``, whose rows are one segment after the other.

    What is behind the last segment holds nothing: not in ``x``, in the result, or in their gradients. It has no part in
    the weights' gradients.

    Args:
        x: rows, the first ``num_tokens_per_expert[0]`` of them for expert 0, and so on without gaps.
        weights: one matrix per expert, as `torch.nn.Linear` holds it, in the dtype of ``x``.
        num_tokens_per_expert: rows of each expert; where segments are aligned, with the padding rows.

    Raises:
        ConfigError: the shapes or dtypes do not fit together.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> weights = torch.tensor([[[1.0, 1.0]], [[10.0, 0.0]]])
    >>> grouped_mm(x, weights, torch.tensor([1, 2])).tolist()
    [[3.0], [30.0], [50.0]]
    """
    _check(x, weights, num_tokens_per_expert)
    # torch 2.13's own kernel against the loop, one thread, forward and backward, 8 experts, [128, 64] rows, N=128: 268
    # and 496 us in float32, 497 and 642 in bfloat16; level from 256 rows an expert on; same bits; no host sync. It
    # refuses float64, strides that are no multiple of 16 bytes, and expanded gradients, such as those of a sum.
    if _NATIVE is None or not _is_native(x, weights):
        product = grouped_product if torch.compiler.is_compiling() else _loop
        return product(x, weights, num_tokens_per_expert)
    ends = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
    out = _NATIVE(_dense(x), weights.contiguous().transpose(-2, -1), offs=ends)
    contiguous: Tensor = _ContiguousGradient.apply(out)  # type: ignore[no-untyped-call]
    return contiguous


def expert_ids(
    num_tokens_per_expert: Int[Tensor, "L"], expert_offsets: Int[Tensor, "L+1"] | None, num_rows: int
) -> Int32[Tensor, "R"]:
    """The local expert of each row, -1 for rows that hold none: what grouped GEMMs take that go by rows.

    DeepGEMM's ``m_indices`` for its contiguous layout; such kernels take whole blocks of rows, so the segments must
    start at multiples of the block (128 there): dispatch with ``Expanded(alignment=128)``.

    Args:
        num_tokens_per_expert: rows of each expert, without padding.
        expert_offsets: where each expert's rows start, and the end; None: one expert after the other without gaps.
        num_rows: R, at least the end of the last segment.

    >>> expert_ids(torch.tensor([3, 0, 1]), torch.tensor([0, 4, 4, 8]), 9)
    tensor([ 0,  0,  0, -1,  2, -1, -1, -1, -1], dtype=torch.int32)
    """
    counts = num_tokens_per_expert.to(torch.int64)
    ends = counts.cumsum(0)
    starts = ends - counts if expert_offsets is None else expert_offsets[:-1].to(torch.int64)
    rows = torch.arange(num_rows, dtype=torch.int64, device=counts.device)
    # Of experts that start at the same row, all but the last are empty: the last start that is not behind the row.
    ids = (torch.searchsorted(starts, rows, right=True) - 1).clamp_min(0)
    return torch.where(rows < starts[ids] + counts[ids], ids, -1).to(torch.int32)


def real_rows(num_tokens_per_expert: Int[Tensor, "L"], capacity: int) -> Int64[Tensor, "R"]:
    """Where the rows of a ``[L, C, H]`` block lie that hold a token, as rows of ``[L * C, H]``, expert-major.

    >>> real_rows(torch.tensor([2, 0, 1]), 3)
    tensor([0, 1, 6])
    """
    slots = torch.arange(capacity, dtype=torch.int64, device=num_tokens_per_expert.device)
    return (slots < num_tokens_per_expert.unsqueeze(-1)).flatten().nonzero().squeeze(-1)


def pack(x: Float[Tensor, "L C H"], rows: Int64[Tensor, "R"]) -> Float[Tensor, "R H"]:
    """The rows of a block that hold a token. The others may hold anything, and get a gradient of 0."""
    return x.flatten(0, 1).index_select(0, rows)


def unpack(y: Float[Tensor, "R H"], rows: Int64[Tensor, "R"], *, shape: torch.Size) -> Float[Tensor, "L C H"]:
    """The reverse of `pack`, with zeros in the other rows, whose gradients may hold anything."""
    return y.new_zeros(shape[0] * shape[1], y.shape[-1]).index_copy(0, rows, y).view(shape[0], shape[1], -1)


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return _dense(grad)


def _dense(rows: Tensor) -> Tensor:
    """Without gaps: to torch rows without elements are contiguous whatever their strides, which its kernel refuses."""
    is_dense = rows.stride() == (rows.shape[1], 1)  # which compilers know, as they do not know how many rows there are
    return rows if is_dense else rows.clone(memory_format=torch.contiguous_format)


def _is_native(x: Tensor, weights: Tensor) -> bool:
    """Whether torch's own function takes these."""
    strides = (x.shape[1] * x.element_size(), weights.shape[1] * x.element_size())
    is_compiling = torch.compiler.is_compiling()
    dtypes = _TRACED_DTYPES if is_compiling else _NATIVE_DTYPES.get(x.device.type, ())
    if x.dtype not in dtypes or any(stride % _STRIDE_BYTES for stride in strides):
        return False
    if not x.is_cuda:
        return True
    # A rank that got no rows: nothing to multiply, and nothing for a kernel's descriptors to describe. While tracing,
    # the number of rows is not known.
    has_rows = is_compiling or x.shape[0] > 0
    return has_rows and torch.cuda.get_device_capability(x.device) >= _NATIVE_CAPABILITY


def _loop(x: Tensor, weights: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    counts = num_tokens_per_expert.tolist()
    segments = torch.split(x, [*counts, x.shape[0] - sum(counts)])
    products = [segments[e] @ weights[e].T for e in range(weights.shape[0])]
    return torch.cat([*products, x.new_zeros(segments[-1].shape[0], weights.shape[1])])


@torch.library.custom_op("crossdock::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weights: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """`grouped_mm` by a loop over experts, as one op: compilers see no sizes that depend on counts. Local.

    Traced, the loop's segments have lengths that inductor, in torch 2.13, cannot lower in a full graph.
    """
    return _loop(x, weights, num_tokens_per_expert)


@grouped_product.register_fake
def _(x: Tensor, weights: Tensor, num_tokens_per_expert: Tensor) -> Tensor:  # noqa: ARG001 - the op's own names
    return x.new_empty(x.shape[0], weights.shape[1])


@torch.library.custom_op("crossdock::grouped_outer", mutates_args=())
def grouped_outer(grads: Tensor, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """``[L, N, H]``, the gradient of the weights: of each expert ``grads.T @ x`` over its rows. Local."""
    ends = [0, *num_tokens_per_expert.cumsum(0).tolist()]
    return torch.stack([grads[start:end].T @ x[start:end] for start, end in pairwise(ends)])


@grouped_outer.register_fake
def _(grads: Tensor, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    return x.new_empty(num_tokens_per_expert.shape[0], grads.shape[1], x.shape[1])


def _keep_product(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's own names
    ctx.save_for_backward(*inputs)


def _grouped_product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weights, counts = ctx.saved_tensors
    needs_x, needs_weights, _ = ctx.needs_input_grad
    grad_x = grouped_product(grad, weights.transpose(1, 2), counts) if needs_x else None
    return grad_x, grouped_outer(grad, x, counts) if needs_weights else None, None


grouped_product.register_autograd(_grouped_product_backward, setup_context=_keep_product)


def _check(x: Tensor, weights: Tensor, num_tokens_per_expert: Tensor) -> None:
    if x.dim() != 2 or weights.dim() != 3 or x.shape[1] != weights.shape[2]:
        raise ConfigError(
            f"x has shape {list(x.shape)}, weights {list(weights.shape)}; pass rows [R, H] and weights [L, N, H]"
        )
    if num_tokens_per_expert.shape != weights.shape[:1]:
        raise ConfigError(
            f"num_tokens_per_expert has shape {list(num_tokens_per_expert.shape)}; pass one count for each of the "
            f"{weights.shape[0]} experts that are here"
        )
    if x.dtype != weights.dtype:
        raise ConfigError(f"x is {x.dtype}, weights are {weights.dtype}; cast one of them")
