"""The rows that a routing moves, counted from the picks of all ranks.

Letters: P ranks, T tokens of a rank, K top-k, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from crossdock.plan import local_counts
from crossdock.spec import Spec, Topology


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Rows of one rank: ``out_`` in a dispatch, ``home_`` in a combine. ``others`` leaves out rows to itself."""

    num_tokens: int
    out_sent: int
    out_received: int
    out_from_others: int
    home_sent: int
    """Fewer than ``out_received`` if a rank sums a token's rows before it returns one."""
    home_to_others: int
    home_received: int


def traffic(spec: Spec, topk_idx: Int64[Tensor, "P T K"], rank: int) -> Traffic:
    """The rows that ``rank`` sends and receives.

    >>> import torch
    >>> from crossdock.layout import Expanded
    >>> spec = Spec(num_experts=4, num_topk=2, hidden=8, max_tokens=1, layout=Expanded(), reduce="rank")
    >>> traffic(spec, torch.tensor([[[2, 3]], [[0, 3]]]), rank=1)  # doctest: +NORMALIZE_WHITESPACE
    Traffic(num_tokens=1, out_sent=2, out_received=3, out_from_others=2,
            home_sent=2, home_to_others=1, home_received=2)
    """
    topology = Topology(num_ranks=len(topk_idx))
    counts = [local_counts(spec, topology, of_rank) for of_rank in topk_idx]
    num_local = spec.num_local_experts(topology.num_ranks)
    picks = [of_rank[: spec.num_experts].view(-1, num_local).sum(1).tolist() for of_rank in counts]
    pairs = [of_rank[spec.num_experts :][: topology.num_ranks].tolist() for of_rank in counts]
    out = picks if spec.layout.per_pick else pairs
    home = pairs if spec.ranks_sum_picks else out
    over_links = pairs if spec.is_staged else out
    received, returned, crossed = ([of_rank[rank] for of_rank in rows] for rows in (out, home, over_links))
    return Traffic(
        num_tokens=topk_idx.shape[1],
        out_sent=sum(out[rank]),
        out_received=sum(received),
        out_from_others=sum(crossed) - crossed[rank],
        home_sent=sum(returned),
        home_to_others=sum(returned) - returned[rank],
        home_received=sum(home[rank]),
    )
