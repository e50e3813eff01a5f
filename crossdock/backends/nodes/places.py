"""Places of rows before anybody's counts are known: relative to their own sender, with a base at the receiving node.

A *block* is what one rank sends to one segment: an expert where rows are picks, else a rank. A row's *place* is its
block on the receiving node, and which of its sender's rows in that block it is, in the order of tokens. The node knows
every sender's counts for its own blocks, and adds ``base``: so the row ends where a flat exchange puts it.

Letters: T tokens here, K top-k, L local experts, P ranks, U ranks of a node, N nodes, B blocks of a node, S rows of a
receive slot, n rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from crossdock.layout import Padded
from crossdock.spec import Spec, Topology

Ints = npt.NDArray[np.int64]


class Sent(NamedTuple):
    """What a rank sends, by itself: nobody's counts are needed."""

    tokens: tuple[Ints, ...]
    """Of each node, the tokens that have a pick there, ascending."""
    blocks: Ints
    """[T, K]: the block of each pick, among those of all nodes; -1: no pick, or another pick's row serves it too."""
    numbers: Ints
    """[T, K]: which of this rank's rows in its block a pick's row is."""
    counts: npt.NDArray[np.int32]
    """[N, W]: what each node is told: rows per expert, per rank, and over the rail."""


def what_is_sent(spec: Spec, topology: Topology, picks: Ints) -> Sent:
    """What a rank with these picks [T, K] sends.

    >>> spec = Spec(num_experts=4, num_topk=2, hidden=8, max_tokens=4)
    >>> sent = what_is_sent(spec, Topology.grid(nodes=2, local=2), np.array([[0, 3], [3, 2], [1, -1]]))
    >>> [tokens.tolist() for tokens in sent.tokens], sent.numbers.tolist(), sent.counts.tolist()
    ([[0, 2], [0, 1]], [[0, 0], [1, 0], [0, -1]], [[1, 1, 1, 1, 2], [1, 2, 1, 2, 2]])
    """
    num_nodes, node_size, num_ranks = topology.num_nodes, topology.node_size, topology.num_ranks
    num_local = spec.num_local_experts(num_ranks)
    ranks = np.where(picks < 0, -1, picks // num_local)
    per_expert = np.bincount(picks.ravel() + 1, minlength=spec.num_experts + 1)[1:]
    is_there = _hits(ranks, num_ranks)  # [T, P]
    on_node = np.logical_or.reduce(is_there.reshape(-1, num_nodes, node_size), axis=2)  # [T, N]
    if spec.layout.per_pick:
        blocks, numbers = picks.astype(np.int64), _numbers(picks, spec.num_experts)
    else:
        blocks = _firsts(ranks)
        of_ranks = np.cumsum(is_there, axis=0) - 1
        numbers = np.where(blocks < 0, -1, np.take_along_axis(of_ranks, np.maximum(blocks, 0), axis=1))
    counts = np.concatenate(
        [
            per_expert.reshape(num_nodes, -1),
            is_there.sum(axis=0).reshape(num_nodes, -1),
            on_node.sum(axis=0).reshape(num_nodes, 1),
        ],
        axis=1,
    ).astype(np.int32)
    tokens = tuple(np.flatnonzero(on_node[:, node]) for node in range(num_nodes))
    return Sent(tokens, blocks, numbers, counts)


def places_to(sent: Sent, node: int, *, num_blocks: int, dtype: type[np.signedinteger]) -> Ints:
    """The places [n, K] of the rows to a node, as they travel: block and number in one integer; -1: none there."""
    tokens = sent.tokens[node]
    blocks, numbers = sent.blocks[tokens] - node * num_blocks, sent.numbers[tokens]
    shift = place_shift(dtype)
    here = (blocks >= 0) & (blocks < num_blocks)
    return np.where(here, blocks << shift | numbers, -1).astype(dtype)


def place_dtype(spec: Spec, num_blocks: int) -> type[np.signedinteger]:
    """The integers that places travel as: 4 bytes where block and number have 15 and 16 bits."""
    return np.int32 if spec.max_tokens <= 2**16 and num_blocks < 2**15 else np.int64


def place_shift(dtype: type[np.signedinteger]) -> int:
    """Bits of a place's number."""
    return 16 if dtype == np.int32 else 32


class Incoming(NamedTuple):
    """What a node's ranks receive, from what all ranks have told this node."""

    base: Ints
    """[P, B]: the first row, of its rank's slot, of each sender in each block."""
    starts: Ints
    """[U, segments + 1]: the first row of each segment, and the end of the last."""
    rows: Ints
    """[U, segments]: rows that come, without padding."""

    def final_rows(self, spec: Spec, num_slot_rows: int, source: int, places: npt.NDArray[np.signedinteger]) -> Ints:
        """Where rows of a sender end, [n, K]: local rank * S + row; -1: nowhere."""
        shift = place_shift(places.dtype.type)
        wide = places.astype(np.int64)
        blocks, numbers = np.maximum(wide, 0) >> shift, wide & (1 << shift) - 1
        local = blocks // self.rows.shape[1]
        return np.where(wide < 0, -1, local * num_slot_rows + self.base[source][blocks] + numbers)


def incoming(spec: Spec, topology: Topology, counts: Ints) -> Incoming:
    """From the counts [P, W] that each rank has told this node."""
    num_experts = spec.num_experts // topology.num_nodes
    blocks = counts[:, :num_experts] if spec.layout.per_pick else counts[:, num_experts:-1]  # [P, B]
    rows = blocks.sum(axis=0).reshape(topology.node_size, -1)
    starts = spec.layout.segment_starts(rows, spec.capacity(topology.num_ranks))
    base = starts[:, :-1].reshape(-1) + np.cumsum(blocks, axis=0) - blocks
    return Incoming(base, starts, rows)


def needed_rows(spec: Spec, arriving: Incoming) -> tuple[int, int]:
    """The most rows that a rank (Padded: an expert) of this node needs room for, and its number on the node."""
    needed = arriving.rows if isinstance(spec.layout, Padded) else arriving.starts[:, -1:]
    worst = int(needed.argmax())
    return int(needed.flat[worst]), worst


def _hits(places: Ints, num_places: int) -> npt.NDArray[np.bool_]:
    """[T, places]: whether any pick is there."""
    hits = np.zeros((places.shape[0], num_places + 1), dtype=np.bool_)
    hits[np.arange(places.shape[0])[:, None], places] = True  # -1 marks the column that is cut off
    return hits[:, :num_places]


def _firsts(ranks: Ints) -> Ints:
    """[T, K] with -1 where an earlier pick of the token is of the same rank."""
    firsts = ranks.astype(np.int64)
    for k in range(1, ranks.shape[1]):
        firsts[(ranks[:, :k] == ranks[:, k : k + 1]).any(axis=1), k] = -1
    return firsts


def _numbers(picks: Ints, num_experts: int) -> Ints:
    """[T, K]: how many tokens before have picked the same expert; -1: no pick."""
    flat = np.where(picks < 0, num_experts, picks).ravel()
    order = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[order], np.arange(num_experts + 1))
    numbers = np.empty(flat.size, dtype=np.int64)
    numbers[order] = np.arange(flat.size) - starts[flat[order]]
    return np.where(picks < 0, -1, numbers.reshape(picks.shape))
