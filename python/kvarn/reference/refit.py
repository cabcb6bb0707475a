"""Refit: parameters repaired after rounding. Same bytes, same decoder, smaller error.

Round to nearest leaves each token with a random scale error, and the lower clip of the normalisation switches
it off for matrices of small spread. Three steps repair both: a prescale before the normalisation, a least
squares fit of each row's step and offset to its codes, and last an unbiased scale per token.

Sums are formed in float64 and their results rounded once to float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvarn.reference.normalization import sample_std
from kvarn.reference.rounding import codes_of
from kvarn.reference.settings import Bytes, Float32

ROUNDS = 4
CODE_VARIANCE_MIN = 1e-6
COSINE_MIN = 0.25
# Below it 1/p or m/p could meet subnormal numbers; no such value survives in half parameters.
PRESCALE_STD_MIN = np.float32(2.0**-120)


def prescale(m: Float32) -> Float32:
    """Prescale p = 2^floor(log2 std) / 4 of each matrix [n, R, C]; float32 [n], a power of two.

    std (ddof 1) is over all R·C elements, so that of m / p lies in [4, 8). p = 1 where std is 0, below 2^-120
    or not finite.
    """
    std = sample_std(m, axis=(-2, -1))
    usable = np.isfinite(std) & (std >= PRESCALE_STD_MIN)
    _, exponent = np.frexp(np.where(usable, std, np.float32(4.0)))  # std = f·2^exponent, f in [0.5, 1)
    p = np.ldexp(np.float32(1.0), exponent - 3)
    return np.asarray(np.where(usable, p, 1.0), np.float32)


def refit_rows(
    b: Float32, codes: Bytes, s: Float32, lo: Float32, bits: int, rounds: int = ROUNDS
) -> tuple[Bytes, Float32, Float32]:
    """Least squares step and offset per row, then new codes; `rounds` times.

    s = cov(q, b) / var(q) and lo = mean(b) - s·mean(q), taken only where var(q) > 1e-6 (population variance)
    and s > 0; other rows keep what they have. The codes returned are those of the last s and lo.

    Args:
        b: float32 [..., R, C], the balanced matrix.
        codes: uint8 [..., R, C].
        s: float32 [..., R].
        lo: float32 [..., R].
        bits: bits of a code.
        rounds: 4 in the format.
    """
    wide = b.astype(np.float64)
    b_mean = wide.mean(axis=-1)
    for _ in range(rounds):
        q = codes.astype(np.float64)
        q_mean = q.mean(axis=-1)
        q_distance = q - q_mean[..., None]
        variance = (q_distance**2).mean(axis=-1)
        covariance = (q_distance * (wide - b_mean[..., None])).mean(axis=-1)
        varied = variance > CODE_VARIANCE_MIN
        step = (covariance / np.where(varied, variance, 1.0)).astype(np.float32)
        used = varied & (step > 0)
        offset = (b_mean - step.astype(np.float64) * q_mean).astype(np.float32)
        s = np.where(used, step, s)
        lo = np.where(used, offset, lo)
        codes = codes_of(b, s, lo, bits)
    return codes, s, lo


def token_scale(m: Float32, approximation: Float32, axis: int) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """Factor t = <m, m> / <m̂, m> of each token, and where it may be used.

    With t, the reconstruction t·m̂ has <m, t·m̂> = <m, m>: no scale error along m. It is used only where
    <m̂, m> > 0.25·|m|·|m̂|, which also excludes zero tokens; elsewhere t is 1.

    Args:
        m: the rotated matrix, float32 [n, R, C].
        approximation: m̂ up to a positive factor per token, float32 [n, R, C].
        axis: the channel axis, over which the products of a token are summed.
    """
    wide, near = m.astype(np.float64), approximation.astype(np.float64)
    norm = (wide * wide).sum(axis=axis)
    product = (near * wide).sum(axis=axis)
    used = product > COSINE_MIN * np.sqrt(norm) * np.sqrt((near * near).sum(axis=axis))
    t = np.where(used, norm / np.where(used, product, 1.0), 1.0)
    return t.astype(np.float32), used
