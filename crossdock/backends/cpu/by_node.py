"""Rows on CPUs whose sums are made node by node, where all ranks have mapped each other's memory.

Every row returns to its token's owner, who sums those of each node first: the bits of a combine that crosses nodes, and
no fewer bytes. Letters: T tokens here, K top-k, R rows received, Q rows sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
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

    def _sums_of_extras(self, plan: HostPlan, sent: npt.NDArray[np.float32]) -> Tensor:
        """See CpuRows. As rows are summed, in float32 all the way."""
        return sum_by_node(torch.from_numpy(sent), self._terms(plan), dtype=torch.float32)

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
