"""Scales to where ``crossdock.scales.ScaleLayout`` wants them: at peers, from staged rows, and zeros. Triton only.

A scale is a word of 4 bytes, or one byte. Neighbours of a row need not be neighbours there, so words are stored one by
one; rows are taken as many at a time as make the lanes of a program busy.

Letters: T tokens here, J rows of a token, K top-k, P ranks, N segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import is_ok, slot_of
from crossdock.backends.cuda.kernels.plan import ROW_BITS, ROW_MASK


@triton.jit
def scale_offset(row, SEGMENT_ROWS: tl.constexpr, SEGMENT: tl.constexpr, ROW: tl.constexpr):
    """``ScaleLayout.offset``, int64, in units of SEGMENT and ROW: of a segment, and of a row in it.

    Args:
        SEGMENT_ROWS: rows of a segment; 0: segments follow each other as rows do.
    """
    if SEGMENT_ROWS == 0:
        offset = row.to(tl.int64) * ROW
    else:
        segment = row.to(tl.int32) // SEGMENT_ROWS
        within = row.to(tl.int32) - segment * SEGMENT_ROWS
        offset = segment.to(tl.int64) * SEGMENT + within.to(tl.int64) * ROW
    return offset


@triton.jit
def group_offset(group, GROUP_BYTES: tl.constexpr, WORD: tl.constexpr, SIZE: tl.constexpr):
    """Where scales of SIZE bytes lie behind their row's first, in units of them.

    WORD of them lie side by side (4 bytes that are packed in one word, else 1), and words are GROUP_BYTES apart.
    """
    if GROUP_BYTES == WORD * SIZE:
        offset = group
    else:
        offset = (group // WORD).to(tl.int64) * (GROUP_BYTES // SIZE) + group % WORD
    return offset


@triton.jit(do_not_specialize=["num_tokens", "row_stride", "group_stride"])
def push_scales(
    scale,
    dst_rows,
    segments,
    call,
    state,
    num_tokens,
    row_stride,
    group_stride,
    region,
    slot_bytes,
    J: tl.constexpr,
    SCALES: tl.constexpr,
    SIZE: tl.constexpr,
    SEGMENT_ROWS: tl.constexpr,
    SEGMENT_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    PIECE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Writes the scales ``[T, SCALES]`` of each row to all its places, in the slot that each peer named.

    Args:
        row_stride, group_stride: of what is given, in words; any.
        region, slot_bytes: where in a segment the scales of slot 0 begin, and bytes of a slot.
        SIZE: bytes of a word.
        SEGMENT_ROWS, SEGMENT_BYTES, SCALE_BYTES: see ``scale_offset``.
        GROUP_BYTES: between the words of a row there.
        TOKENS, PIECE: tokens, and words of each, that a program moves at a time.
    """
    PIECES: tl.constexpr = (SCALES + PIECE - 1) // PIECE
    if is_ok(state):
        for i in range(tl.program_id(0), (num_tokens + TOKENS - 1) // TOKENS * PIECES, tl.num_programs(0)):
            token = i // PIECES * TOKENS + tl.arange(0, TOKENS)
            group = (i % PIECES * PIECE + tl.arange(0, PIECE))[None, :]
            is_scale = (token < num_tokens)[:, None] & (group < SCALES)
            at = token.to(tl.int64)[:, None] * row_stride + group.to(tl.int64) * group_stride
            word = tl.load(scale + at, mask=is_scale)
            behind = group_offset(group, GROUP_BYTES, 1, SIZE)
            for j in tl.static_range(J):  # without branches, as push_rows
                dst_row = tl.load(dst_rows + token * J + j, mask=token < num_tokens, other=-1)
                peer = tl.where(dst_row >= 0, dst_row >> ROW_BITS, 0)
                there = tl.load(segments + peer) + region + slot_of(call, peer) * slot_bytes
                there += scale_offset(dst_row & ROW_MASK, SEGMENT_ROWS, SEGMENT_BYTES, SCALE_BYTES)
                there = there.to(scale.dtype, bitcast=True)[:, None]
                tl.store(there + behind, word, mask=is_scale & (dst_row >= 0)[:, None])


@triton.jit
def expand_scales(
    staged,
    scales,
    partial_rows,
    scalars,
    state,
    staged_stride,
    NUM: tl.constexpr,
    K: tl.constexpr,
    SCALES: tl.constexpr,
    SEGMENT_ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROW: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Copies the scales of each staged row to the places of its token's picks here.

    Args:
        staged: words; ``staged_stride`` of them between staged rows.
        partial_rows: int32 ``[pairs, K]``, dst_rows, -1 for picks of other ranks.
        SEGMENT, ROW, GROUP: words between segments, rows, and the words of a row in ``scales``.
        PAIRS, PIECE: staged rows, and words of each, that a program copies at a time.
    """
    PIECES: tl.constexpr = (SCALES + PIECE - 1) // PIECE
    if is_ok(state):
        num_pairs = tl.load(scalars + NUM)
        for i in range(tl.program_id(0), (num_pairs + PAIRS - 1) // PAIRS * PIECES, tl.num_programs(0)):
            pair = i // PIECES * PAIRS + tl.arange(0, PAIRS)
            group = (i % PIECES * PIECE + tl.arange(0, PIECE))[None, :]
            is_scale = (pair < num_pairs)[:, None] & (group < SCALES)
            word = tl.load(staged + pair.to(tl.int64)[:, None] * staged_stride + group, mask=is_scale)
            behind = group.to(tl.int64) * GROUP
            for k in tl.static_range(K):
                row = tl.load(partial_rows + pair.to(tl.int64) * K + k, mask=pair < num_pairs, other=-1)
                there = scales + scale_offset(row, SEGMENT_ROWS, SEGMENT, ROW)[:, None]
                tl.store(there + behind, word, mask=is_scale & (row >= 0)[:, None])


@triton.jit
def zero_scale_gaps(
    scales,
    incoming,
    starts,
    state,
    P: tl.constexpr,
    N: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Zeroes the scales of rows that alignment leaves behind the last row of each segment, where rows lie side by side.

    Grid: segments, pieces of SCALES. ROWS of them at a time; GROUP words lie between the words of a row.
    """
    segment = tl.program_id(0)
    group = (tl.program_id(1) * PIECE + tl.arange(0, PIECE))[:, None]
    last = incoming + segment * P + P - 1
    zero = tl.zeros([PIECE, ROWS], scales.dtype.element_ty)
    if is_ok(state):
        end = tl.load(starts + segment + 1)
        for first in range(tl.load(last) + tl.load(last + N * P), end, ROWS):
            row = (first + tl.arange(0, ROWS))[None, :]
            tl.store(scales + group.to(tl.int64) * GROUP + row, zero, mask=(group < SCALES) & (row < end))
