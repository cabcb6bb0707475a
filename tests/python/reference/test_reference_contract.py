from dataclasses import replace

import numpy as np
import pytest
from kvarn.reference import contract, encode, layout, matrix, normalization
from kvarn.reference.branches import EDGE, outcomes
from kvarn.reference.codec import to_slot
from kvarn.reference.normalization import iterates
from kvarn.reference.refit import prescale, refit_rows
from kvarn.reference.rounding import Counts, codes_of, quantize_rows


@pytest.fixture
def tile(rng):
    channels = np.exp(0.7 * rng.standard_normal((128, 1)))
    return (channels * rng.standard_normal((128, 128))).astype(np.float32)


def encoded(m, cfg, bits=4):
    return matrix.encode(m[None], "key", bits, cfg.iterations, cfg.refit, Counts())


def changed(one, name, index, by):
    array = getattr(one, name).copy()
    view = array.view(np.uint16) if array.dtype == np.float16 else array
    view[(0, *index)] += by
    return replace(one, **{name: array})


@pytest.mark.parametrize("refit", [False, True])
def test_the_reference_passes_its_own_contract(refit, settings, rng):
    cfg = settings(refit=refit)
    k, v = rng.standard_normal((2, 2, 128, 128)).astype(np.float16)
    record = encode(k, v, cfg)
    slot_k, slot_v = (to_slot(x, "float16", False, Counts()) for x in (k, v))
    for index in range(2):
        for verdict in contract.judge(slot_k[index], slot_v[index], record[index], cfg):
            assert verdict.passed
            assert verdict.iterate == verdict.kept
            assert (verdict.ulps, verdict.codes, verdict.reconstruction) == (0, 0, 0.0)


@pytest.mark.parametrize("name", ["row_scale", "row_zero", "column_scale"])
def test_one_ulp_passes_and_two_fail(name, tile, settings):
    cfg = settings(refit=False)
    right = encoded(tile, cfg)
    near = contract.judge_matrix(tile, changed(right, name, (5,), 1), "key", 4, cfg)
    assert near.passed
    assert near.ulps == 1
    far = contract.judge_matrix(tile, changed(right, name, (5,), 2), "key", 4, cfg)
    assert not far.passed
    assert far.ulps == 2


def test_four_codes_pass_and_five_fail(tile, settings):
    cfg = settings(refit=False)
    one = encoded(tile, cfg)
    free = np.argwhere(one.codes[0] < 15)[:5]
    for count, index in enumerate(free, start=1):
        one = changed(one, "codes", tuple(index), 1)
        verdict = contract.judge_matrix(tile, one, "key", 4, cfg)
        assert verdict.codes == count
        assert verdict.passed == (count <= 4)


def test_a_code_off_by_two_fails(tile, settings):
    cfg = settings(refit=False)
    one = encoded(tile, cfg)
    index = tuple(np.argwhere(one.codes[0] < 14)[0])
    assert not contract.judge_matrix(tile, changed(one, "codes", index, 2), "key", 4, cfg).passed


def test_another_iterate_passes_only_if_it_ties(tile, settings):
    cfg = settings(refit=False)
    small = tile * np.float32(0.003 / tile.std())  # every std below the clip: iterates 1 … 8 are all e^-0.3
    for m, index, expected in ((small, 1, True), (small, 0, True), (tile, 1, False), (tile, 0, False)):
        found = iterates(m[None], 8)
        ones = np.ones(1, np.float32)
        other = matrix.encode_scaled(
            m[None], ones, found.column[index], found.row[index], "key", 4, False, Counts()
        )
        verdict = contract.judge_matrix(m, other, "key", 4, cfg)
        assert verdict.passed is expected
        assert (index in verdict.admissible) is expected


def plain_std(x, axis):
    return np.std(x, axis=axis, ddof=1, dtype=np.float32)


def plain_refit(b, codes, s, lo, bits, rounds=4):
    for _ in range(rounds):
        q = codes.astype(np.float32)
        q_mean, b_mean = q.mean(-1), b.mean(-1)
        q_distance = q - q_mean[..., None]
        variance = (q_distance * q_distance).mean(-1)
        s = (q_distance * (b - b_mean[..., None])).mean(-1) / variance
        lo = b_mean - s * q_mean
        codes = codes_of(b, s, lo, bits)
    return codes, s, lo


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("refit", [False, True])
def test_an_encoder_with_other_rounding_errors_passes(bits, refit, settings, rng, monkeypatch):
    cfg = settings(key_bits=bits, value_bits=bits, refit=refit)
    channels, heads = (
        np.exp(0.8 * rng.standard_normal((2, 16, 1, 128))),
        rng.standard_normal((2, 16, 128, 128)),
    )
    k, v = (channels * heads).astype(np.float16).astype(np.float32)
    with monkeypatch.context() as other:
        other.setattr(normalization, "sample_std", plain_std)
        other.setattr(matrix, "refit_rows", plain_refit)
        record = encode(k, v, cfg, rotated=True)
    verdicts = [one for tile in range(16) for one in contract.judge(k[tile], v[tile], record[tile], cfg)]
    assert all(one.passed for one in verdicts), [one for one in verdicts if not one.passed]
    changed_records = (record != encode(k, v, cfg, rotated=True)).any(axis=1).sum()
    print(
        f"{bits} bit, refit {refit}: {changed_records} of 16 records differ, at most "
        f"{max(one.ulps for one in verdicts)} ulps, {contract.mismatch_rate(verdicts):.1e} of the codes"
    )
    if refit:  # else the test would say nothing about the ties of the row refit
        assert changed_records > 0


@pytest.mark.parametrize("rounds", [0, 3, 5])
def test_another_number_of_refit_rounds_fails(rounds, tile, settings, monkeypatch):
    cfg = settings()
    right = matrix.refit_rows
    with monkeypatch.context() as other:
        other.setattr(matrix, "refit_rows", lambda *given: right(*given, rounds=rounds))
        wrong = encoded(tile, cfg, bits=2)
    assert not contract.judge_matrix(tile, wrong, "key", 2, cfg).passed
    assert contract.judge_matrix(tile, encoded(tile, cfg, bits=2), "key", 2, cfg).passed


@pytest.mark.parametrize(
    ("side", "name", "limit"),
    [
        ("key", "row_scale", 1),
        ("key", "row_zero", 1),
        ("key", "column_scale", 1),
        ("value", "row_scale", 2),
        ("value", "row_zero", 2),
        ("value", "column_scale", 1),
    ],
)
def test_limits_with_refit(side, name, limit, tile, settings):
    cfg = settings()
    right = matrix.encode(tile[None], side, 4, cfg.iterations, True, Counts())
    for by in (1, 2, 3):
        verdict = contract.judge_matrix(tile, changed(right, name, (5,), by), side, 4, cfg)
        assert verdict.ulps == by
        assert verdict.passed == (by <= limit)


def test_offsets_near_zero_may_be_noise(tile, settings):
    cfg = settings(iterations=0)  # no normalisation: rows do not depend on each other, and shift exactly
    for _ in range(3):
        p = prescale(tile[None])
        _, _, lo = matrix.quantize(tile[None] / p, 4, True)
        tile[5] -= lo[0, 5] * p[0]
    right = encoded(tile, cfg)
    scale, offset = float(right.row_scale[0, 5]), float(right.row_zero[0, 5])
    assert abs(offset) < 1e-6 * scale
    for steps, expected in ((0.9 * EDGE * 2**4, True), (1.2 * EDGE * 2**4, False)):
        zero = right.row_zero.copy()
        zero[0, 5] = offset + steps * scale
        given = replace(right, row_zero=zero)
        assert contract.half_ulps(zero, right.row_zero).max() > 10
        assert contract.judge_matrix(tile, given, "key", 4, cfg).passed is expected


def test_outcomes_follow_a_tie_both_ways():
    # Range 0 … 3 at 2 bit: s = 1, so 1.5 lies on a boundary; half even takes 2.
    row = np.array([0, 1.5, 3, 0, 1, 2, 3, 3, 0, 1, 2.2, 0.9, 3, 0, 1.1, 2], np.float32)
    found = outcomes(row, 2)
    codes, s, lo = refit_rows(row[None], *quantize_rows(row[None], 2), 2)
    np.testing.assert_array_equal(found[0][0], codes[0])
    assert (found[0][1], found[0][2]) == (s[0], lo[0])
    assert len(found) == 2
    assert sorted(int(one[0][1]) for one in found) == [1, 2]
    assert found[0][1] != found[1][1]
    row[1] = 1.6
    assert len(outcomes(row, 2)) == 1


def test_half_ulps_across_zero_and_infinity():
    a = np.array([0.0, -0.0, 6e-8, -6e-8, 1.0, 65504, -1.0], np.float16)
    b = np.array([-0.0, 0.0, -6e-8, 0.0, np.nextafter(np.float16(1), np.float16(2)), np.inf, 1.0], np.float16)
    assert contract.half_ulps(a, b).tolist() == [0, 0, 2, 1, 1, 1, 2 * 0x3C00]


def test_mismatch_rate_counts_all_codes(tile, settings):
    cfg = settings(refit=False)
    one = encoded(tile, cfg)
    index = tuple(np.argwhere(one.codes[0] < 15)[0])
    right = contract.judge_matrix(tile, one, "key", 4, cfg)
    wrong = contract.judge_matrix(tile, changed(one, "codes", index, 1), "key", 4, cfg)
    assert contract.mismatch_rate([right, wrong]) == 1 / (2 * 128 * 128)


def test_judge_reads_both_sides_of_a_record(settings, rng):
    cfg = settings(refit=False)
    k, v = rng.standard_normal((2, 1, 128, 128)).astype(np.float32)
    record = encode(k, v, cfg, rotated=True)
    record[0, layout.offsets_of(cfg).value_token_scale] ^= 4
    key, value = contract.judge(k[0], v[0], record[0], cfg)
    assert key.passed
    assert not value.passed
