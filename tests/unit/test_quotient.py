"""One correction of a quotient is enough where values are short: the formula of ``kernels/cast.py``, tried on all."""

from fractions import Fraction

import numpy as np
import pytest


def nearest(exact):
    """The float32 nearest to a Fraction, ties to even; far from overflow and underflow."""
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - exact), int(f.view(np.int32)) & 1))


def fused(a, b, c):
    """``a * b + c`` of float32 arrays, rounded once. The product is exact in float64; where the sum is not, and near a
    tie of float32, it is made anew."""
    product, exact_c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + exact_c
    rounded = total.astype(np.float32)
    to_tie = np.abs(np.abs(total - rounded.astype(np.float64)) - np.spacing(np.abs(rounded)).astype(np.float64) / 2)
    for i in np.argwhere((to_tie < np.abs(total) * 2.0**-50) & (total != 0)):
        at = tuple(i)
        rounded[at] = nearest(Fraction(float(product[at])) + Fraction(float(exact_c[at])))
    return rounded


@pytest.mark.parametrize("num_bits", [8, 11], ids=["bfloat16", "float16"])
def test_one_correction_rounds_a_quotient_by_a_448th_as_a_division_does(num_bits):
    """Of all pairs of significands; powers of two change nothing, where nothing underflows."""
    values = np.arange(2 ** (num_bits - 1), 2**num_bits).astype(np.float32)
    scale = (values / np.float32(448))[:, None]
    reciprocal = np.float32(1) / scale
    value = values[None, :] + np.zeros_like(scale)
    scale, reciprocal = np.broadcast_arrays(scale, reciprocal, value)[:2]
    want = value / scale
    assert (-value * -reciprocal != want).any()
    assert np.array_equal(corrected(value, scale, reciprocal), want)


def corrected(value, scale, reciprocal):
    minus, minus_reciprocal = -value, -reciprocal
    ratio = minus * minus_reciprocal
    return fused(fused(ratio, scale, minus), minus_reciprocal, ratio)


def test_zeros_keep_their_signs_and_what_is_not_finite_becomes_nan():
    value = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], dtype=np.float32)
    scale = np.full(5, 3 / 448, dtype=np.float32)
    with np.errstate(invalid="ignore"):
        got = corrected(value, scale, 1 / scale)
    assert np.array_equal(got[:2], value[:2])
    assert np.array_equal(np.signbit(got[:2]), [False, True])
    assert np.isnan(got[2:]).all()


def test_the_sum_that_this_is_tried_with_is_rounded_once():
    a, b, c = (np.array([x], dtype=np.float32) for x in (1 + 2.0**-23, 1 + 2.0**-23, 2.0**-24 - 2.0**-22))
    exact = Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0]))
    assert fused(a, b, c)[0] == nearest(exact)
    tie = fused(*(np.array([x], dtype=np.float32) for x in (2.0**-30, 2.0**-30, 1 + 2.0**-23)))[0]
    assert tie == np.float32(1 + 2.0**-23)
    just_above = fused(*(np.array([x], dtype=np.float32) for x in (2.0**-24 + 2.0**-47, 1.0, 1.0)))[0]
    assert just_above == np.float32(1 + 2.0**-23)
