"""Variance normalisation: bring the spread of all rows and all columns of a matrix together.

Source: KVarN, arXiv 2606.03458, Algorithm 1, with the clamps and the imbalance measure of the published code.
Scales are found in the log domain, columns first, and the iterate with the smallest imbalance is kept.

Precision: matrices, scales and imbalances are float32. A standard deviation is evaluated in two passes (first
the mean, then the squared distances from it) with float64 sums and rounded to float32 once; exp and ln are
evaluated in float64 and rounded once. So the result does not depend on the order of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvarn.reference.settings import Float32, Integers

STD_MIN = 1e-3
STD_MAX = 1e3
LOG_MIN = np.float32(-0.3)
LOG_MAX = np.float32(10.0)
IMBALANCE_MIN = np.float32(1e-8)


@dataclass(frozen=True)
class Iterates:
    """All iterates of n matrices [R, C]; index 0 is the identity, all scales 1.

    Attributes:
        column: column scales e^Lc, float32 [iterations + 1, n, C].
        row: row scales e^Lr, float32 [iterations + 1, n, R].
        imbalance: Imb of the matrix divided by both, float32 [iterations + 1, n].
    """

    column: Float32
    row: Float32
    imbalance: Float32


def sample_std(x: Float32, axis: int | tuple[int, ...]) -> Float32:
    """Sample standard deviation (ddof 1) over `axis`, two passes, rounded once to float32."""
    return np.asarray(np.std(x, axis=axis, ddof=1, dtype=np.float64)).astype(np.float32)


def imbalance(column_std: Float32, row_std: Float32) -> Float32:
    """Ratio of the largest to the smallest column std plus the same of the rows; float32 [...].

    Args:
        column_std: float32 [..., C].
        row_std: float32 [..., R].
    """

    def ratio(std: Float32) -> Float32:
        spread: Float32 = std.max(axis=-1) / np.maximum(std.min(axis=-1), IMBALANCE_MIN)
        return spread

    return ratio(column_std) + ratio(row_std)


def balance(m: Float32, column: Float32, row: Float32) -> Float32:
    """Balanced matrix m / column / row, divided in this order; float32 [..., R, C]."""
    return m / column[..., None, :] / row[..., :, None]


def iterates(m: Float32, iterations: int) -> Iterates:
    """Every iterate of the normalisation of n matrices.

    Args:
        m: float32 [n, R, C].
        iterations: how many after the identity.
    """
    n, rows, columns = m.shape
    log_column = np.zeros((n, columns), np.float32)
    log_row = np.zeros((n, rows), np.float32)
    column = [np.ones_like(log_column)]
    row = [np.ones_like(log_row)]
    column_std = sample_std(m, axis=-2)
    values = [imbalance(column_std, sample_std(m, axis=-1))]
    for _ in range(iterations):
        log_column = _advance(log_column, column_std)
        row_std = sample_std(balance(m, _exp(log_column), row[-1]), axis=-1)
        log_row = _advance(log_row, row_std)
        column.append(_exp(log_column))
        row.append(_exp(log_row))
        current = balance(m, column[-1], row[-1])
        column_std = sample_std(current, axis=-2)
        values.append(imbalance(column_std, sample_std(current, axis=-1)))
    return Iterates(np.stack(column), np.stack(row), np.stack(values))


def best(imbalances: Float32) -> Integers:
    """Index of the kept iterate of each matrix: the smallest imbalance, the later one of equals.

    A NaN never wins: an iterate replaces the best so far only where `value <= best` is true. Where the
    identity itself is NaN, it stays.

    Args:
        imbalances: float32 [iterations + 1, n].

    Returns:
        int64 [n].
    """
    kept = np.zeros(imbalances.shape[1], np.int64)
    lowest = imbalances[0].copy()
    for index, value in enumerate(imbalances[1:], start=1):
        better = value <= lowest
        kept[better] = index
        lowest[better] = value[better]
    return kept


def normalize(m: Float32, iterations: int) -> tuple[Float32, Float32]:
    """Column scales float32 [n, C] and row scales float32 [n, R] of the kept iterate of each m [n, R, C]."""
    found = iterates(m, iterations)
    kept = best(found.imbalance)
    each = np.arange(m.shape[0])
    return found.column[kept, each], found.row[kept, each]


def _advance(log_scale: Float32, std: Float32) -> Float32:
    growth = np.log(np.clip(std.astype(np.float64), STD_MIN, STD_MAX)).astype(np.float32)
    return np.asarray(np.clip(log_scale + growth, LOG_MIN, LOG_MAX), np.float32)


def _exp(log_scale: Float32) -> Float32:
    return np.exp(log_scale.astype(np.float64)).astype(np.float32)
