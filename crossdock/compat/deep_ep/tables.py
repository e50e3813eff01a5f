"""What V2's handles say of a routing, as tensors: pure functions of a plan and of what came with its rows.

Letters: R ranks, L local experts, K picks per token, M the most tokens of a rank, N tokens that came, A alignment.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of_ranks(counts: Tensor, num_experts: int, rank: int) -> Tensor:
    """Inclusive sums over source ranks of the tokens that came, int32 [R].

    Args:
        counts: of all ranks, int64 [R, E + R].
    """
    return counts[:, num_experts + rank].cumsum(0).to(torch.int32)


def ends_of_experts(num_tokens: Tensor, alignment: int, *, is_expanded: bool) -> Tensor:
    """int32 [L]: where each expert's rows end. Expanded: aligned start + tokens; else the sums of aligned numbers.

    >>> ends_of_experts(torch.tensor([3, 1]), 4, is_expanded=True).tolist()
    [3, 5]
    >>> ends_of_experts(torch.tensor([3, 1]), 4, is_expanded=False).tolist()
    [4, 8]
    """
    aligned = (num_tokens + (alignment - 1)).div(alignment, rounding_mode="floor") * alignment
    ends = aligned.cumsum(0)
    return (ends - aligned + num_tokens if is_expanded else ends).to(torch.int32)


def metadata(src_idx: Tensor, is_here: Tensor, rows: Tensor | None, num_tokens: int) -> Tensor:
    """int32 [N, K + 2]: source; source rank * K + last pick here; rows of picks, -1 where none is.

    Args:
        src_idx: source rank * M + token of each token that came, [N]; -1 where none did.
        is_here: whether each of its picks is on this rank, [N, K].
        rows: of its picks, [N, K]; None where a token has one row.
        num_tokens: M.
    """
    num_topk = is_here.shape[1]
    picks = torch.arange(1, num_topk + 1, dtype=torch.int32, device=is_here.device)
    last = (is_here * picks).amax(dim=1) - 1
    ranks = src_idx.div(num_tokens, rounding_mode="floor")
    table = torch.full((is_here.shape[0], num_topk + 2), -1, dtype=torch.int32, device=is_here.device)
    table[:, 0] = src_idx
    table[:, 1] = (ranks * num_topk + last).where(src_idx >= 0, src_idx)
    if rows is not None:
        table[:, 2:] = rows
    return table


def expanded_metadata(src_idx: Tensor, partial_rows: Tensor, num_pairs: Tensor, num_tokens: int) -> Tensor:
    """The same of expanded rows, from the rows of each token that came.

    Args:
        src_idx: of expanded rows, [rows].
        partial_rows: int32 [N, K], or more, of which the first ``num_pairs`` are of tokens.
        num_pairs: how many tokens came, on the device.
    """
    rows = without_tail(partial_rows, num_pairs)
    some_row = rows.amax(dim=1)
    if src_idx.shape[0]:
        source = src_idx[some_row.clamp(min=0, max=src_idx.shape[0] - 1).to(torch.int64)].where(some_row >= 0, -1)
    else:
        source = some_row.clone()
    return metadata(source, rows >= 0, rows, num_tokens)


def without_tail(rows: Tensor, num_pairs: Tensor) -> Tensor:
    """The rows of picks [N, K], -1 in all but the first ones, which are as many as a number on the device says."""
    is_token = torch.arange(rows.shape[0], dtype=torch.int64, device=rows.device) < num_pairs
    return rows.masked_fill(~is_token.unsqueeze(1), -1)


def pairs_of_rows(src_idx: Tensor, picks: Tensor, ends: Tensor, first_expert: int, most_sources: int) -> Tensor:
    """``partial_rows`` where the plan has none: int32 [most_sources, K], of the tokens that came in their order.

    Args:
        src_idx: of expanded rows, [rows]; -1 where none came.
        picks: of each row's token, all of them, int32 [rows, K].
        ends: of each local expert's rows, with gaps, [L].
        most_sources: R * M.
    """
    num_rows, num_topk = picks.shape
    device = src_idx.device
    row = torch.arange(num_rows, dtype=torch.int64, device=device)
    expert = torch.bucketize(row, ends.to(torch.int64), right=True) + first_expert
    came = torch.zeros(most_sources + 1, dtype=torch.int64, device=device)
    source = src_idx.to(torch.int64).where(src_idx >= 0, most_sources)
    came[source] = 1
    came[most_sources] = 0
    pair = (came.cumsum(0) - 1)[source].where(src_idx >= 0, most_sources)
    pick = (picks == expert.unsqueeze(1)).to(torch.int32).argmax(dim=1)
    table = torch.full((most_sources + 1, num_topk), -1, dtype=torch.int32, device=device)
    table[pair, pick] = row.to(torch.int32)
    return table[:most_sources]
