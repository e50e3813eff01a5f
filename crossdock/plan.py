"""Where each row goes: counts -> prefix sums -> Plan. Host arithmetic on tensors, without communication.

Letters: T tokens here, K top-k, E experts, L local experts, P ranks, W = E + P counts, Q rows this rank sends, n peers
of a hop, B blocks of rows of a hop.

A *block* is the rows that one rank sends to one segment of one peer. It is contiguous in the sender's order and at the
receiver. Three small matrices, the same on every rank (``counts``, ``send_starts``, ``dst_starts``, each [n, B]), and
one list of row numbers (``send_idx`` [Q]) therefore describe an exchange completely.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int, Int32, Int64
from torch import Tensor

from crossdock.errors import CapacityError
from crossdock.extent import Extent, RowCount
from crossdock.layout import Padded
from crossdock.spec import Spec, Topology

Ints = npt.NDArray[np.int64]
Picks = npt.NDArray[np.int64] | npt.NDArray[np.int32]


class Terms(NamedTuple):
    """Sums of rows: sum t adds up ``rows[offsets[t]]`` to ``rows[offsets[t + 1] - 1]``, in that order."""

    offsets: Int64[Tensor, "T+1"]
    rows: Int64[Tensor, "n"]

    @staticmethod
    def of(table: npt.NDArray[np.signedinteger]) -> Terms:
        """Terms from a table [T, J] of row numbers; negative entries are no terms."""
        is_term = table >= 0
        offsets = np.zeros(table.shape[0] + 1, dtype=np.int64)
        np.cumsum(is_term.sum(axis=1), out=offsets[1:])
        return Terms(torch.from_numpy(offsets), torch.from_numpy(table[is_term].astype(np.int64)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Hop:
    """One flat exchange along one axis of the mesh; blocks ``j * B / n .. (j + 1) * B / n - 1`` go to ``peers[j]``."""

    axis: Literal["scale_up", "scale_out"]
    peers: tuple[int, ...]
    own: int
    """This rank's index in ``peers``."""
    send_idx: Int64[Tensor, "Q"]
    """Index of each sent row in the hop's input, in sending order: block after block."""
    send_pick: Int64[Tensor, "Q"] | None
    """The pick (0 to K - 1) that each sent row serves; None where a row serves all of the token's picks at a rank."""
    counts: Int64[Tensor, "n B"]
    """Rows of each block, by sender."""
    send_starts: Int64[Tensor, "n B"]
    """First row of each block in its sender's order."""
    dst_starts: Int64[Tensor, "n B"]
    """First row of each block at its receiver."""

    @property
    def num_blocks_per_peer(self) -> int:
        """B / n, the segments of one receiver."""
        return self.counts.shape[1] // len(self.peers)

    @cached_property
    def send_blocks(self) -> Ints:
        """The block of each row that this rank sends, [Q]."""
        return np.repeat(np.arange(self.counts.shape[1]), self._own(self.counts))

    @cached_property
    def send_dst_rows(self) -> Ints:
        """The row at its receiver of each row that this rank sends, [Q]."""
        shift = self._own(self.dst_starts) - self._own(self.send_starts)
        return np.arange(self.send_blocks.size) + shift[self.send_blocks]

    def _own(self, matrix: Tensor) -> Ints:
        row: Ints = matrix.numpy()[self.own]
        return row


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Plan:
    """Where the rows of one routing go and return to; usable for any number of dispatches and combines.

    Frozen, tensors and integers only. This class has what every backend knows; the backends' subclasses have each row's
    destination.
    """

    rank: int
    buffer_id: int
    """The buffer that made the plan; 0 for none."""
    extent: Extent
    """How much of a receive slot its rows may take, and how sources of rows are numbered: by the M of its dispatch."""
    stamp: int
    """The same on all ranks: the sequence number of the plan's dispatch. A backend stamps remade plans otherwise."""
    topk_idx: Int[Tensor, "T K"]
    counts: Int64[Tensor, "P W"]
    """``local_counts`` of all ranks. Together with ``topk_idx`` they determine the plan: see ``make_plan``."""
    num_rows: int | None
    """R, rows of the receive slot up to the end of the last segment. None if the host does not know it: on CUDA with
    ``rows="capacity"``, where ``segment_starts[-1]`` has the number on the device."""
    num_tokens_per_expert: Int32[Tensor, "L"]
    segment_starts: Int[Tensor, "ends"]
    """First row of each segment of this rank, and the end of the last."""
    partial_rows: Int32[Tensor, "R K"] | None = None
    """For each (token, rank) pair received, its rows here in pick order, -1 for other picks. None unless ranks sum
    picks; filled when the rows arrive."""
    masked: tuple[int, ...] = ()
    """The ranks that were masked when the plan was made."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, num_tokens={self.num_tokens}, num_rows={self.num_rows})"

    @property
    def num_tokens_per_expert_list(self) -> list[int] | None:
        """``num_tokens_per_expert`` on the host; None where it does not know it: see ``num_rows``."""
        return None if self.num_rows is None else self.num_tokens_per_expert.tolist()

    @property
    def num_partial_rows(self) -> int:
        """Rows of ``partial_rows``, as far as the host knows; 0 where there is none."""
        return 0 if self.partial_rows is None else self.partial_rows.shape[0]

    @cached_property
    def num_tokens(self) -> int:
        """T, the tokens of this rank."""
        return self.topk_idx.shape[0]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HostPlan(Plan):
    """The plan of a backend whose host moves the rows between ranks that have mapped each other's memory: one hop."""

    num_rows: int
    hops: tuple[Hop, ...]
    back: Hop
    """The exchange whose rows return to their owners in a combine: ``hops[0]``, or ``pairs`` where ranks sum picks."""
    pairs: Hop | None
    """The exchange of one row per (token, rank) pair, in the order of sources; None unless ranks sum picks, or rows
    are staged."""
    pick_pos: Int64[Tensor, "T K"]
    """For each pick, the index of its row in the sending order of ``hops[0]``; -1: no pick."""
    back_pos: Int64[Tensor, "T K"]
    """For each pick, the index of its row in the sending order of ``back``; -1: no pick."""
    pair_pos: Int64[Tensor, "T K"]
    """The same in the order of ``pairs``; of ``hops[0]`` where there are none."""
    sums_by_pick: bool
    """True: the owner sums rows in the order of picks; False: in the order of ranks."""
    segment_rows: Int64[Tensor, "segments"]
    """Rows received in each segment of this rank, without padding."""

    @cached_property
    def terms(self) -> Terms:
        """The rows that are summed for each of this rank's tokens, as indices in ``back``'s sending order."""
        pos = np.ascontiguousarray(self.back_pos.numpy().T)  # [K, T]: numpy's inner loops run over T
        if self.back.send_pick is None:
            pos = _without_repeats(pos)
        if not self.sums_by_pick:
            pos = np.sort(pos, axis=0)
        return Terms.of(pos.T)


def local_counts(spec: Spec, topology: Topology, topk_idx: Int[Tensor, "T K"]) -> Int64[Tensor, "W"]:
    """Rows that this rank sends: E per expert, and P per rank (a token counts once per rank).

    >>> spec = Spec(num_experts=4, num_topk=2, hidden=8, max_tokens=4)
    >>> local_counts(spec, Topology(num_ranks=2), torch.tensor([[0, 1], [1, 2], [3, -1]])).tolist()
    [1, 2, 1, 1, 2, 2]
    """
    picks = topk_idx.numpy()
    num_local = spec.num_local_experts(topology.num_ranks)
    counts = np.empty(spec.num_counts(topology), dtype=np.int64)
    counts[: spec.num_experts] = np.bincount(picks.ravel() + 1, minlength=spec.num_experts + 1)[1:]
    counts[spec.num_experts :] = _hits(picks // num_local, topology.num_ranks).sum(axis=1)
    return torch.from_numpy(counts)


def check_capacity(
    extent: Extent,
    topology: Topology,
    counts: Int64[Tensor, "P W"],
    too_many: Int64[Tensor, "P"] | None = None,
    *,
    row_count: RowCount = "capacity",
) -> None:
    """Raises the same CapacityError on every rank if any rank would receive more rows than there is room for.

    Args:
        too_many: the tokens of each rank that brings more than ``max_tokens``, 0 of the others.
    """
    spec = extent.spec
    if too_many is not None and (brought := int(too_many.max())):
        raise overflow(spec, topology, worst=-1 - int(too_many.argmax()), needed=brought)
    _, ends, per_segment = _final_blocks(spec, topology, counts.numpy())
    needed = per_segment if isinstance(spec.layout, Padded) else ends
    worst = int(needed.argmax())
    if needed.flat[worst] > extent.room(row_count):
        raise overflow(spec, topology, worst=worst, needed=int(needed.flat[worst]))


def overflow(spec: Spec, topology: Topology, *, worst: int, needed: int) -> CapacityError:
    """The CapacityError for more rows than fit, or more tokens than a call may have.

    Args:
        worst: the rank (Padded: the expert, 0 to E - 1) that would receive too many rows; -1 - rank for the rank that
            brings too many tokens.
        needed: the rows that it would receive, or the tokens that it brings.
    """
    if worst < 0:
        return CapacityError(
            f"rank {-1 - worst} brought {needed} tokens, more than max_tokens={spec.max_tokens}; no row was moved: "
            f"split the batch, or pass max_tokens={needed} or more to the call, or to the Spec where that has fewer",
            num_tokens=needed,
        )
    rank, place = worst, ""
    if isinstance(spec.layout, Padded):
        rank, segment = divmod(worst, spec.num_local_experts(topology.num_ranks))
        place = f", local expert {segment}"
    return CapacityError(
        f"{needed} rows were routed to rank {rank}{place}, whose capacity is {spec.capacity(topology.num_ranks)}; no "
        f"row was moved: pass {type(spec.layout).__name__}(capacity={needed}) or more in the Spec, or route less",
        num_rows=needed,
    )


def make_plan(  # noqa: PLR0913 - all that a plan is made of
    spec: Spec,
    topology: Topology,
    *,
    rank: int,
    topk_idx: Int[Tensor, "T K"],
    counts: Int64[Tensor, "P W"],
    stamp: int = 0,
    buffer_id: int = 0,
    extent: Extent | None = None,
) -> HostPlan:
    """The plan of ``rank`` from its own picks and the counts of all ranks (``local_counts``, stacked).

    Prefix sums alone: a row's destination depends on the counts and the order of tokens only, so every run gives the
    same bits. The caller has checked the capacity (``check_capacity``).

    Args:
        extent: what its dispatch uses of a receive slot; None: what the Spec's own M does.
    """
    extent = extent or Extent.of(spec, topology.num_ranks)
    picks, all_counts = topk_idx.numpy(), counts.numpy()
    num_local = spec.num_local_experts(topology.num_ranks)
    final, ends, per_segment = _final_blocks(spec, topology, all_counts)
    base = spec.layout.segment_starts(per_segment, extent.capacity)  # [P, segments + 1]
    dst_starts = base[:, :-1].reshape(-1) + _exclusive_cumsum(final, axis=0)  # [P, B]
    everyone = tuple(range(topology.num_ranks))
    send_pick: Tensor | None = None
    if spec.layout.per_pick:
        send_idx, send_pick, pick_pos = _send_picks(picks, spec.num_experts)
    else:
        send_idx, pick_pos = _send_places(picks // num_local, topology.num_ranks)
    hop = _hop("scale_up", everyone, rank, send_idx, send_pick, final, dst_starts)
    mine = slice(rank * num_local, (rank + 1) * num_local)
    plan = HostPlan(
        rank=rank,
        buffer_id=buffer_id,
        extent=extent,
        stamp=stamp,
        topk_idx=topk_idx,
        counts=counts,
        hops=(hop,),
        back=hop,
        pairs=None,
        pick_pos=pick_pos,
        back_pos=pick_pos,
        pair_pos=pick_pos,
        sums_by_pick=spec.reduce == "token",
        num_rows=int(base[rank, -1]) if isinstance(spec.layout, Padded) else int(ends[rank, 0]),
        num_tokens_per_expert=torch.from_numpy(all_counts[:, mine].sum(axis=0, dtype=np.int32)),
        segment_starts=torch.from_numpy(base[rank].copy()),
        segment_rows=torch.from_numpy(per_segment[rank].copy()),
    )
    if spec.ranks_sum_picks or spec.is_staged:
        per_rank = all_counts[:, spec.num_experts :]
        send_idx, pair_pos = _send_places(picks // num_local, topology.num_ranks)
        pairs = _hop("scale_up", everyone, rank, send_idx, None, per_rank, _exclusive_cumsum(per_rank, axis=0))
        plan = replace(plan, pairs=pairs, pair_pos=pair_pos)
        if spec.ranks_sum_picks:
            plan = replace(plan, back=pairs, back_pos=pair_pos)
    return plan


def partial_rows_to_send(plan: HostPlan) -> Int32[Tensor, "Q K"]:
    """For each (token, rank) pair in the order of ``pairs``: the rows of its picks at that rank, -1 for other picks."""
    assert plan.pairs is not None, "a plan without pairs"
    hop, tokens = plan.hops[0], plan.pairs.send_idx.numpy()
    pos, pair_pos = plan.pick_pos.numpy(), plan.pair_pos.numpy()
    rows = np.where(pos >= 0, hop.send_dst_rows[pos], -1) if hop.send_dst_rows.size else np.full(pos.shape, -1)
    same_rank = pair_pos[tokens] == np.arange(tokens.size)[:, None]
    return torch.from_numpy(np.where(same_rank, rows[tokens], -1).astype(np.int32))


def _final_blocks(spec: Spec, topology: Topology, counts: Ints) -> tuple[Ints, Ints, Ints]:
    """Blocks of the one-hop exchange: counts [P, B], end of each rank's rows [P, 1], rows per segment [P, B / P]."""
    num_ranks = topology.num_ranks
    final = counts[:, : spec.num_experts] if spec.layout.per_pick else counts[:, spec.num_experts :]
    per_segment = final.sum(axis=0).reshape(num_ranks, -1)
    return final, spec.layout.segment_starts(per_segment, 0)[:, -1:], per_segment


def _hop(
    axis: Literal["scale_up", "scale_out"],
    peers: tuple[int, ...],
    own: int,
    send_idx: Tensor,
    send_pick: Tensor | None,
    counts: Ints,
    dst_starts: Ints,
) -> Hop:
    return Hop(
        axis=axis,
        peers=peers,
        own=own,
        send_idx=send_idx,
        send_pick=send_pick,
        counts=torch.from_numpy(counts),
        send_starts=torch.from_numpy(_exclusive_cumsum(counts, axis=1)),
        dst_starts=torch.from_numpy(dst_starts),
    )


def _send_picks(picks: Picks, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """One row per pick, by expert, then token: tokens [Q], picks [Q], and each pick's index in that order [T, K]."""
    flat = picks.ravel()
    key = np.where(flat < 0, num_experts, flat)
    if num_experts < 2**16:
        key = key.astype(np.uint16)  # numpy radix-sorts 16-bit keys: 30 us for 8192, against 270
    order = np.argsort(key, kind="stable")[: int((flat >= 0).sum())]
    pos = np.full(flat.size, -1, dtype=np.int64)
    pos[order] = np.arange(order.size)
    idx, pick = np.divmod(order, picks.shape[1])
    return torch.from_numpy(idx), torch.from_numpy(pick), torch.from_numpy(pos.reshape(picks.shape))


def _send_places(pick_places: Picks, num_places: int) -> tuple[Tensor, Tensor]:
    """One row per (token, peer), by peer, then token: tokens [Q], and each pick's index in that order [T, K].

    Args:
        pick_places: the peer (a rank or a node) of each pick, [T, K]; negative: no pick.
        num_places: the number of peers.
    """
    hits = _hits(pick_places, num_places)
    num_tokens = hits.shape[1]
    sent = np.flatnonzero(hits)
    place_pos = (np.cumsum(hits.ravel()) - 1).reshape(hits.shape)
    pos = place_pos[pick_places, np.arange(num_tokens)[:, None]]
    pos[pick_places < 0] = -1
    return torch.from_numpy(sent % max(num_tokens, 1)), torch.from_numpy(pos)


def _hits(pick_places: Picks, num_places: int) -> npt.NDArray[np.bool_]:
    """Whether any pick of the token is at the peer, [peers, T]; negative peers are no picks."""
    hits = np.zeros((num_places + 1, pick_places.shape[0]), dtype=np.bool_)
    hits[pick_places, np.arange(pick_places.shape[0])[:, None]] = True  # -1 marks the row that is cut off
    return hits[:num_places]


def _without_repeats(pos: Ints) -> Ints:
    """[K, T] with -1 where an earlier pick of the token has the same value."""
    first = pos >= 0
    for k in range(1, pos.shape[0]):
        for earlier in range(k):
            first[k] &= pos[k] != pos[earlier]
    return np.where(first, pos, -1)


def _exclusive_cumsum(counts: Ints, *, axis: int) -> Ints:
    return np.cumsum(counts, axis=axis) - counts
