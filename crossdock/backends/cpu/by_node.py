"""Rows on CPUs whose sums are made node by node, where all ranks have mapped each other's memory.

Every row returns to its token's owner, who sums those of each node first: the bits of a combine that crosses nodes, and
no fewer bytes. Letters: T tokens here, K top-k, R rows received, Q rows sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from crossdock.backends.by_node import NodeTerms, sum_by_node
from crossdock.backends.cpu.rows import CpuRows
from crossdock.backends.cpu.timed import TimedRows
from crossdock.consent import Word
from crossdock.plan import HostPlan


class RowsByNode(CpuRows):
    """Sums rows of ``reduce="node"``; weights of rows go home beside them."""

    def push_outputs(self, plan: HostPlan, y: Tensor, weights: Tensor | None, words: Sequence[Word]) -> None:
        """Writes outputs y [R, H] to their owners, and their weights [R]."""
        super().push_outputs(plan, y, None, words)
        if weights is not None:
            for peer, here, there in self._incoming_blocks(plan.back):
                self._at[peer]["returned_weights"][words[peer].slot, there] = weights[here]

    def sum_rows(
        self,
        plan: HostPlan,
        weights: Tensor | None,
        bias: Tensor | None,
        words: Sequence[Word],
        *,
        return_slot: int,
        out: Tensor | None,
    ) -> Tensor:
        """See CpuRows. Weights are those that came home, if this rank has given any of its own."""
        terms = self._terms(plan)
        sent = terms.of_pairs.rows
        rows = terms._replace(
            of_pairs=terms.of_pairs._replace(rows=torch.from_numpy(self._sent_rows(plan, words, return_slot))[sent])
        )
        came = None if weights is None else self._own["returned_weights"][return_slot][sent]
        return sum_by_node(self._all_rows, rows, dtype=self._arena.spec.combine_dtype, weights=came, bias=bias, out=out)

    def returned_extras(self, plan: HostPlan, extras: Sequence[Tensor], return_slot: int) -> tuple[Tensor, ...]:
        """See CpuRows. Where rows are of ranks, extras are summed as rows are, in float32 all the way."""
        if self._arena.spec.layout.per_pick:
            return super().returned_extras(plan, extras, return_slot)
        terms, results, at = self._terms(plan), [], 0
        home = self._returned_extras[self._rank][return_slot]
        num_sent = plan.hops[0].send_idx.shape[0]
        for extra in extras:
            num_bytes = math.prod(extra.shape[1:]) * extra.element_size()
            sent = home[:num_sent, at : at + num_bytes].reshape(-1).view(np.float32).reshape(num_sent, num_bytes // 4)
            at += num_bytes
            sums = sum_by_node(torch.from_numpy(sent), terms, dtype=torch.float32)
            results.append(sums.view(plan.num_tokens, *extra.shape[1:]))
        return tuple(results)

    def _terms(self, plan: HostPlan) -> NodeTerms:
        """Of this rank's tokens, with rows as indices in the sending order."""
        spec, topology = self._arena.spec, self._arena.topology
        per_node = spec.num_local_experts(topology.num_ranks) * topology.node_size
        nodes, pos = plan.topk_idx.numpy() // per_node, plan.back_pos.numpy()
        if not spec.layout.per_pick:  # ascending positions are ascending ranks
            order = np.argsort(pos, axis=1, kind="stable")
            pos, nodes = np.take_along_axis(pos, order, 1), np.take_along_axis(nodes, order, 1)
            pos = np.where(np.diff(pos, axis=1, prepend=-1) > 0, pos, -1)  # one row for all picks of a rank
        return NodeTerms.of(pos, nodes, num_nodes=topology.num_nodes)


class TimedRowsByNode(RowsByNode, TimedRows):
    """The same, timed."""
