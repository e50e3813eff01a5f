"""Scales to where ``crossdock.scales.ScaleLayout`` wants them: at peers, and from staged rows. Triton only.

A scale is a word of 4 bytes, or one byte. Neighbours of a row need not be neighbours there, so words are stored one by
one; rows are taken as many at a time as make the lanes of a program busy.

Letters: T tokens here, J rows of a token, K top-k, P ranks, N segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import slot_of
from crossdock.backends.cuda.kernels.metadata import pointers, region_at
from crossdock.backends.cuda.kernels.picks import ROW_BITS, ROW_MASK


@triton.jit
def scale_offset(row, segment_rows, SEGMENT: tl.constexpr, ROW: tl.constexpr):
    """``ScaleLayout.offset``, int64, in units of SEGMENT and ROW: of a segment, and of a row in it.

    Args:
        segment_rows: rows of a segment.
        SEGMENT: 0: segments follow each other as rows do.
    """
    if SEGMENT == 0:
        offset = row.to(tl.int64) * ROW
    else:
        segment = row.to(tl.int32) // segment_rows
        within = row.to(tl.int32) - segment * segment_rows
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


@triton.jit
def copy_scales(
    scale, strides, call, dst_rows, num_tokens, segments, region, segment_rows, J: tl.constexpr, scales, places
):
    """A program's share of the scales ``[T, SCALES]`` of rows: to all places of each, in the slots that peers named.

    Args:
        strides: of what is given, any.
    """
    SCALES: tl.constexpr = scales.SCALES
    PIECE: tl.constexpr = scales.PIECE
    TOKENS: tl.constexpr = scales.TOKENS
    PIECES: tl.constexpr = (SCALES + PIECE - 1) // PIECE
    scale = scale.to(tl.pointer_type(scales.WORD), bitcast=True)
    for i in range(tl.program_id(0), (num_tokens + TOKENS - 1) // TOKENS * PIECES, tl.num_programs(0)):
        token = i // PIECES * TOKENS + tl.arange(0, TOKENS)
        group = (i % PIECES * PIECE + tl.arange(0, PIECE))[None, :]
        is_scale = (token < num_tokens)[:, None] & (group < SCALES)
        at = token.to(tl.int64)[:, None] * strides.scales + group.to(tl.int64) * strides.groups
        word = tl.load(scale + at, mask=is_scale)
        behind = group_offset(group, places.GROUP_BYTES, 1, scales.SIZE)
        for j in tl.static_range(J):  # without branches, as ``copy_words``
            dst_row = tl.load(dst_rows + token * J + j, mask=token < num_tokens, other=-1)
            peer = tl.where(dst_row >= 0, dst_row >> ROW_BITS, 0)
            there = region_at(tl.load(segments + peer), region, slot_of(call, peer))
            there += scale_offset(dst_row & ROW_MASK, segment_rows, places.SEGMENT_BYTES, places.ROW_BYTES)
            there = pointers(there, scales.WORD)[:, None]
            tl.store(there + behind, word, mask=is_scale & (dst_row >= 0)[:, None])


@triton.jit
def expand_scales(
    from_address,
    to_address,
    partial_rows,
    num_pairs,
    segment_rows,
    group_words,
    STAGED_BYTES: tl.constexpr,
    sizes,
    scales,
    places,
):
    """A program's share of the scales of staged rows: to the places of their tokens' picks here.

    Args:
        from_address, to_address: int64, where scales of the first staged row, and scales here begin.
        partial_rows: int32 ``[pairs, K]``, dst_rows, -1 for picks of other ranks.
        group_words: between those of a row here.
    """
    K: tl.constexpr = sizes.K
    SCALES: tl.constexpr = scales.SCALES
    SIZE: tl.constexpr = scales.SIZE
    PIECE: tl.constexpr = scales.PIECE
    PAIRS: tl.constexpr = scales.TOKENS
    PIECES: tl.constexpr = (SCALES + PIECE - 1) // PIECE
    staged, to_scales = pointers(from_address, scales.WORD), pointers(to_address, scales.WORD)
    for i in range(tl.program_id(0), (num_pairs + PAIRS - 1) // PAIRS * PIECES, tl.num_programs(0)):
        pair = i // PIECES * PAIRS + tl.arange(0, PAIRS)
        group = (i % PIECES * PIECE + tl.arange(0, PIECE))[None, :]
        is_scale = (pair < num_pairs)[:, None] & (group < SCALES)
        word = tl.load(staged + pair.to(tl.int64)[:, None] * (STAGED_BYTES // SIZE) + group, mask=is_scale)
        behind = group.to(tl.int64) * group_words
        for k in tl.static_range(K):
            row = tl.load(partial_rows + pair.to(tl.int64) * K + k, mask=pair < num_pairs, other=-1)
            there = scale_offset(row, segment_rows, places.SEGMENT_BYTES // SIZE, places.ROW_BYTES // SIZE)
            tl.store((to_scales + there)[:, None] + behind, word, mask=is_scale & (row >= 0)[:, None])
