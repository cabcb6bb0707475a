"""One matrix from rotated float32 values to codes and half parameters, and back.

K and V differ only in what a row is: K is [D channels, G tokens], quantised per channel over tokens; V is
[G tokens, D channels], quantised per token over channels. Both store a scale and an offset per row and a
scale per column:

    m̂[r, c] = (q[r, c]·row_scale[r] + row_zero[r])·column_scale[c]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvarn.reference.guard import fold
from kvarn.reference.normalization import balance, normalize
from kvarn.reference.refit import prescale, refit_rows, token_scale
from kvarn.reference.rounding import Counts, quantize_rows, to_half
from kvarn.reference.settings import Bytes, Float16, Float32

Side = Literal["key", "value"]


@dataclass(frozen=True)
class Matrix:
    """n encoded matrices.

    Attributes:
        codes: uint8 [n, R, C].
        row_scale: float16 [n, R]: K s_chan, V s_tok.
        row_zero: float16 [n, R]: K z_chan, V z_tok.
        column_scale: float16 [n, C]: K s_tok, V s_chan.
    """

    codes: Bytes
    row_scale: Float16
    row_zero: Float16
    column_scale: Float16


def encode(m: Float32, side: Side, bits: int, iterations: int, refit: bool, counts: Counts) -> Matrix:
    """Encode n matrices.

    Args:
        m: rotated finite values, float32 [n, R, C].
        side: which axis holds the tokens: "key" columns, "value" rows.
        bits: bits of a code.
        iterations: of the variance normalisation.
        refit: False is KVarN as published.
        counts: receives the number of saturated parameters.
    """
    p = prescale(m) if refit else np.ones(m.shape[0], np.float32)
    column, row = normalize(scaled(m, p), iterations)
    return encode_scaled(m, p, column, row, side, bits, refit, counts)


def encode_scaled(
    m: Float32, p: Float32, column: Float32, row: Float32, side: Side, bits: int, refit: bool, counts: Counts
) -> Matrix:
    """The steps after the normalisation, with given float32 scales p [n], column [n, C] and row [n, R]."""
    codes, s, lo = quantize(balance(scaled(m, p), column, row), bits, refit)
    return absorb(m, codes, row * (s * p[:, None]), row * (lo * p[:, None]), column, side, refit, counts)


def scaled(m: Float32, p: Float32) -> Float32:
    """Divide matrices m [n, R, C] by their prescales p [n]."""
    return m / p[:, None, None]


def quantize(b: Float32, bits: int, refit: bool) -> tuple[Bytes, Float32, Float32]:
    """Codes uint8 [n, R, C], steps and offsets float32 [n, R] of balanced matrices b [n, R, C]."""
    codes, s, lo = quantize_rows(b, bits)
    return refit_rows(b, codes, s, lo, bits) if refit else (codes, s, lo)


def absorb(
    m: Float32,
    codes: Bytes,
    row_scale: Float32,
    row_zero: Float32,
    column_scale: Float32,
    side: Side,
    refit: bool,
    counts: Counts,
) -> Matrix:
    """From unrounded parameters to stored ones: range guard, unbiased token scale, range guard, rounding.

    The second guard sees the repaired side unrounded, so every parameter is rounded to half once (those of
    the other side are halves by then, and only multiplied by a power of two).
    """
    row_scale, row_zero, column_scale = fold(row_scale, row_zero, column_scale)
    if refit:
        repair = _repair_key if side == "key" else _repair_value
        row_scale, row_zero, column_scale = fold(*repair(m, codes, row_scale, row_zero, column_scale))
    return Matrix(codes, to_half(row_scale, counts), to_half(row_zero, counts), to_half(column_scale, counts))


def decode(matrix: Matrix) -> Float32:
    """Reconstruct float32 [n, R, C]: product, sum, product, each rounded to float32.

    The first product of a code and a half is exact in float32, so a fused multiply-add gives the same bits.
    """
    row_scale = matrix.row_scale.astype(np.float32)[..., :, None]
    row_zero = matrix.row_zero.astype(np.float32)[..., :, None]
    column_scale = matrix.column_scale.astype(np.float32)[..., None, :]
    return (matrix.codes.astype(np.float32) * row_scale + row_zero) * column_scale


Parameters = tuple[Float32, Float32, Float32]


def _repair_key(
    m: Float32, codes: Bytes, row_scale: Float32, row_zero: Float32, column_scale: Float32
) -> Parameters:
    """Unbiased token scale of K: replaces the column scale, on top of rows that are halves from here on.

    The condition of `token_scale` is evaluated on q·row_scale + row_zero: the column scale is positive, so it
    is the same as on the whole reconstruction, and does not depend on that scale's rounding.
    """
    row_scale, row_zero = _halves(row_scale), _halves(row_zero)
    base = codes * row_scale[..., None] + row_zero[..., None]
    t, used = token_scale(m, base, axis=-2)
    return row_scale, row_zero, np.where(used, t, column_scale)


def _repair_value(
    m: Float32, codes: Bytes, row_scale: Float32, row_zero: Float32, column_scale: Float32
) -> Parameters:
    """Unbiased token scale of V: multiplies unrounded row parameters; column scales are halves from here."""
    column_scale = _halves(column_scale)
    rows = codes * _halves(row_scale)[..., None] + _halves(row_zero)[..., None]
    t, _ = token_scale(m, rows * column_scale[..., None, :], axis=-1)
    return row_scale * t, row_zero * t, column_scale


def _halves(x: Float32) -> Float32:
    return to_half(x).astype(np.float32)
