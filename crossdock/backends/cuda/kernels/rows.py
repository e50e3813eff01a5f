"""Copies of rows: out to their places, back to their owners, and from staged rows into their places. Triton only.

A row is moved as words of the widest type that divides it, in pieces; a program moves one piece, then the next of its
share. Wide kernels wait for nobody, and touch peer memory only in a call that is OK.

Letters: T tokens here, J rows of a token, K top-k, P ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import is_ok, slot_of
from crossdock.backends.cuda.kernels.plan import ROW_BITS, ROW_MASK


@triton.jit
def as_int64(index):
    """An index as int64, so that its product with a row's size does not wrap around."""
    return tl.zeros([], tl.int64) + index


@triton.jit
def row_at(address, row, like, ROW_BYTES: tl.constexpr):
    """A pointer of the type of ``like`` to a row behind an address (int64, a multiple of 16 bytes)."""
    at = (address + row.to(tl.int64) * ROW_BYTES).to(like.dtype, bitcast=True)
    if ROW_BYTES % 16 == 0:  # of an address from a table the compiler does not know
        at = tl.multiple_of(at, 16)
    return at


@triton.jit(do_not_specialize=["num_tokens"])
def push_rows(
    x,
    dst_rows,
    segments,
    call,
    state,
    num_tokens,
    stride,
    region,
    slot_bytes,
    J: tl.constexpr,
    ROW: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PIECE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Writes each row ``x [T, ROW]`` to all its places, in the slot that each peer named.

    Without branches, so that the addresses of all places are on their way at once.

    Args:
        stride: words between rows of x.
        region, slot_bytes: where in a segment the rows of slot 0 begin, and bytes of a slot.
        ROW_BYTES: between rows there; at least those of ROW words.
        TOKENS: whose pieces a program moves at a time.
    """
    PIECES: tl.constexpr = (ROW + PIECE - 1) // PIECE
    if is_ok(state):
        for i in range(tl.program_id(0), (num_tokens + TOKENS - 1) // TOKENS * PIECES, tl.num_programs(0)):
            token = i // PIECES * TOKENS + tl.arange(0, TOKENS)
            at = i % PIECES * PIECE + tl.arange(0, PIECE)
            is_word = (token < num_tokens)[:, None] & (at < ROW)[None, :]
            row = tl.load(x + token.to(tl.int64)[:, None] * stride + at[None, :], mask=is_word)
            for j in tl.static_range(J):
                dst_row = tl.load(dst_rows + token * J + j, mask=token < num_tokens, other=-1)
                peer = tl.where(dst_row >= 0, dst_row >> ROW_BITS, 0)
                there = tl.load(segments + peer) + region + slot_of(call, peer) * slot_bytes
                there = row_at(there, dst_row & ROW_MASK, x, ROW_BYTES)[:, None]
                tl.store(there + at[None, :], row, mask=is_word & (dst_row >= 0)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def pack_rows(
    x,
    dst_rows,
    return_rows,
    packed,
    state,
    num_tokens,
    stride,
    J: tl.constexpr,
    ROW: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Copies each row ``x [T, ROW]`` to its places in the order in which this rank sends, ``packed [Q, ROW]``."""
    PIECES: tl.constexpr = (ROW + PIECE - 1) // PIECE
    if is_ok(state):
        for i in range(tl.program_id(0), num_tokens * PIECES, tl.num_programs(0)):
            token = i // PIECES
            at = i % PIECES * PIECE + tl.arange(0, PIECE)
            row = tl.load(x + as_int64(token) * stride + at, mask=at < ROW)
            for j in tl.static_range(J):
                if tl.load(dst_rows + token * J + j) >= 0:
                    return_row = tl.load(return_rows + token * J + j).to(tl.int64)
                    tl.store(packed + return_row * ROW + at, row, mask=at < ROW)


@triton.jit
def return_rows_to(
    y,
    src_rows,
    scalars,
    segments,
    call,
    state,
    stride,
    region,
    slot_bytes,
    NUM: tl.constexpr,
    ROW: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Writes each row of ``y [R, ROW]`` that came from somewhere back there, into the slot that the peer named.

    Args:
        NUM: which of the scalars is R.
    """
    PIECES: tl.constexpr = (ROW + PIECE - 1) // PIECE
    if is_ok(state):
        for i in range(tl.program_id(0), tl.load(scalars + NUM) * PIECES, tl.num_programs(0)):
            src_row = tl.load(src_rows + i // PIECES)
            if src_row >= 0:
                at = i % PIECES * PIECE + tl.arange(0, PIECE)
                row = tl.load(y + as_int64(i // PIECES) * stride + at, mask=at < ROW)
                peer = src_row >> ROW_BITS
                there = tl.load(segments + peer) + region + slot_of(call, peer) * slot_bytes
                tl.store(row_at(there, src_row & ROW_MASK, y, ROW_BYTES) + at, row, mask=at < ROW)


@triton.jit
def expand_rows(
    staged,
    rows,
    partial_rows,
    scalars,
    state,
    staged_stride,
    NUM: tl.constexpr,
    K: tl.constexpr,
    ROW: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Copies each staged row, one for all picks of its token here, to the places of those picks in ``rows [R, ROW]``.

    Args:
        staged_stride: words between staged rows.
        partial_rows: int32 ``[pairs, K]``, dst_rows, -1 for picks of other ranks.
    """
    PIECES: tl.constexpr = (ROW + PIECE - 1) // PIECE
    if is_ok(state):
        for i in range(tl.program_id(0), tl.load(scalars + NUM) * PIECES, tl.num_programs(0)):
            pair = i // PIECES
            at = i % PIECES * PIECE + tl.arange(0, PIECE)
            row = tl.load(staged + as_int64(pair) * staged_stride + at, mask=at < ROW)
            for k in tl.static_range(K):
                there = tl.load(partial_rows + pair * K + k)
                if there >= 0:
                    tl.store(rows + there.to(tl.int64) * ROW + at, row, mask=at < ROW)


@triton.jit
def zero_gaps(rows, incoming, starts, state, P: tl.constexpr, N: tl.constexpr, ROW: tl.constexpr, PIECE: tl.constexpr):
    """Zeroes the rows that alignment leaves behind the last row of each segment. Grid: segments, pieces of a row."""
    segment = tl.program_id(0)
    at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    last = incoming + segment * P + P - 1
    zero = tl.zeros([PIECE], rows.dtype.element_ty)
    if is_ok(state):
        for i in range(tl.load(last) + tl.load(last + N * P), tl.load(starts + segment + 1)):
            tl.store(rows + as_int64(i) * ROW + at, zero, mask=at < ROW)
