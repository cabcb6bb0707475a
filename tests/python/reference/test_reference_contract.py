from dataclasses import replace

import numpy as np
import pytest
from kvarn.reference import contract, encode, layout, matrix
from kvarn.reference.codec import to_slot
from kvarn.reference.normalization import iterates
from kvarn.reference.rounding import Counts


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
