"""Range guards: a power of two moved between the two sides of a matrix's parameters.

A reconstruction (q·row_scale + row_zero)·column_scale does not change when the row side is divided by 2^k and
the column side multiplied by it. k is chosen so that the largest row scale lies in [0.5, 1) and the offsets
within ±1024: queries and probabilities that a kernel scales by the row side then stay inside the half range.
"""

from __future__ import annotations

import numpy as np

from kvarn.reference.settings import Float32, Float64, Integers

ZERO_WEIGHT = np.float32(1.0 / 1024.0)


def exponent(row_scale: Float32, row_zero: Float32, column_scale: Float32) -> Integers:
    """Power of two k to move, of each matrix; int64 [n].

    M = max(max row_scale, max |row_zero| / 1024), rounded to 11 significant bits (so that it is the same from
    unrounded and from half-rounded parameters), k = floor(log2 M) + 1, and 0 where M is 0. k is reduced while
    2^k · max column_scale, rounded to 11 significant bits as well, exceeds 65504; it may become negative.

    Args:
        row_scale: float32 [n, R].
        row_zero: float32 [n, R].
        column_scale: float32 [n, C].
    """
    largest = np.maximum(row_scale.max(axis=-1), np.abs(row_zero).max(axis=-1) * ZERO_WEIGHT)
    rounded = _eleven_bits(largest)
    _, k = np.frexp(rounded)
    k = np.where(rounded > 0, k, 0).astype(np.int64)
    column = _eleven_bits(column_scale.max(axis=-1))
    fraction, power = np.frexp(column)
    # 65504 = 0.99951171875·2^16, the largest fraction of 11 bits: k + power <= 16 is the whole condition.
    return np.where(fraction > 0, np.minimum(k, 16 - power), k).astype(np.int64)


def fold(row_scale: Float32, row_zero: Float32, column_scale: Float32) -> tuple[Float32, Float32, Float32]:
    """Move 2^k from the row side to the column side; shapes as in `exponent`, exact short of underflow."""
    k = exponent(row_scale, row_zero, column_scale)[:, None].astype(np.int32)
    return np.ldexp(row_scale, -k), np.ldexp(row_zero, -k), np.ldexp(column_scale, k)


def _eleven_bits(x: Float32) -> Float64:
    fraction, power = np.frexp(x.astype(np.float64))
    return np.asarray(np.ldexp(np.rint(fraction * 2048.0) / 2048.0, power))
