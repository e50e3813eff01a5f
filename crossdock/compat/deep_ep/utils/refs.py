"""What DeepEP's test programs compare V2's calls with, through torch.distributed; ``deep_ep.utils.refs``.

The order of sums is Crossdock's: picks of a rank, then ranks in their order, then the bias, with one cast at the end.

Letters: T tokens here, K picks per token, H hidden, N tokens that came, M the most tokens of a rank, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.compat.deep_ep.formats import Rows

_PERIOD = 8191


def dispatch(
    x: Rows, topk_idx: Tensor, topk_weights: Tensor, num_max_tokens_per_rank: int, num_experts: int, *_: Any
) -> tuple[Rows, Tensor, Tensor, Tensor, Tensor]:
    """What a compact dispatch of the default group gives: rows, picks, weights, source rank * M + token, counts.

    Rows by source rank, then token. Picks [N, K] are local or -1, weights as they were sent, counts int32 [R] those of
    each source rank, on the host. Collective.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_local = num_experts // num_ranks
    parts = x if isinstance(x, tuple) else (x,)
    mine = (*parts, topk_idx, topk_weights)
    every = _gathered(mine)
    rows: list[list[Tensor]] = [[] for _ in mine]
    sources, counts = [], []
    for source, tensors in enumerate(every):
        comes = (tensors[-2].div(num_local, rounding_mode="floor") == rank).any(dim=1).nonzero().flatten()
        counts.append(comes.numel())
        sources.append(source * num_max_tokens_per_rank + comes)
        for kept, tensor in zip(rows, tensors, strict=True):
            kept.append(_bits(tensor)[comes])
    device = topk_idx.device
    *data, picks, weights = (
        torch.cat(kept).view(tensor.dtype).to(device) for kept, tensor in zip(rows, mine, strict=True)
    )
    local = picks - rank * num_local
    local = local.where((local >= 0) & (local < num_local), -1)
    came: Any = data[0] if len(data) == 1 else tuple(data)
    numbers = torch.tensor(counts, dtype=torch.int32, device="cpu")
    return came, local, weights, torch.cat(sources).to(torch.int32).to(device), numbers


def generate_pre_combine_data(
    src_token_global_idx: Tensor, num_max_tokens_per_rank: int, num_topk: int, hidden: int
) -> Tensor:
    """Outputs of experts that only depend on the token and the pick, bfloat16 [N, K, H], between -2 and 2.

    Args:
        src_token_global_idx: source rank * M + token, [N].
    """
    device = src_token_global_idx.device
    seed = (src_token_global_idx.to(torch.float64).remainder(_PERIOD) + 1) / _PERIOD
    pick = torch.arange(1, num_topk + 1, dtype=torch.float64, device=device)
    column = torch.arange(hidden, dtype=torch.float64, device=device) / hidden
    by_pick = torch.sin(97.0 * seed.unsqueeze(1) * pick)  # [N, K]
    by_column = torch.sin(31.0 * (seed.unsqueeze(1) + column) + num_max_tokens_per_rank % 7)  # [N, H]
    return (by_pick.unsqueeze(2) + by_column.unsqueeze(1)).to(torch.bfloat16)


def ordered_accumulate(y: Tensor, initial_value: Tensor | None = None, *_: Any) -> Tensor:
    """The float32 sum over the second dimension, from the first to the last, cast once: [N, H] from [N, K, H].

    Args:
        initial_value: what the sum begins with, [N, H]; None: 0.
    """
    total = torch.zeros(y.shape[0], y.shape[2], dtype=torch.float32, device=y.device)
    if initial_value is not None:
        total += initial_value
    for pick in range(y.shape[1]):
        total += y[:, pick]
    return total.to(y.dtype)


def combine(
    y: Tensor,
    topk_idx: Tensor,
    num_scaleout_ranks: int,
    num_scaleup_ranks: int,
    num_experts: int,
    bias: Any = None,
    reduce_in_rank: bool = True,
    reduce_in_scaleup: bool = False,
    *_: Any,
) -> Tensor:
    """The sums that a combine gives, bfloat16 [T, H]. Asks nobody.

    Args:
        y: outputs for the picks of this rank's own tokens, [T, K, H].
        bias: [T, H], none, one or two of them.
        reduce_in_rank: a rank's picks are added up, and the sum is cast, before the ranks'; else all picks in order.
        reduce_in_scaleup: must be False: there is one domain of ranks.
    """
    num_ranks = num_scaleout_ranks * num_scaleup_ranks
    assert not reduce_in_scaleup or num_scaleout_ranks == 1, "ranks of one domain are not added up on the way"
    home = topk_idx.div(num_experts // num_ranks, rounding_mode="floor")  # [T, K]
    total = torch.zeros(y.shape[0], y.shape[2], dtype=torch.float32, device=y.device)
    for rank in range(num_ranks) if reduce_in_rank else ():
        here = torch.zeros_like(total)
        for pick in range(y.shape[1]):
            here += y[:, pick].where((home[:, pick] == rank).unsqueeze(1), 0)
        total += here.to(torch.bfloat16)
    for pick in () if reduce_in_rank else range(y.shape[1]):
        total += y[:, pick].where((home[:, pick] >= 0).unsqueeze(1), 0)
    if isinstance(bias, tuple):
        total += bias[0].float() + bias[1].float()
    elif bias is not None:
        total += bias
    return total.to(torch.bfloat16)


def _gathered(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Every rank's, on the host; of any dtype, over any backend that gathers objects."""
    host = [(tensor.cpu().contiguous().reshape(-1).view(torch.uint8), tensor.dtype, tensor.shape) for tensor in tensors]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, host)
    return [tuple(raw.view(dtype).view(shape) for raw, dtype, shape in theirs) for theirs in every]


def _bits(tensor: Tensor) -> Tensor:
    """Rows as bytes, for indexing that takes few dtypes."""
    return tensor.view(tensor.shape[0], -1) if tensor.element_size() > 1 else tensor.view(torch.uint8)
