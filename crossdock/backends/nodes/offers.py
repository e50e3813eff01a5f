"""Outputs of a combine over two hops, on CPUs: offered to mates, summed on the node, and summed again at the owner.

Letters: T tokens here, K top-k, H hidden, R rows received, N nodes, U ranks of a node, S rows of a receive slot, n rows
that crossed the rail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.cpu.arrived import apart, as_bytes
from crossdock.backends.cpu.mapped import Mapped
from crossdock.backends.nodes.places import Ints
from crossdock.backends.nodes.plan import NodePlan
from crossdock.backends.sums import sum_rows
from crossdock.consent import PUSHED, Word
from crossdock.plan import Terms
from crossdock.scales import of_numpy
from crossdock.transport.nodes import NodesTransport


class Sums(NamedTuple):
    """Of rows that crossed the rail, what goes home: sums of outputs, and extras."""

    data: Tensor  # [n, H] in the combine format, or [n, 0]
    extras: Tensor  # uint8 [n, bytes]: sums where rows are of ranks, else of each pick


class Offers:
    """What the ranks of a node let each other read."""

    def __init__(self, arena: Arena, transport: NodesTransport, mapped: Mapped) -> None:
        self._arena = arena
        self._mapped, self._at = mapped, mapped.at
        self._own = self._at[transport.local]
        self._first = transport.mates.start
        self._slot_rows = arena.spec.num_slot_rows(arena.topology.num_ranks)

    def offer(self, sequence: int, y: Tensor | None, weights: Tensor | None, extras: Sequence[Tensor]) -> None:
        """Copies y [R, H], if it is not an output slot, weights [R] and extras [R, ...] to where mates read them."""
        part = sequence & 1
        if y is not None:
            self._own["offered"][part, : y.shape[0]] = y
        if weights is not None:
            self._own["offered_weights"][part, : weights.shape[0]] = weights
        if extras:
            packed = np.concatenate([as_bytes(extra) for extra in extras], axis=1)
            self._own["offered_extras"][part, : packed.shape[0], : packed.shape[1]] = torch.from_numpy(packed)

    def sums(
        self, sequence: int, finals: Ints, words: Sequence[Word], *, has_weights: bool, extra_bytes: int, out: Sums
    ) -> None:
        """The node's sums of rows that ended here at ``finals`` [n, K], into ``out``."""
        spec, part = self._arena.spec, sequence & 1
        ordered = finals if spec.layout.per_pick else np.sort(finals, axis=1)  # of picks, or of ranks
        locals_, rows = np.divmod(ordered, self._slot_rows)
        if out.data.shape[1]:
            first = np.array([self._first_row(u, words, part) for u in range(len(self._at))])
            terms = Terms.of(np.where(ordered < 0, -1, first[locals_] + rows))
            weights = self._weights(part, ordered) if has_weights else None
            sum_rows(self._mapped.all_rows, terms, dtype=spec.combine_dtype, weights=weights, out=out.data)
        if extra_bytes:
            of_picks = np.zeros((*ordered.shape, extra_bytes), dtype=np.uint8)
            for u, views in enumerate(self._at):
                here = (locals_ == u) & (ordered >= 0)
                of_picks[here] = views["offered_extras"][part].numpy()[rows[here], :extra_bytes]
            if spec.layout.per_pick:
                out.extras.numpy()[:] = of_picks.reshape(out.extras.shape)
            else:
                values, sums = of_picks.view(np.float32), out.extras.numpy().view(np.float32)
                sums[:] = 0
                for k in range(ordered.shape[1]):
                    sums += values[:, k]

    def _weights(self, part: int, ordered: Ints) -> Tensor:
        """Of each term, in their order."""
        all_weights = torch.cat([views["offered_weights"][part] for views in self._at])
        return all_weights[torch.from_numpy(ordered[ordered >= 0])]

    def _first_row(self, local: int, words: Sequence[Word], part: int) -> int:
        """The number, in the matrix of all rows, of the first output of a mate."""
        slot = words[self._first + local].output_slot
        name, slot = ("offered", part) if slot == PUSHED else ("outputs", slot)
        return self._mapped.first_row(name, local, slot)


class Home:
    """Where sums of all nodes come home to: rows of each token and node, node after node."""

    def __init__(self, arena: Arena, plan: NodePlan, *, has_data: bool, extra_bytes: int) -> None:
        self._spec, self._num_nodes = arena.spec, arena.topology.num_nodes
        self._plan = plan
        sizes = [tokens.size for tokens in plan.sent.tokens]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        width = extra_bytes * (arena.spec.num_topk if arena.spec.layout.per_pick else 1)
        num_rows, hidden = int(self._starts[-1]), arena.spec.hidden if has_data else 0
        self.data = torch.empty(num_rows, hidden, dtype=arena.spec.combine_dtype, device="cpu")
        self.extras = torch.empty(num_rows, width, dtype=torch.uint8, device="cpu")

    def of_node(self, node: int) -> Sums:
        """The rows of a node, to be written."""
        mine = slice(int(self._starts[node]), int(self._starts[node + 1]))
        return Sums(self.data[mine], self.extras[mine])

    def summed(self, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """[T, H]: each token's sums over nodes, ascending."""
        return sum_rows(self.data, self._terms(), dtype=self._spec.combine_dtype, bias=bias, out=out)

    def extras_like(self, extras: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What came home of extras of these shapes: [T, ...] summed, or [T, K, ...] where rows are picks."""
        num_tokens, num_topk = self._plan.num_tokens, self._spec.num_topk
        if self._spec.layout.per_pick:
            width = self.extras.shape[1] // num_topk
            of_picks = np.zeros((num_tokens, num_topk, width), dtype=np.uint8)
            of_rows = self.extras.numpy().reshape(-1, num_topk, width)
            per_node = self._spec.num_experts // self._num_nodes
            for node, tokens in enumerate(self._plan.sent.tokens):
                blocks = self._plan.sent.blocks[tokens]
                row, pick = np.nonzero((blocks >= 0) & (blocks // per_node == node))
                of_picks[tokens[row], pick] = of_rows[int(self._starts[node]) :][row, pick]
            return apart(of_numpy(of_picks.view(np.float32)), extras)
        came = torch.from_numpy(self.extras.numpy().view(np.float32))
        return apart(sum_rows(came, self._terms(), dtype=torch.float32), extras)

    def _terms(self) -> Terms:
        """Of each token, its rows here, nodes ascending."""
        table = np.full((self._plan.num_tokens, self._num_nodes), -1, dtype=np.int64)
        for node, tokens in enumerate(self._plan.sent.tokens):
            table[tokens, node] = int(self._starts[node]) + np.arange(tokens.size)
        return Terms.of(table)
