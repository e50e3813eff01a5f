"""Rows cast to FP8 on their way out, by the formula of ``crossdock.wire.Fp8``, to the same bits. Triton only.

Launch with ``enable_fp_fusion=False``; the division is the correctly rounded one.

Letters: T tokens here, J rows of a token, H hidden, G scale groups of a row.
"""

# Tuples that grow by a value at each turn of an unrolled loop have no type.
# mypy: disable-error-code="assignment, var-annotated", no-warn-unreachable

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import end_call, is_ok, slot_of
from crossdock.backends.cuda.kernels.groups import value_of
from crossdock.backends.cuda.kernels.metadata import pointers, region_at
from crossdock.backends.cuda.kernels.picks import ROW_BITS, ROW_MASK
from crossdock.backends.cuda.kernels.rows import push_beside
from crossdock.backends.cuda.kernels.scales import group_offset, scale_offset
from crossdock.backends.cuda.kernels.tables import tables_of

E4M3_MAX = tl.constexpr(448.0)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
E4M3_NAN = tl.constexpr(0x7F)
BIAS_DIFFERENCE = tl.constexpr((127 - 7) << 3)
"""Between the exponents' biases of float32 and e4m3, in units of e4m3's last bit."""
FIRST_NORMAL = tl.constexpr(2.0**-6)
SUBNORMAL_UNIT = tl.constexpr(2.0**14)
"""Added to a float32 it rounds to multiples of 2**-9, the smallest e4m3; the last bits then count them."""
SUBNORMAL_UNIT_BITS = tl.constexpr((127 + 14) << 23)
SMALL = tl.constexpr(2.0**-60)
_KEPT = tl.constexpr(4)
"""Places of a row of which a thread has registers to keep the addresses."""
UP, DOWN = tl.constexpr(2.0**64), tl.constexpr(2.0**-64)


@triton.jit
def e4m3_bits(value):
    """The bits of finite float32 values within +-448 as e4m3fn, to nearest, ties to even; as int32.

    In integers, so that every target gives the same ones: gfx942's own FP8 is another kind.
    """
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - BIAS_DIFFERENCE
    subnormal = (tl.abs(value) + SUBNORMAL_UNIT).to(tl.int32, bitcast=True) - SUBNORMAL_UNIT_BITS
    return tl.where(tl.abs(value) < FIRST_NORMAL, subnormal, normal) | ((bits >> 24) & 0x80)


@triton.jit
def quotient(value, scale, POW2: tl.constexpr, CORRECTIONS: tl.constexpr):
    """``value / scale`` of blocks ``[G, BLOCK]`` by their scales ``[G]``, correctly rounded, without branches.

    Multiplies with the reciprocal, and corrects that twice by the remainder. By a theorem of Markstein's the second
    correction of a quotient that is off by less than its last bit rounds correctly, if the reciprocal is the nearest
    and the remainder exact ("Computation of elementary functions on the IBM RISC System/6000", 1990). One is enough
    for values of 8 or 11 bits by a 448th of such a value: ``tests/unit/test_quotient.py`` tries all. The remainder of
    small scales would underflow: both are made larger before. With the signs that remainder and reciprocal have here,
    -0 stays -0; what is not finite becomes NaN, but for POW2.
    """
    reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    if POW2:
        return value * reciprocal[:, None]
    is_small = scale < SMALL
    # With the signs of values and reciprocals turned, the remainder is one operation: there is none for a * b - c.
    minus = value * tl.where(is_small, -UP, -1.0)[:, None]
    scale = tl.broadcast_to((scale * tl.where(is_small, UP, 1.0))[:, None], value.shape)
    reciprocal = tl.broadcast_to((reciprocal * tl.where(is_small, -DOWN, -1.0))[:, None], value.shape)
    ratio = minus * reciprocal
    for _ in tl.static_range(CORRECTIONS):
        ratio = tl.fma(tl.fma(ratio, scale, minus), reciprocal, ratio)
    return ratio


@triton.jit
def cast_blocks(given, POW2: tl.constexpr, EXPONENTS: tl.constexpr):
    """Blocks of values ``[G, BLOCK]`` (0 behind a block's end) as bytes of e4m3, and their scales ``[G]``.

    Args:
        given: bfloat16, float16 or float32.
        POW2: round scales up to powers of two; EXPONENTS: give their biased exponents.
    """
    CORRECTIONS: tl.constexpr = 2 if given.dtype.primitive_bitwidth == 32 else 1
    value = given.to(tl.float32)
    size = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    is_finite = size < 0x7F800000
    # Sizes of finite floats are ordered as their bits are, and integers have no NaN to take care of.
    amax = tl.max(tl.where(is_finite, size, 0), axis=1).to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, E4M3_MAX, tl.float32)), SMALLEST_NORMAL)
    if POW2:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    if tl.target_info.cuda_capability_geq(
        8, 9
    ):  # its casts are to nearest, ties to even, within +-448; NaN is E4M3_NAN
        ratio = quotient(value, scale, POW2, CORRECTIONS)
        if POW2:
            ratio = tl.where(is_finite, ratio, float("nan"))
        data = ratio.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        ratio = tl.div_rn(tl.where(is_finite, value, 0.0), tl.broadcast_to(scale[:, None], value.shape))
        data = e4m3_bits(tl.minimum(tl.maximum(ratio, -E4M3_MAX), E4M3_MAX))
        data = tl.where(is_finite, data, E4M3_NAN).to(tl.uint8)
    return data, (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8) if EXPONENTS else scale


@triton.jit
def cast_rows(x, stride, call, dst_rows, num_tokens, segments, arrivals, segment_rows, cast, places):
    """A program's share of rows ``x [T, H]``: cast, data and scales written to all places of each row; see ``Cast``.

    Where a row goes is worked out once for all its groups of a share. The values of the next ones are on their way
    while these are cast.
    """
    BLOCK: tl.constexpr = cast.BLOCK
    J: tl.constexpr = cast.J
    SIDE: tl.constexpr = cast.SIDE_BY_SIDE
    END: tl.constexpr = cast.PIECES * SIDE
    SCALE_TYPE: tl.constexpr = tl.uint8 if cast.EXPONENTS else tl.float32
    SCALE_SIZE: tl.constexpr = 1 if cast.EXPONENTS else 4
    lane = tl.arange(0, cast.ROWS * SIDE)
    within = tl.arange(0, triton.next_power_of_2(BLOCK))[None, :]
    for i in range(tl.program_id(0), (num_tokens + cast.ROWS - 1) // cast.ROWS * cast.PARTS, tl.num_programs(0)):
        token = i // cast.PARTS * cast.ROWS + lane // SIDE
        first = i % cast.PARTS * END
        row = x + token.to(tl.int64) * stride
        coming = load_groups(row, first + lane % SIDE, token < num_tokens, first + END, cast)
        kept = ()
        if J <= _KEPT:
            for j in tl.static_range(J):  # without branches, as ``copy_words``
                dst_row = tl.load(dst_rows + token * J + j, mask=token < num_tokens, other=-1)
                kept = kept + places_of_row(dst_row, call, segments, arrivals, segment_rows, cast, places)
        for begin in range(first, first + END, SIDE):
            value = coming
            group = begin + lane % SIDE
            coming = load_groups(row, group + SIDE, token < num_tokens, first + END, cast)
            is_group = group < cast.SCALES
            is_value = (group < cast.H // BLOCK)[:, None] & (within < BLOCK)
            data, stored = cast_blocks(value, cast.POW2, cast.EXPONENTS)
            stored = tl.where(group < cast.H // BLOCK, stored, 0).to(SCALE_TYPE)
            behind = group_offset(group, places.GROUP_BYTES, cast.WORD, SCALE_SIZE)
            for j in tl.static_range(J):
                if J <= _KEPT:
                    data_place, scale_place = kept[2 * j], kept[2 * j + 1]
                else:
                    dst_row = tl.load(dst_rows + token * J + j, mask=token < num_tokens, other=-1)
                    data_place, scale_place = places_of_row(
                        dst_row, call, segments, arrivals, segment_rows, cast, places
                    )
                there = data_place.to(tl.pointer_type(tl.uint8), bitcast=True)  # what a function gives takes no hint
                if cast.ROW_BYTES % 16 == 0:
                    there = tl.multiple_of(there, 16)
                tl.store((there + group * BLOCK)[:, None] + within, data, mask=is_value & (data_place != 0)[:, None])
                tl.store(pointers(scale_place, SCALE_TYPE) + behind, stored, mask=is_group & (data_place != 0))


@triton.jit
def places_of_row(dst_row, call, segments, arrivals, segment_rows, cast, places):
    """Addresses of rows and of their scales where they go; 0 for the first where they go nowhere."""
    goes = dst_row >= 0
    peer, row = tl.where(goes, dst_row >> ROW_BITS, 0), dst_row & ROW_MASK
    slot, base = slot_of(call, peer), tl.load(segments + peer)
    data_place = region_at(base, arrivals.rows, slot) + row * cast.ROW_BYTES
    scale_place = region_at(base, arrivals.scales, slot)
    scale_place += scale_offset(row, segment_rows, places.SEGMENT_BYTES, places.ROW_BYTES)
    return tl.where(goes, data_place, 0), scale_place


@triton.jit
def load_groups(row, group, is_token, last, cast):
    """The values of a group of each row, ``[rows, next_power_of_2(BLOCK)]``; 0 where there are none.

    Args:
        row: pointers to the rows' values.
        group: up to ``last``; those behind a row's last group are padding.
    """
    BLOCK: tl.constexpr = cast.BLOCK
    within = tl.arange(0, triton.next_power_of_2(BLOCK))[None, :]
    is_value = (is_token & (group < last) & (group < cast.H // BLOCK))[:, None] & (within < BLOCK)
    return tl.load((row + group * BLOCK)[:, None] + within, mask=is_value, other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "rank", "max_polls", "carries"])
def push_cast(
    x,
    plan,
    call,
    num_tokens,
    rank,
    max_polls: tl.int64,
    carries,
    weights,
    extras,
    stride,
    own,
    arrivals,
    how,
):
    """Casts each row ``x [T, H]`` and writes data and scales to all its places; otherwise as ``rows.push_rows``."""
    tables = tables_of(plan, num_tokens, own.sizes)
    if is_ok(own.state):
        dst_rows = tables.pair_dst_rows if how.cast.STAGED else tables.dst_rows
        segment_rows = value_of(own.capacity)
        cast_rows(x, stride, call, dst_rows, num_tokens, own.segments, arrivals, segment_rows, how.cast, how.places)
        push_beside(call, tables, num_tokens, rank, carries, weights, extras, own, arrivals, how.beside)
    end_call(own, call, tables.tokens, rank, max_polls, how.ends)
