"""How many tokens go where: V1's layout call, which asks no peer.

Letters: R ranks, E experts, T tokens here, K picks per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.compat.deep_ep.formats import bad_picks
from crossdock.compat.deep_ep.handles import MAX_INTRANODE
from crossdock.routing import check_picks
from crossdock.spec import check_experts


def counts_of(topk_idx: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Tokens per rank int32 [R], per node of eight ranks or None, per expert int32 [E]; where each goes, bool [T, R].

    >>> counts_of(torch.tensor([[0, 1], [3, -1]]), num_experts=4, num_ranks=2)[::2]
    (tensor([1, 1], dtype=torch.int32), tensor([1, 1, 0, 1], dtype=torch.int32))
    """
    if topk_idx.dim() != 2 or topk_idx.is_floating_point():
        raise bad_picks(topk_idx)
    check_experts(num_experts, num_ranks)
    num_tokens, device = topk_idx.shape[0], topk_idx.device
    if device.type == "cpu":  # on a GPU the host would wait
        check_picks(topk_idx, num_experts=num_experts)
    picks = topk_idx.to(torch.int64) + 1  # column 0 is for no pick
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    per_expert.scatter_add_(0, picks.reshape(-1), torch.ones_like(picks, dtype=torch.int32).reshape(-1))
    per_expert = per_expert[1:].clone()
    homes = torch.div(picks + (num_experts // num_ranks - 1), num_experts // num_ranks, rounding_mode="floor")
    is_in = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.bool, device=device).scatter_(1, homes, True)
    is_in = is_in[:, 1:].contiguous()
    per_node = None
    if num_ranks > MAX_INTRANODE:
        num_nodes = -(-num_ranks // MAX_INTRANODE)
        nodes = torch.nn.functional.pad(is_in, (0, num_nodes * MAX_INTRANODE - num_ranks))
        per_node = nodes.view(num_tokens, num_nodes, MAX_INTRANODE).any(dim=2).sum(dim=0, dtype=torch.int32)
    return is_in.sum(dim=0, dtype=torch.int32), per_node, per_expert, is_in
