"""Rows of a receive slot into a tensor of the caller's own; narrow ones dequantised as ``Fp8.dequantize`` does. Triton.

Local: no word, no peer. Launch with ``enable_fp_fusion=False``.

Letters: R rows (of all segments), H hidden, G scale groups of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.cast import E4M3_NAN
from crossdock.backends.cuda.kernels.metadata import as_int64
from crossdock.backends.cuda.kernels.scales import group_offset, scale_offset
from crossdock.backends.cuda.kernels.tables import at_bytes

E4M3_SHIFT = tl.constexpr(23 - 3)
"""From e4m3's mantissa to float32's."""
E4M3_UNIT = tl.constexpr(2.0 ** (127 - 7))
"""What the difference of the exponents' biases makes of a value."""


@triton.jit
def e4m3_values(bits):
    """The float32 values of bytes of e4m3fn, exactly; subnormal ones, zeros of both signs and NaN too.

    Where the target has no cast of this kind, in integers: exponent and mantissa are moved to float32's place.
    """
    if tl.target_info.cuda_capability_geq(8, 9):
        value = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        size = bits.to(tl.int32) & 0x7F
        value = (size << E4M3_SHIFT).to(tl.float32, bitcast=True) * E4M3_UNIT
        value = tl.where(size == E4M3_NAN, float("nan"), value)
        sign = (bits.to(tl.int32) & 0x80) << 24
        value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return value


@triton.jit(do_not_specialize=["num_rows", "segment"])
def copy_arrived(
    out,
    rows,
    plan,
    num_rows,
    segment,
    ROW: tl.constexpr,
    PIECE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COUNTS_AT: tl.constexpr,
):
    """Copies words of rows ``[R, ROW]`` to ``out``, as far as rows came; what is behind them is not touched.

    Args:
        segment: rows of a segment, of which as many came as counts at COUNTS_AT in the plan say.
        SEGMENTS: whether there are several.
    """
    PIECES: tl.constexpr = (ROW + PIECE - 1) // PIECE
    counts = at_bytes(plan, COUNTS_AT, tl.int32)
    for i in range(tl.program_id(0), num_rows * PIECES, tl.num_programs(0)):
        row = i // PIECES
        nth = row % segment if SEGMENTS else row
        came = nth < (tl.load(counts + row // segment) if SEGMENTS else tl.load(counts))
        at = i % PIECES * PIECE + tl.arange(0, PIECE)
        there = as_int64(row) * ROW + at
        tl.store(out + there, tl.load(rows + there, mask=(at < ROW) & came), mask=(at < ROW) & came)


@triton.jit(do_not_specialize=["num_rows"])
def dequantize_rows(
    out,
    data,
    scale,
    src_idx,
    num_rows,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT_ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROW: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    WORD: tl.constexpr,
    GROUPS: tl.constexpr,
    EXPONENTS: tl.constexpr,
    HAS_GAPS: tl.constexpr,
):
    """``out [R, H]`` from bytes of e4m3 ``data [R, H]`` and their scales: float32 products, each cast once.

    Args:
        scale: float32, or the bytes of biased exponents (EXPONENTS).
        src_idx: int32 ``[R]``; with HAS_GAPS rows where it is negative become 0, and nothing of them is read.
        BLOCK: values per scale.
        SEGMENT_ROWS, SEGMENT, ROW: see ``scale_offset``, in units of scales.
        GROUP_BYTES: between the words of a row's scales, WORD of which are one.
        GROUPS: blocks of one piece, a power of two.
    """
    G: tl.constexpr = H // BLOCK
    PIECES: tl.constexpr = (G + GROUPS - 1) // GROUPS
    SCALE_SIZE: tl.constexpr = 1 if EXPONENTS else 4
    within = tl.arange(0, triton.next_power_of_2(BLOCK))
    for i in range(tl.program_id(0), num_rows * PIECES, tl.num_programs(0)):
        row = i // PIECES
        group = i % PIECES * GROUPS + tl.arange(0, GROUPS)
        at = group[:, None] * BLOCK + within[None, :]
        is_group = group < G
        is_read = is_group
        if HAS_GAPS:
            is_read = is_group & (tl.load(src_idx + row) >= 0)
        is_value = (within < BLOCK)[None, :]
        first = as_int64(row) * H
        value = e4m3_values(tl.load(data + first + at, mask=is_read[:, None] & is_value, other=0))
        behind = scale_offset(as_int64(row), SEGMENT_ROWS, SEGMENT, ROW)
        behind += group_offset(group, GROUP_BYTES, WORD, SCALE_SIZE)
        factor = tl.load(scale + behind, mask=is_read, other=0)
        if EXPONENTS:
            factor = (factor.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        value = (value * factor[:, None]).to(out.dtype.element_ty)
        tl.store(out + first + at, value, mask=is_group[:, None] & is_value)


@triton.jit(do_not_specialize=["num_rows"])
def copy_rows(out, rows, src_idx, num_rows, ROW: tl.constexpr, PIECE: tl.constexpr):
    """``out [R, ROW]``, the words of ``rows``, or 0 where ``src_idx [R]`` is negative; nothing of those is read."""
    PIECES: tl.constexpr = (ROW + PIECE - 1) // PIECE
    for i in range(tl.program_id(0), num_rows * PIECES, tl.num_programs(0)):
        row = i // PIECES
        at = i % PIECES * PIECE + tl.arange(0, PIECE)
        first = as_int64(row) * ROW
        is_row = tl.load(src_idx + row) >= 0
        tl.store(out + first + at, tl.load(rows + first + at, mask=(at < ROW) & is_row, other=0), mask=at < ROW)
