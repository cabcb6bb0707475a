"""The numeric contract: when two encoders agree.

Near convergence the imbalance is flat, and on clamped tiles several iterates tie exactly, so the last bit of
a standard deviation may select another iterate: parameters hundreds of ulps away, the same reconstruction. So
an encoding is not compared with *the* reference encoding but with the reference encodings of all iterates
that could have been kept: those whose imbalance is within 1e-5 relative of the best.

A matrix passes if, for one of them, every parameter is within 1 half ulp and at most 4 codes differ, each by
1, and, where all codes are equal, the reconstructions agree within 2.5e-3 relative L2. Over a file at most
1e-5 of the codes may differ: `mismatch_rate` gives that figure.

Refit adds three more ties. A code on a rounding boundary steers the next fit of its row, so each row may be
any of its `branches.outcomes`. A fitted offset is a difference of means, so near zero its last digits are
noise: it may also be within 1e-6·2^bits of its row's scale. And the token scale of V is measured against its
s_tok and z_tok rounded to half: where one of them lies between two halves the factor differs by an ulp, so
the products may be 2 ulps apart.

Parameters compare in folded form (range guards applied): fold records of other formats first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvarn.reference import layout, matrix
from kvarn.reference.branches import EDGE, outcomes
from kvarn.reference.matrix import Matrix, Side
from kvarn.reference.normalization import balance, best, iterates
from kvarn.reference.refit import prescale
from kvarn.reference.rounding import Counts
from kvarn.reference.settings import Bytes, Float16, Float32, Integers, Settings

IMBALANCE_TOLERANCE = 1e-5
ULPS = 1
ULPS_OF_REPAIRED_ROWS = 2
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
        ulps: largest distance of a parameter in half ulps, offsets within their noise left out.
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
    limits = _Limits(
        row_ulps=ULPS_OF_REPAIRED_ROWS if cfg.refit and side == "value" else ULPS,
        offset=EDGE * 2**bits if cfg.refit else 0.0,
    )
    verdicts = []
    for index in admissible:
        expected = _expected(
            batch, p, found.column[index], found.row[index], side, bits, cfg.refit, given, limits
        )
        verdicts.append(_compare(expected, given, limits, index, kept, admissible))
    return min(verdicts, key=lambda one: (not one.passed, one.ulps, one.codes, one.iterate != kept))


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


@dataclass(frozen=True)
class _Limits:
    """Half ulps of a row parameter, and how far an offset may be off in steps of its row."""

    row_ulps: int
    offset: float


def _expected(
    m: Float32,
    p: Float32,
    column: Float32,
    row: Float32,
    side: Side,
    bits: int,
    refit: bool,
    given: Matrix,
    limits: _Limits,
) -> Matrix:
    """Reference encoding with these scales; of the outcomes of each row, the one closest to `given`."""
    b = balance(matrix.scaled(m, p), column, row)
    codes, s, lo = matrix.quantize(b, bits, refit)

    def absorbed() -> Matrix:
        row_scale, row_zero = row * (s * p[:, None]), row * (lo * p[:, None])
        return matrix.absorb(m, codes.copy(), row_scale, row_zero, column, side, refit, Counts())

    expected = absorbed()
    if not refit:
        return expected
    wrong_codes, ulps = _row_differences(expected, given, limits)
    for r in np.flatnonzero((wrong_codes > 0) | (ulps > limits.row_ulps)):
        best_distance = None
        for outcome in outcomes(b[0, r], bits):
            kept_row = codes[0, r].copy(), s[0, r], lo[0, r]
            codes[0, r], s[0, r], lo[0, r] = outcome
            candidate = absorbed()
            wrong_codes, ulps = _row_differences(candidate, given, limits)
            distance = (wrong_codes[r], ulps[r])
            if best_distance is None or distance < best_distance:
                best_distance, expected = distance, candidate
            else:
                codes[0, r], s[0, r], lo[0, r] = kept_row
    return expected


def _row_differences(a: Matrix, b: Matrix, limits: _Limits) -> tuple[Integers, Integers]:
    """Per row: how many codes differ, and the larger distance of scale and offset in half ulps."""
    codes = (a.codes[0] != b.codes[0]).sum(axis=-1)
    noise = np.abs(a.row_zero[0].astype(np.float64) - b.row_zero[0]) <= limits.offset * a.row_scale[0]
    offset_ulps = np.where(noise, 0, half_ulps(a.row_zero[0], b.row_zero[0]))
    return codes, np.maximum(half_ulps(a.row_scale[0], b.row_scale[0]), offset_ulps)


def _compare(
    expected: Matrix, given: Matrix, limits: _Limits, iterate: int, kept: int, admissible: tuple[int, ...]
) -> Verdict:
    step = np.abs(expected.codes.astype(np.int64) - given.codes)
    _, row_differences = _row_differences(expected, given, limits)
    row_ulps = int(row_differences.max())
    column_ulps = int(half_ulps(expected.column_scale, given.column_scale).max())
    want, got = matrix.decode(expected).astype(np.float64), matrix.decode(given).astype(np.float64)
    distance, norm = float(np.linalg.norm(got - want)), float(np.linalg.norm(want))
    relative = distance / norm if norm > 0 else (0.0 if distance == 0 else np.inf)
    codes, code_step = int((step > 0).sum()), int(step.max())
    passed = (
        row_ulps <= limits.row_ulps
        and column_ulps <= ULPS
        and codes <= CODES
        and code_step <= 1
        and (codes > 0 or relative <= RECONSTRUCTION)
    )
    return Verdict(
        passed,
        iterate,
        kept,
        admissible,
        ulps=max(row_ulps, column_ulps),
        codes=codes,
        code_step=code_step,
        reconstruction=relative,
        elements=step.size,
    )
