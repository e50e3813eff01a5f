"""The plan of a call over two hops: what a rank sends, and where the rows that its node was told of end.

Letters: T tokens here, K top-k, N nodes, U ranks of a node, P ranks, W counts of a node, S rows of a receive slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.nodes.places import Incoming, Ints, Sent
from crossdock.extent import Extent
from crossdock.plan import Plan


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class NodePlan(Plan):
    """A plan over nodes. ``counts`` is what this rank's node was told, int64 [P, W]; nobody has more.

    ``partial_rows`` has where rows of the rail peers ended on this node, node after node: local rank * S + row.
    """

    num_rows: int
    sent: Sent
    finals: tuple[Ints, ...]
    """By node, where the rows of its rank of this local index end on this node, [n, K]; this node's are this rank's
    own."""
    segment_rows: Ints
    """[segments]: rows received in each, without padding."""

    def rows_by_peer(self, num_slot_rows: int) -> tuple[list[int], list[int]]:
        """[P]: rows of a dispatch that this rank hands to each of its peers, and that each hands to it; 0 of others.

        To rail peers and from them one for each token, over the rail; to mates also those that came over it.

        Args:
            num_slot_rows: S.
        """
        num_ranks, num_nodes = self.counts.shape[0], len(self.finals)
        node_size = num_ranks // num_nodes
        node, local = divmod(self.rank, node_size)
        mates = slice(node * node_size, (node + 1) * node_size)
        there, here = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
        ends = np.concatenate([final.ravel() for final in self.finals])
        there[mates] = np.bincount(ends[ends >= 0] // num_slot_rows, minlength=node_size)
        per_pick = self.extent.spec.layout.per_pick
        num_local = (self.counts.shape[1] - 1 - node_size) // node_size
        blocks = slice(local * num_local, (local + 1) * num_local)
        if not per_pick:
            blocks = slice(num_local * node_size + local, num_local * node_size + local + 1)
        of_sources = self.counts[:, blocks].sum(1).numpy()  # a row comes by the mate of its sender's local index
        here[mates] = of_sources.reshape(num_nodes, node_size).sum(0)
        for other in range(num_nodes):
            if other != node:
                peer = other * node_size + local
                there[peer], here[peer] = len(self.sent.tokens[other]), len(self.finals[other])
        return there.tolist(), here.tolist()


def made(  # noqa: PLR0913 - all that a plan is made of
    arena: Arena,
    *,
    rank: int,
    extent: Extent,
    topk_idx: Tensor,
    counts: Tensor,
    sent: Sent,
    arriving: Incoming,
    finals: tuple[Ints, ...],
    stamp: int,
    buffer_id: int,
    masked: tuple[int, ...] = (),
) -> NodePlan:
    """The plan of a rank; ``counts`` [P, W] is what its node was told."""
    topology = arena.topology
    node, local = divmod(rank, topology.node_size)
    experts = counts[:, arena.counts_of_experts(rank)]
    rail = [finals[m].astype(np.int32) for m in range(topology.num_nodes) if m != node]
    starts = arriving.starts[local]
    return NodePlan(
        rank=rank,
        buffer_id=buffer_id,
        extent=extent,
        stamp=stamp,
        topk_idx=topk_idx,
        counts=counts,
        num_rows=int(starts[-1]),
        num_tokens_per_expert=experts.sum(dim=0, dtype=torch.int32),
        segment_starts=torch.from_numpy(starts.copy()),
        partial_rows=torch.from_numpy(np.concatenate(rail)) if rail else None,
        masked=masked,
        sent=sent,
        finals=finals,
        segment_rows=arriving.rows[local],
    )


def rail_finals(partial_rows: Tensor, num_rows: Ints, *, node: int, own: Ints) -> tuple[Ints, ...]:
    """``finals`` from ``partial_rows``.

    Args:
        num_rows: [N], of each node's rank of this local index.
        own: those of this rank.
    """
    table, at, finals = partial_rows.numpy().astype(np.int64), 0, []
    for other, size in enumerate(num_rows.tolist()):
        if other == node:
            finals.append(own)
        else:
            finals.append(table[at : at + size])
            at += size
    return tuple(finals)
