"""Experts as three stacks of matrices, and what runs them pick by pick.

Letters: R rows, K top-k, L experts that are here, C capacity per expert, H hidden, F intermediate.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import silu

from crossdock.errors import ConfigError
from crossdock.fields import is_integer
from crossdock.nn.grouped import grouped_mm, pack, real_rows, unpack


class GroupedExperts(nn.Module):
    """SwiGLU experts: ``w2[e] @ (silu(w1[e] @ x) * (w3[e] @ x))`` for the rows of each expert ``e``.

    Parameters ``w1`` and ``w3`` ``[L, F, H]``, ``w2`` ``[L, H, F]``: names, shapes and ``forward`` are those of
    torchtitan's module of this name, and either can stand for the other. They may be DTensors sharded along dim 0,
    as `ShardExperts` makes them; then each rank runs its own.

    Rows are computed in the weights' dtype, or in autocast's, and the result has it.

    Args:
        num_experts: how many experts this module holds: on a rank of its own, that rank's.
        hidden: H.
        intermediate: F.

    >>> experts = GroupedExperts(num_experts=2, hidden=4, intermediate=8)
    >>> experts(torch.ones(3, 4), torch.tensor([1, 2])).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("hidden", hidden), ("intermediate", intermediate)):
            if not is_integer(value, least=1):
                raise ConfigError(f"{name}={value!r}; pass a positive integer")
        self.hidden = hidden
        self.w1 = nn.Parameter(torch.empty(num_experts, intermediate, hidden, dtype=dtype, device=device))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, intermediate, dtype=dtype, device=device))
        self.w3 = nn.Parameter(torch.empty(num_experts, intermediate, hidden, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws each matrix as `torch.nn.Linear` does: uniform within ``1 / sqrt(values in)``."""
        for weight in (self.w1, self.w2, self.w3):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    @property
    def num_experts(self) -> int:
        """Experts of all ranks when the parameters are DTensors, else those that are here."""
        return self.w1.shape[0]

    def forward(
        self, x: Float[Tensor, "R H"] | Float[Tensor, "L C H"], num_tokens_per_expert: Int[Tensor, "L"]
    ) -> Float[Tensor, "R H"] | Float[Tensor, "L C H"]:
        """Outputs in the places of their rows.

        Args:
            x: ``[R, H]``, expert-major without gaps; or ``[L, C, H]``, where what lies behind an expert's count may be
                anything, NaN too: its output is 0, and it has no part in any gradient.
            num_tokens_per_expert: rows of each expert. Of aligned segments ``[R, H]``, the segments' lengths: their
                padding rows are zero, and zero is what comes out of them. What is behind the last one stays undefined.

        Raises:
            ConfigError: the shapes do not fit together.
        """
        if x.dim() == 3:
            rows = real_rows(num_tokens_per_expert, x.shape[1])
            # 25 ms against 197 for a masked torch.bmm over [4, 2048, 512] rows, an eighth of them real (float32, F=512,
            # one thread), 9.8 against 11.2 where four fifths of 8 * 128 are; on a GPU it is a host sync.
            return unpack(self._swiglu(pack(x, rows), num_tokens_per_expert), rows, shape=x.shape)
        return self._swiglu(x, num_tokens_per_expert)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden={self.hidden}, intermediate={self.w1.shape[1]}"

    def _swiglu(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        dtype = self.w1.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        w1, w2, w3 = (local(weight).to(dtype) for weight in (self.w1, self.w2, self.w3))
        x = x.to(dtype)
        gated = silu(grouped_mm(x, w1, num_tokens_per_expert)) * grouped_mm(x, w3, num_tokens_per_expert)  # [R, F]
        return grouped_mm(gated, w2, num_tokens_per_expert)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_held(experts: nn.Module) -> tuple[int, int] | None:
    """How many experts' matrices are here, and in all if they are DTensors; None where no parameter has 3 dimensions.

    Both, because between two passes FSDP may keep any part here.
    """
    for weight in experts.parameters():
        if weight.dim() == 3:
            return local(weight).shape[0], weight.shape[0]
    return None


def run_picks(
    experts: nn.Module,
    x: Float[Tensor, "R H"],
    topk_idx: Int[Tensor, "R K"],
    topk_weights: Float[Tensor, "R K"],
    *,
    num_experts: int,
) -> Float[Tensor, "R H"]:
    """Each row's picks, run by the experts that are here, and summed with their weights, in float32.

    Rows are repeated per pick and sorted by expert, a host sync on a GPU; a row's sum runs in the order of expert ids.

    Args:
        experts: takes rows expert-major, and their counts.
        topk_idx: ids of experts that are here, 0 to ``num_experts`` - 1; -1 for no pick.
        topk_weights: of the picks.
    """
    rows, picks = (topk_idx >= 0).nonzero(as_tuple=True)
    ids = topk_idx[rows, picks]
    order = ids.argsort(stable=True)
    rows, picks = rows[order], picks[order]
    counts = ids.bincount(minlength=num_experts).to(torch.int32)
    y: Tensor = experts(x.index_select(0, rows), counts)
    weighted = y.to(torch.promote_types(y.dtype, torch.float32)) * topk_weights[rows, picks].unsqueeze(-1)
    return weighted.new_zeros(x.shape[0], y.shape[-1]).index_add(0, rows, weighted)
