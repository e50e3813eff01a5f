"""Rows on CPUs: gathers into the peers' segments, sums in float32; and the counts and metadata beside them.

Letters: T tokens here, K top-k, H hidden, R rows received, Q rows sent, P ranks, C rows of a slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossdock.arena import Arena, Control
from crossdock.backends.base import Batch, Metadata
from crossdock.backends.cpu.arrived import apart, as_bytes, movable, take_metadata, widths_of
from crossdock.backends.cpu.mapped import Mapped
from crossdock.backends.cpu.staged import expand_rows
from crossdock.backends.staged import RowMaker
from crossdock.backends.sums import chunk_rows, sum_rows
from crossdock.consent import PAYLOAD_BITS, PAYLOAD_MASK, PUSHED, Word, stamped
from crossdock.plan import Hop, HostPlan, Terms, partial_rows_to_send
from crossdock.scales import ScaleLayout, as_integers, no_bits, of_numpy
from crossdock.transport.host import HostTransport
from crossdock.transport.segments import SideBySide
from crossdock.wire import Fp8, Quantized

_CAST_ROWS = 256
"""Tokens cast to a narrow format before they are pushed: under 2 MiB beside the arena, at hidden 7168."""

_SUMS_AT_ONCE = 128
"""At least as many sums of (token, rank) pairs does a rank work out before it writes them home."""

Block = tuple[int, slice, slice]
Bytes = npt.NDArray[np.uint8]


class CpuRows:
    """What a rank reads and writes of the segments that it has mapped; only between the words that permit it."""

    def __init__(self, arena: Arena, transport: HostTransport) -> None:
        self._arena = arena
        self._is_staged = arena.spec.is_staged
        self._row_maker = RowMaker(arena, no_bits)
        self._rank = transport.rank
        self._num_ranks = transport.num_ranks
        self._left = list(range(transport.num_ranks))
        """The ranks that are not masked."""
        mapped = Mapped(arena, transport.segments)
        self._at, self._all_rows, self._first_row = mapped.at, mapped.all_rows, mapped.first_row
        self._own = self._at[self._rank]
        self._num_counts = arena.spec.num_counts(arena.topology)
        self._counts = _counts_across_ranks(transport.segments.side_by_side(arena.row_bytes), arena.control_words)[
            ..., : self._num_counts + 1
        ]
        self._metadata = [views["metadata"].numpy() for views in self._at]
        self._returned_extras = [views["returned_extras"].numpy() for views in self._at]
        self._ring = arena.control_words.ring

    def mask(self, ranks: tuple[int, ...]) -> None:
        """Counts go to these ranks no more."""
        self._left = [rank for rank in self._left if rank not in ranks]

    def post_counts(self, sequence: int, counts: Tensor, too_many: int) -> None:
        """Writes this rank's counts [W] at every rank, stamped like words; the word that follows makes them visible.

        Args:
            too_many: this rank's tokens, where these are more than the call may have; else 0.
        """
        told = np.append(counts.numpy(), min(too_many, PAYLOAD_MASK))
        self._counts[self._left, sequence % self._ring, self._rank] = told | stamped(sequence, 0)

    def counts(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Everybody's counts of the call, int64 [P, W], once all words have been seen; and who brings too many [P]."""
        words = self._counts[self._rank, sequence % self._ring]
        stamps = words[self._left] >> PAYLOAD_BITS
        assert (stamps == stamped(sequence, 0) >> PAYLOAD_BITS).all(), "counts of another call"
        told = torch.from_numpy(words & PAYLOAD_MASK)
        return told[:, : self._num_counts].contiguous(), told[:, self._num_counts]

    def push_rows(self, plan: HostPlan, batch: Batch, words: Sequence[Word]) -> None:
        """Writes each row into its final place, in the receive slot that each peer named: one gather per block.

        Where rows are staged, one for each rank that its token goes to.
        """
        slots = [word.slot for word in words]
        hop = plan.hops[0]
        blocks = list(self._blocks(hop))
        metadata = self._pack_metadata(plan, batch)
        for peer, src, dst in blocks:
            self._metadata[peer][slots[peer], dst] = metadata[src]
        if plan.pairs is not None:
            rows_of_pairs = partial_rows_to_send(plan)
            of_pairs = list(self._blocks(plan.pairs))
            for peer, src, dst in of_pairs:
                self._at[peer]["partial_rows"][slots[peer], dst] = rows_of_pairs[src]
            if self._is_staged:
                hop, blocks = plan.pairs, of_pairs
        wire, region = self._arena.spec.wire, self._arena.region_of_rows(unquantized=batch.unquantized)
        columns, is_column = plan.extent.scales, self._arena.scales.column_major and not self._is_staged
        gather_scales = partial(self._gather_columns, columns) if is_column else self._gather
        if isinstance(batch.x, Quantized) or not isinstance(wire, Fp8) or batch.unquantized:
            data, scale = batch.x if isinstance(batch.x, Quantized) else (batch.x, None)
            self._gather(data, hop.send_idx, region, blocks, slots)
            if scale is not None:
                gather_scales(scale, hop.send_idx, "scale", blocks, slots)
            return
        idx = hop.send_idx.numpy()
        for start in range(0, plan.num_tokens, _CAST_ROWS):
            stop = min(start + _CAST_ROWS, plan.num_tokens)
            data, scale = wire.quantize(batch.x[start:stop])
            part = list(_between(blocks, idx, start, stop))
            self._gather(data, hop.send_idx - start, "data", part, slots)
            gather_scales(scale, hop.send_idx - start, "scale", part, slots)

    def room(self, num_rows: int, *, unquantized: bool) -> Tensor | Quantized | None:
        """What staged rows are expanded into; None where they arrive in their places.

        Raises:
            TransportError: there is no memory for it.
        """
        return self._row_maker.rows(num_rows, unquantized=unquantized) if self._is_staged else None

    def take(
        self, plan: HostPlan, batch: Batch, slot: int, num_rows: int, into: Tensor | Quantized | None
    ) -> tuple[HostPlan, Metadata]:
        """The metadata of rows that are in place, and the plan with what came for it; zeroes gaps between segments.

        Args:
            into: what ``room`` gave; staged rows are expanded into it.
        """
        metadata = take_metadata(self._arena, self._own, plan, batch, rank=self._rank, slot=slot, num_rows=num_rows)
        num_pairs = 0 if plan.pairs is None else int(plan.pairs.counts[:, self._rank].sum())
        if into is not None:
            region = self._arena.region_of_rows(unquantized=batch.unquantized)
            expand_rows(self._own, plan, into, region=region, slot=slot, num_pairs=num_pairs)
        if self._arena.spec.ranks_sum_picks:
            plan = replace(plan, partial_rows=self._own["partial_rows"][slot, :num_pairs].clone())
        return plan, metadata

    def push_outputs(self, plan: HostPlan, y: Tensor, weights: Tensor | None, words: Sequence[Word]) -> None:
        """Writes outputs y [R, H] to their owners, or their sums, weighted by [R], where ranks sum.

        A block that came in contiguously goes back as one copy.
        """
        sums_here = plan.partial_rows is not None or weights is not None
        for peer, here, there in self._incoming_blocks(plan.back):
            target = self._at[peer]["returned"][words[peer].slot, there]
            if sums_here:
                self._sum_here(plan, y, weights, here, target)
            else:
                target.copy_(y[here])

    def push_extras(self, plan: HostPlan, extras: Sequence[Tensor], words: Sequence[Word]) -> None:
        """Writes extras [R, ...] to the owners of their rows."""
        packed = np.concatenate([as_bytes(extra) for extra in extras], axis=1)
        for peer, here, there in self._incoming_blocks(plan.hops[0]):
            self._returned_extras[peer][words[peer].slot, there, : packed.shape[1]] = packed[here]

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
        """The sum of each token's rows [T, H], pulled from the peers' output slots or, if pushed, from this rank's.

        Args:
            out: where to write them; None: a new tensor.
        """
        sent_rows = self._sent_rows(plan, words, return_slot)
        terms = Terms(plan.terms.offsets, torch.from_numpy(sent_rows)[plan.terms.rows])
        term_weights = None if weights is None else _weights_of_terms(plan, weights)
        dtype = self._arena.spec.combine_dtype
        return sum_rows(self._all_rows, terms, dtype=dtype, weights=term_weights, bias=bias, out=out)

    def _sent_rows(self, plan: HostPlan, words: Sequence[Word], return_slot: int) -> npt.NDArray[np.int64]:
        """The number, in the matrix of all rows, of each row that returns, in ``back``'s sending order."""
        back = plan.back
        returned = self._first_row("returned", self._rank, return_slot)
        first_output = np.array(
            [
                -1 if word.output_slot == PUSHED else self._first_row("outputs", peer, word.output_slot)
                for peer, word in enumerate(words)
            ]
        )
        first = first_output[back.send_blocks // back.num_blocks_per_peer]
        return np.where(first < 0, returned + np.arange(first.size), first + back.send_dst_rows)

    def returned_extras(self, plan: HostPlan, extras: Sequence[Tensor], return_slot: int) -> tuple[Tensor, ...]:
        """Extras that came back, shaped as these: [T, ...] summed over ranks, or [T, K, ...] where rows are picks."""
        home = self._returned_extras[self._rank][return_slot]
        num_sent = plan.hops[0].send_idx.shape[0]
        sent = np.ascontiguousarray(home[:num_sent, : sum(widths_of(extras))]).view(np.float32)
        if not self._arena.spec.layout.per_pick:
            return apart(self._sums_of_extras(plan, sent), extras)
        pos = plan.pick_pos.numpy()
        values = np.zeros((*pos.shape, sent.shape[1]), dtype=np.float32)
        values[pos >= 0] = sent[pos[pos >= 0]]
        return apart(of_numpy(values), extras)

    def _sums_of_extras(self, plan: HostPlan, sent: npt.NDArray[np.float32]) -> Tensor:
        """Of each token's rows [Q, n], in the order in which they were sent: [T, n]."""
        values = np.zeros((plan.num_tokens, sent.shape[1]), dtype=np.float32)
        np.add.at(values, np.repeat(np.arange(plan.num_tokens), np.diff(plan.terms.offsets)), sent[plan.terms.rows])
        return of_numpy(values)

    def _sum_here(self, plan: HostPlan, y: Tensor, weights: Tensor | None, here: slice, home: Tensor) -> None:
        """Writes this rank's sums of some (token, rank) pairs to their owner, a few at a time."""
        num_sums = max(_SUMS_AT_ONCE, chunk_rows(y.shape[1]))
        for start in range(here.start, here.stop, num_sums):
            pairs = slice(start, min(start + num_sums, here.stop))
            if plan.partial_rows is None:
                table = np.arange(pairs.start, pairs.stop)[:, None]
            else:
                table = plan.partial_rows[pairs].numpy()
            terms = Terms.of(table)
            row_weights = None if weights is None else weights[terms.rows]
            home[start - here.start :][: table.shape[0]] = sum_rows(y, terms, dtype=home.dtype, weights=row_weights)

    def _gather(self, source: Tensor, idx: Tensor, region: str, blocks: Iterable[Block], slots: Sequence[int]) -> None:
        """Gathers the rows of each block into the region at its peer."""
        integers = movable(source)
        for peer, src, dst in blocks:
            there = self._at[peer][region][slots[peer], dst].view(integers.dtype)
            torch.index_select(integers, 0, idx[src], out=there)

    def _gather_columns(
        self,
        scales: ScaleLayout,
        source: Tensor,
        idx: Tensor,
        region: str,
        blocks: Iterable[Block],
        slots: Sequence[int],
    ) -> None:
        """The same of scales that arrive column-major: they are turned a block at a time."""
        source = as_integers(source)
        for peer, src, dst in blocks:
            there = scales.of_block(self._at[peer][region][slots[peer]], dst)
            as_integers(there).copy_(source.index_select(0, idx[src]))

    def _blocks(self, hop: Hop) -> Iterator[Block]:
        """(peer, rows in this rank's order, rows there) of each block this rank sends, those to the next peer first."""
        counts, src, dst = (m[hop.own].tolist() for m in (hop.counts, hop.send_starts, hop.dst_starts))
        for peer in self._peers_from_next():
            for b in range(peer * hop.num_blocks_per_peer, (peer + 1) * hop.num_blocks_per_peer):
                if counts[b]:
                    yield peer, slice(src[b], src[b] + counts[b]), slice(dst[b], dst[b] + counts[b])

    def _incoming_blocks(self, hop: Hop) -> Iterator[Block]:
        """(peer, rows here, rows in the peer's sending order) of each block that came to this rank."""
        mine = slice(hop.own * hop.num_blocks_per_peer, (hop.own + 1) * hop.num_blocks_per_peer)
        counts, src, dst = (m[:, mine].tolist() for m in (hop.counts, hop.send_starts, hop.dst_starts))
        for peer in self._peers_from_next():
            for num_rows, there, here in zip(counts[peer], src[peer], dst[peer], strict=True):
                if num_rows:
                    yield peer, slice(here, here + num_rows), slice(there, there + num_rows)

    def _peers_from_next(self) -> list[int]:
        """Every rank begins with another peer, so that they do not all write to one."""
        return [(self._rank + 1 + i) % self._num_ranks for i in range(self._num_ranks)]

    def _pack_metadata(self, plan: HostPlan, batch: Batch) -> Bytes:
        """The metadata of each sent row, [Q, metadata_bytes]: int32 source, ids and weights or one weight, extras."""
        hop, arena = plan.hops[0], self._arena
        tokens = hop.send_idx.numpy()
        metadata = np.zeros((tokens.size, arena.metadata_bytes), dtype=np.uint8)
        words = metadata.view(np.int32)
        words[:, 0] = self._rank * plan.extent.max_tokens + tokens
        num_topk = arena.spec.num_topk
        if hop.send_pick is None:
            words[:, 1 : 1 + num_topk] = plan.topk_idx.numpy()[tokens]
        if batch.weights is not None:
            weights = batch.weights.contiguous().numpy().view(np.int32)
            if hop.send_pick is None:
                words[:, 1 + num_topk : 1 + 2 * num_topk] = weights[tokens]
            else:
                words[:, 1] = weights[tokens, hop.send_pick.numpy()]
        at = arena.extras_offset
        for extra in batch.extras:
            raw = as_bytes(extra)
            metadata[:, at : at + raw.shape[1]] = raw[tokens]
            at += raw.shape[1]
        return metadata


def _counts_across_ranks(segments: SideBySide, control: Control) -> npt.NDArray[np.int64]:
    """Everybody's counts at all ranks as one array, [P, ring, P, counts]."""
    region, num_ranks = control["counts"], control.topology.num_ranks
    inner = torch.empty(region.shape, dtype=torch.int64, device="meta").stride()
    words = segments.memory[: (num_ranks - 1) * segments.stride + control.num_bytes].view(torch.int64)
    shape, strides = (num_ranks, *region.shape), (segments.stride // 8, *inner)
    return words.as_strided(shape, strides, region.offset // 8).numpy()


def _between(blocks: Iterable[Block], idx: npt.NDArray[np.int64], start: int, stop: int) -> Iterator[Block]:
    """The part of each block whose tokens lie in ``start .. stop - 1``; tokens ascend within a block."""
    for peer, src, dst in blocks:
        lo, hi = np.searchsorted(idx[src], (start, stop)).tolist()
        if lo < hi:
            yield peer, slice(src.start + lo, src.start + hi), slice(dst.start + lo, dst.start + hi)


def _weights_of_terms(plan: HostPlan, weights: Tensor) -> Tensor:
    """[n] from weights of picks [T, K]: a row that serves several picks has the sum of theirs, in pick order."""
    pos, by_pick = plan.back_pos.numpy(), weights.numpy()
    by_pos = np.zeros(plan.back.send_idx.shape[0], dtype=np.float32)
    for k in range(pos.shape[1]):
        is_pick = pos[:, k] >= 0
        by_pos[pos[is_pick, k]] += by_pick[is_pick, k]
    return torch.from_numpy(by_pos)[plan.terms.rows]
