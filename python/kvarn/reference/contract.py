"""The numeric contract: when two encoders agree.

Near convergence the imbalance is flat, and on clamped tiles several iterates tie exactly, so the last bit of
a standard deviation may select another iterate: parameters hundreds of ulps away, the same reconstruction. So
an encoding is not compared with *the* reference encoding but with the reference encodings of all iterates
that could have been kept: those whose imbalance is within 1e-5 relative of the best.

A matrix passes if, for one of them, every parameter is within 1 half ulp and at most 4 codes differ, each by
1, and, where all codes are equal, the reconstructions agree within 2.5e-3 relative L2. Over a file at most
1e-5 of the codes may differ: `mismatch_rate` gives that figure.

Parameters compare in folded form (range guards applied): fold records of other formats first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvarn.reference import layout, matrix
from kvarn.reference.matrix import Matrix, Side
from kvarn.reference.normalization import best, iterates
from kvarn.reference.refit import prescale
from kvarn.reference.rounding import Counts
from kvarn.reference.settings import Bytes, Float16, Float32, Integers, Settings

IMBALANCE_TOLERANCE = 1e-5
ULPS = 1
CODES = 4
RECONSTRUCTION = 2.5e-3
MISMATCH_RATE = 1e-5


@dataclass(frozen=True)
class Verdict:
    """How one encoded matrix compares with its closest admissible reference encoding.

    Attributes:
        passed: whether the contract holds.
        iterate: the iterate of that encoding, 0 the identity.
        kept: the iterate that the reference keeps.
        admissible: all iterates that may be kept.
        ulps: largest distance of a parameter in half ulps.
        codes: number of codes that differ.
        code_step: largest difference of a code.
        reconstruction: relative L2 distance of the reconstructions.
        elements: number of codes.
    """

    passed: bool
    iterate: int
    kept: int
    admissible: tuple[int, ...]
    ulps: int
    codes: int
    code_step: int
    reconstruction: float
    elements: int


def judge(k: Float32, v: Float32, record: Bytes, cfg: Settings) -> tuple[Verdict, Verdict]:
    """Judge the record of one tile, made by any encoder: verdicts of K and V.

    Args:
        k: rotated K as the encoder saw it (rounded to the slot type, finite), float32 [G, D].
        v: V, like k.
        record: native order, uint8 [record_bytes].
        cfg: the configuration.
    """
    key, value = layout.read(record[None], cfg)
    return (
        judge_matrix(k.T, key, "key", cfg.key_bits, cfg),
        judge_matrix(v, value, "value", cfg.value_bits, cfg),
    )


def judge_matrix(m: Float32, given: Matrix, side: Side, bits: int, cfg: Settings) -> Verdict:
    """Judge one encoded matrix (a `Matrix` of one) against its input m, float32 [R, C]."""
    batch = np.ascontiguousarray(m, np.float32)[None]
    p = prescale(batch) if cfg.refit else np.ones(1, np.float32)
    found = iterates(matrix.scaled(batch, p), cfg.iterations)
    kept = int(best(found.imbalance)[0])
    near = found.imbalance[:, 0] <= found.imbalance[kept, 0] * np.float32(1.0 + IMBALANCE_TOLERANCE)
    admissible = tuple(int(index) for index in np.flatnonzero(near)) or (kept,)
    verdicts = []
    for index in admissible:
        expected = matrix.encode_scaled(
            batch, p, found.column[index], found.row[index], side, bits, cfg.refit, Counts()
        )
        verdicts.append(_compare(expected, given, index, kept, admissible))
    return min(verdicts, key=lambda one: (not one.passed, one.codes, one.ulps, one.iterate != kept))


def mismatch_rate(verdicts: Iterable[Verdict]) -> float:
    """Share of codes that differ over many matrices."""
    listed = list(verdicts)
    return sum(one.codes for one in listed) / sum(one.elements for one in listed)


def half_ulps(a: Float16, b: Float16) -> Integers:
    """Distance in half ulps: how many halves lie between a and b; 0 between +0 and -0. int64 like a."""

    def ordered(x: Float16) -> Integers:
        magnitude = (x.view(np.uint16) & 0x7FFF).astype(np.int64)
        return np.where(np.signbit(x), -magnitude, magnitude)

    return np.asarray(np.abs(ordered(a) - ordered(b)))


def _compare(
    expected: Matrix, given: Matrix, iterate: int, kept: int, admissible: tuple[int, ...]
) -> Verdict:
    step = np.abs(expected.codes.astype(np.int64) - given.codes)
    pairs = (
        (expected.row_scale, given.row_scale),
        (expected.row_zero, given.row_zero),
        (expected.column_scale, given.column_scale),
    )
    ulps = max(int(half_ulps(np.ascontiguousarray(a), np.ascontiguousarray(b)).max()) for a, b in pairs)
    want, got = matrix.decode(expected).astype(np.float64), matrix.decode(given).astype(np.float64)
    distance, norm = float(np.linalg.norm(got - want)), float(np.linalg.norm(want))
    relative = distance / norm if norm > 0 else (0.0 if distance == 0 else np.inf)
    codes, code_step = int((step > 0).sum()), int(step.max())
    passed = ulps <= ULPS and codes <= CODES and code_step <= 1 and (codes > 0 or relative <= RECONSTRUCTION)
    return Verdict(passed, iterate, kept, admissible, ulps, codes, code_step, relative, step.size)
