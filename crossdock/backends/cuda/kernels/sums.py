"""Sums of rows in float32, in a fixed order: at their owners, and at the ranks that sum first. Triton only.

Every product and every sum is rounded by itself, as ``crossdock.backends.sums`` defines: launch with
``enable_fp_fusion=False``. A row that is not there counts as +0, which changes no sum that was begun with +0.

Letters: T tokens here, J rows of a token, K top-k, H hidden, P ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import PUSHED, is_ok, output_slot_of, slot_of
from crossdock.backends.cuda.kernels.plan import ROW_BITS, ROW_MASK
from crossdock.backends.cuda.kernels.rows import as_int64, row_at


@triton.jit(do_not_specialize=["num_tokens", "rank", "returned", "bias_rows"])
def sum_rows(
    out,
    bias,
    weights,
    dst_rows,
    return_rows,
    segments,
    call,
    state,
    num_tokens,
    rank,
    outputs,
    slot_bytes,
    returned,
    bias_rows,
    J: tl.constexpr,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """``out[t] = cast(0 + w[t, 0] * row 0 + w[t, 1] * row 1 + ... + bias)``, of the rows of each token.

    Rows lie in the output slots of the peers that left them there, and at this rank's returned rows from
    those that pushed.

    Args:
        weights: float32 ``[T, J]``; bias: ``[T, H]`` (bias_rows 1), or ``[H]`` (0).
        outputs, slot_bytes: where in a segment output slot 0 begins, and bytes of a slot.
        returned: where in this rank's segment the returned slot of the call begins.
    """
    PIECES: tl.constexpr = (H + PIECE - 1) // PIECE
    ROW_BYTES: tl.constexpr = H * out.dtype.element_ty.primitive_bitwidth // 8
    good = is_ok(state)
    own = tl.load(segments + rank) + returned
    for i in range(tl.program_id(0), num_tokens * PIECES, tl.num_programs(0)):
        token = i // PIECES
        at = i % PIECES * PIECE + tl.arange(0, PIECE)
        is_value = at < H
        total = tl.zeros([PIECE], tl.float32)
        for j in tl.static_range(J):
            dst_row = tl.load(dst_rows + token * J + j)
            is_row = (dst_row >= 0) & good
            peer = tl.where(is_row, dst_row >> ROW_BITS, rank)
            slot = output_slot_of(call, peer)
            is_pushed = is_row & (slot == PUSHED)
            return_row = tl.load(return_rows + token * J + j, mask=is_pushed, other=0)
            there = tl.load(segments + peer) + outputs + slot * slot_bytes
            base = tl.where(is_pushed, own, there)
            row = tl.where(is_pushed, return_row.to(tl.int64), dst_row & ROW_MASK)
            value = tl.load(row_at(base, row, out, ROW_BYTES) + at, mask=is_value & is_row, other=0.0).to(tl.float32)
            if HAS_WEIGHTS:
                value = value * tl.load(weights + token * J + j, mask=is_row, other=0.0)
            total += value
        if HAS_BIAS:
            total += tl.load(bias + as_int64(token) * bias_rows * H + at, mask=is_value, other=0.0).to(tl.float32)
        tl.store(out + as_int64(token) * H + at, total.to(out.dtype.element_ty), mask=is_value)


@triton.jit
def push_sums(
    y,
    row_weights,
    partial_rows,
    src_rows,
    scalars,
    segments,
    call,
    state,
    stride,
    region,
    slot_bytes,
    NUM: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    """Writes this rank's sum of the rows of each (token, rank) pair to the pair's return_row.

    Args:
        partial_rows: int32 ``[pairs, K]``, the rows of a pair in the order of picks, -1 for none; with K = 0 each row
            is a pair of its own.
        row_weights: float32 ``[R]``.
    """
    PIECES: tl.constexpr = (H + PIECE - 1) // PIECE
    ROW_BYTES: tl.constexpr = H * y.dtype.element_ty.primitive_bitwidth // 8
    if is_ok(state):
        for i in range(tl.program_id(0), tl.load(scalars + NUM) * PIECES, tl.num_programs(0)):
            pair = i // PIECES
            at = i % PIECES * PIECE + tl.arange(0, PIECE)
            is_value = at < H
            total = tl.zeros([PIECE], tl.float32)
            for k in tl.static_range(K if K > 0 else 1):
                row = tl.load(partial_rows + pair * K + k) if K > 0 else pair
                value = tl.load(y + as_int64(row) * stride + at, mask=is_value & (row >= 0), other=0.0)
                value = value.to(tl.float32)
                if HAS_WEIGHTS:
                    value = value * tl.load(row_weights + row, mask=row >= 0, other=0.0)
                total += value
            src_row = tl.load(src_rows + pair)
            if src_row >= 0:
                peer = src_row >> ROW_BITS
                there = tl.load(segments + peer) + region + slot_of(call, peer) * slot_bytes
                return_row = row_at(there, src_row & ROW_MASK, y, ROW_BYTES)
                tl.store(return_row + at, total.to(y.dtype.element_ty), mask=is_value)


@triton.jit(do_not_specialize=["num_tokens"])
def weigh_rows(
    topk_idx,
    weights,
    dst_rows,
    out,
    num_tokens,
    L: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Weights of rows that serve all picks of a token at a rank, ``[T, J]``: the sum of theirs, in pick order."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, triton.next_power_of_2(J))
    is_here = (token < num_tokens)[:, None] & (column < J)[None, :]
    at = token[:, None] * J + column[None, :]
    peer = tl.load(dst_rows + at, mask=is_here, other=-1) >> ROW_BITS
    total = tl.zeros([TOKENS, column.shape[0]], tl.float32)
    for k in range(K):
        expert = tl.load(topk_idx + token * K + k, mask=token < num_tokens, other=-1).to(tl.int64)
        weight = tl.load(weights + token * K + k, mask=token < num_tokens, other=0.0)
        is_its = (expert >= 0)[:, None] & ((expert // L)[:, None] == peer)
        total += tl.where(is_its, weight[:, None], 0.0)
    tl.store(out + at, total, mask=is_here)
