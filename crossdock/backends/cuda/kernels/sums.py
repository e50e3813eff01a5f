"""Sums of rows in float32, in a fixed order: at their owners, and at the ranks that sum first. Triton only.

Every product and every sum is rounded by itself, as ``crossdock.backends.sums`` defines: launch with
``enable_fp_fusion=False``. A row that is not there counts as +0, which changes no sum that was begun with +0.

Letters: T tokens here, J rows of a token, K top-k, H hidden, P ranks.
"""

# Tuples that grow by a value at each turn of an unrolled loop have no type.
# mypy: disable-error-code="assignment, var-annotated", no-warn-unreachable

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import (
    PUSHED,
    TICKET,
    end_call,
    is_ok,
    look_for_abort,
    output_slot_of,
    slot_of,
)
from crossdock.backends.cuda.kernels.metadata import as_int64, as_row, region_at, row_at
from crossdock.backends.cuda.kernels.picks import ROW_BITS, ROW_MASK
from crossdock.backends.cuda.kernels.plan import NUM_PAIRS, NUM_ROWS
from crossdock.backends.cuda.kernels.returns import gather_share
from crossdock.backends.cuda.kernels.rows import piece_at
from crossdock.backends.cuda.kernels.sync import is_last_program
from crossdock.backends.cuda.kernels.tables import tables_of


@triton.jit
def weight_of(weights, picks, token, j, peer, is_token, sizes):
    """The weights of tokens' j-th rows: of its one pick, or the sum of those at the row's rank, in pick order."""
    K: tl.constexpr = sizes.K
    if sizes.BY_RANK:
        weight = tl.zeros(token.shape, tl.float32)
        for k in tl.static_range(K):
            expert = tl.load(picks + token * K + k, mask=is_token, other=-1)
            is_its = (expert >= 0) & (expert // sizes.L == peer)
            weight += tl.where(is_its, tl.load(weights + token * K + k, mask=is_token, other=0.0), 0.0)
    else:
        weight = tl.load(weights + token * K + j, mask=is_token, other=0.0)
    return weight


BIAS_ROWS = tl.constexpr(1)
UNCHECKED = tl.constexpr(2)
"""How ``sum_rows`` goes about it."""


@triton.jit(do_not_specialize=["num_tokens", "rank", "ways", "width"])
def sum_rows(  # noqa: PLR0912 - branches of the compiler, most of them
    out, bias, weights, plan, call, num_tokens, rank, ways, results, width, own, returns, how
):
    """``out[t] = cast(0 + w[t, 0] * row 0 + w[t, 1] * row 1 + ... + bias)``, of the rows of each token.

    A program sums pieces of several tokens at a time. All their rows are on their way before the first is added, and
    without branches: else the next would begin to cross a link when the one before has. Rows lie in the output slots of
    the peers that left them there, and at this rank's returned rows from those that pushed. The last program looks
    whether a peer has given up what was read.

    Args:
        weights: float32 ``[T, K]``; bias: ``[T, H]`` (BIAS_ROWS in ``ways``), or ``[H]``.
        ways: with UNCHECKED another kernel looks for aborts: see ``calls.end_call``.
        results, width: for extras that have come back (width 0: none), see ``returns.gather_share``.
    """
    J: tl.constexpr = how.J
    H: tl.constexpr = how.H
    ROWS: tl.constexpr = how.tiles.ROWS
    PARTS: tl.constexpr = how.tiles.PARTS
    PIECES: tl.constexpr = how.tiles.PIECES
    AT_ONCE: tl.constexpr = how.tiles.AT_ONCE
    ROW_BYTES: tl.constexpr = H * out.dtype.element_ty.primitive_bitwidth // 8
    tables = tables_of(plan, num_tokens, own.sizes)
    dst_rows = tables.pair_dst_rows if how.OF_PAIRS else tables.dst_rows
    return_rows = tables.pair_return_rows if how.OF_PAIRS else tables.return_rows
    good = is_ok(own.state)
    mine = region_at(tl.load(own.segments + rank), returns.returned, slot_of(call, rank))
    for i in range(tl.program_id(0), (num_tokens + ROWS - 1) // ROWS * PARTS, tl.num_programs(0)):
        token = i // PARTS * ROWS + tl.arange(0, ROWS)
        is_token = token < num_tokens
        places = ()
        weights_of = ()
        for j in tl.static_range(J):
            dst_row = tl.load(dst_rows + token * J + j, mask=is_token, other=-1)
            is_row = (dst_row >= 0) & good
            peer = tl.where(is_row, dst_row >> ROW_BITS, rank)
            slot = output_slot_of(call, peer)
            is_pushed = is_row & (slot == PUSHED)
            return_row = tl.load(return_rows + token * J + j, mask=is_pushed, other=0)
            there = region_at(tl.load(own.segments + peer), returns.outputs, slot)
            base = tl.where(is_pushed, mine, there)
            place = base + tl.where(is_pushed, return_row.to(tl.int64), dst_row & ROW_MASK) * ROW_BYTES
            places = places + (tl.where(is_row, place, 0),)  # noqa: RUF005 - Triton's compiler knows no unpacking
            if how.HAS_WEIGHTS:
                weight = weight_of(weights, tables.picks, token, j, peer, is_token, own.sizes)
                weights_of = weights_of + (tl.where(is_row, weight, 0.0)[:, None],)  # noqa: RUF005
        to_row = out + as_int64(token)[:, None] * H
        first = i % PARTS * PIECES
        for piece in range(first, first + PIECES, AT_ONCE):
            coming = ()
            for n in tl.static_range(AT_ONCE):
                at, is_value = piece_at(piece + n, first + PIECES, H, how.tiles)
                for j in tl.static_range(J):
                    row = as_row(places[j], out, ROW_BYTES)[:, None] + at
                    coming = coming + (tl.load(row, mask=is_value & (places[j] != 0)[:, None], other=0.0),)  # noqa: RUF005
            for n in tl.static_range(AT_ONCE):
                at, is_value = piece_at(piece + n, first + PIECES, H, how.tiles)
                total = tl.zeros([ROWS, how.tiles.PIECE], tl.float32)
                for j in tl.static_range(J):
                    value = coming[n * J + j].to(tl.float32)
                    if how.HAS_WEIGHTS:
                        value = value * weights_of[j]
                    total += value
                if how.HAS_BIAS:
                    of_token = bias + as_int64(token)[:, None] * (ways & BIAS_ROWS) * H + at
                    total += tl.load(of_token, mask=is_token[:, None] & is_value, other=0.0).to(tl.float32)
                tl.store(to_row + at, total.to(out.dtype.element_ty), mask=is_token[:, None] & is_value)
    if width > 0:
        gather_share(call, tables, num_tokens, rank, results, width, own, returns, how.EXTRA_BYTES)
    if (ways & UNCHECKED) == 0:  # noqa: SIM102 - only then a ticket is taken
        if is_last_program(own.flags + TICKET):  # noqa: SIM102 - every program takes a ticket
            if is_ok(own.state):
                look_for_abort(own, call, rank)


@triton.jit(do_not_specialize=["num_given", "num_tokens", "rank", "max_polls"])
def push_sums(
    y,
    row_weights,
    rows,
    num_given,
    plan,
    call,
    num_tokens,
    rank,
    max_polls: tl.int64,
    stride,
    own,
    returns,
    scratch,
    how,
):
    """Writes this rank's sum of the rows of each (token, rank) pair to the pair's return_row; see ``return_rows_to``.

    Args:
        row_weights: float32 ``[R]``.
        rows, num_given: with GIVEN int32 ``[pairs, K]``, which rows of ``y [num_given, H]`` are of a pair; those that
            are not of y are none.
    """
    K: tl.constexpr = own.sizes.K
    H: tl.constexpr = how.ROW
    PIECE: tl.constexpr = how.tiles.PIECE
    PIECES: tl.constexpr = (H + PIECE - 1) // PIECE
    ROW_BYTES: tl.constexpr = H * y.dtype.element_ty.primitive_bitwidth // 8
    NUM: tl.constexpr = NUM_PAIRS if how.OF_PAIRS else NUM_ROWS
    tables = tables_of(plan, num_tokens, own.sizes)
    src_rows = scratch.pair_src_rows if how.OF_PAIRS else scratch.src_rows
    partial_rows = rows if how.GIVEN else tables.partial_rows
    if is_ok(own.state):
        for i in range(tl.program_id(0), tl.load(tables.scalars + NUM) * PIECES, tl.num_programs(0)):
            pair = i // PIECES
            at = i % PIECES * PIECE + tl.arange(0, PIECE)
            is_value = at < H
            total = tl.zeros([PIECE], tl.float32)
            for k in tl.static_range(K if how.OF_PAIRS else 1):
                row = tl.load(partial_rows + pair * K + k) if how.OF_PAIRS else pair
                if how.GIVEN:
                    row = tl.where(row < num_given, row, -1)
                value = tl.load(y + as_int64(row) * stride + at, mask=is_value & (row >= 0), other=0.0)
                value = value.to(tl.float32)
                if how.HAS_WEIGHTS:
                    value = value * tl.load(row_weights + row, mask=row >= 0, other=0.0)
                total += value
            src_row = tl.load(src_rows + pair)
            if src_row >= 0:
                peer = src_row >> ROW_BITS
                there = region_at(tl.load(own.segments + peer), returns.returned, slot_of(call, peer))
                return_row = row_at(there, src_row & ROW_MASK, y, ROW_BYTES)
                tl.store(return_row + at, total.to(y.dtype.element_ty), mask=is_value)
    end_call(own, call, tables.tokens, rank, max_polls, how.ends)
