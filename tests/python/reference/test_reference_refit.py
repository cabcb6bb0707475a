from itertools import pairwise

import numpy as np
import pytest
from kvarn.reference import decode, encode
from kvarn.reference.refit import prescale, refit_rows, token_scale
from kvarn.reference.rounding import quantize_rows


def scale_spread(k, k2):
    """Spread over tokens of <k, k̂>/<k, k>."""
    return ((k * k2).sum(-1) / (k * k).sum(-1)).std()


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.98), (2, 0.80)])
def test_refit_lowers_the_logit_error_on_real_tiles(bits, bound, golden, settings, rng):
    _, data = golden("k4v2_g128_d128")
    k, v = data["k_rotated"][-4:], data["v_rotated"][-4:]
    queries = rng.standard_normal((512, 128))
    error, spread = {}, {}
    for refit in (False, True):
        cfg = settings(key_bits=bits, value_bits=bits, refit=refit)
        for name, x, x2 in zip("KV", (k, v), decode(encode(k, v, cfg, True), cfg, True), strict=True):
            exact, near = x.astype(np.float64), x2.astype(np.float64)
            error[name, refit] = np.sqrt(np.mean(((near - exact) @ queries.T) ** 2))
            spread[name, refit] = max(scale_spread(a, b) for a, b in zip(exact, near, strict=True))
    for name in "KV":
        ratio = error[name, True] / error[name, False]
        print(
            f"{name} at {bits} bit: error of <q, x> refit / published {ratio:.3f}, "
            f"spread of <x, x̂>/<x, x> {spread[name, False]:.1e} -> {spread[name, True]:.1e}"
        )
    assert error["K", True] <= bound * error["K", False]
    assert max(spread["K", True], spread["V", True]) <= 4e-4
    assert spread["K", False] > 10 * spread["K", True]


@pytest.mark.parametrize("exponent", [-100, -30, -1, 0, 1, 12, 50])
def test_prescale_brings_the_spread_to_four_to_eight(exponent, rng):
    m = np.ldexp(rng.standard_normal((3, 16, 64)).astype(np.float32), exponent)
    p = prescale(m)
    assert (np.frexp(p)[0] == 0.5).all()
    spread = (m / p[:, None, None]).astype(np.float64).std(axis=(1, 2), ddof=1)
    assert ((spread >= 4) & (spread < 8)).all()


def test_prescale_is_one_without_a_usable_spread():
    m = np.zeros((3, 16, 64), np.float32)
    m[1] = 5.0
    m[2, 0, 0] = 1e-40
    np.testing.assert_array_equal(prescale(m), 1.0)


def test_row_refit_is_least_squares(rng):
    b = rng.standard_normal((2, 8, 64)).astype(np.float32)
    codes, s, lo = quantize_rows(b, 3)
    _, s1, lo1 = refit_rows(b, codes, s, lo, 3, rounds=1)
    for tile in range(2):
        for row in range(8):
            slope, offset = np.polyfit(codes[tile, row].astype(float), b[tile, row].astype(float), 1)
            np.testing.assert_allclose((s1[tile, row], lo1[tile, row]), (slope, offset), rtol=1e-5, atol=1e-6)


def test_row_refit_never_raises_the_error(rng):
    b = rng.standard_normal((4, 32, 128)).astype(np.float32)
    codes, s, lo = quantize_rows(b, 2)
    errors = []
    for rounds in range(5):
        q, s1, lo1 = refit_rows(b, codes, s, lo, 2, rounds)
        errors.append(float(((q * s1[..., None] + lo1[..., None] - b) ** 2).sum()))
    assert all(later <= earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def test_row_refit_leaves_constant_rows_alone():
    b = np.full((1, 2, 16), 3.0, np.float32)
    codes, s, lo = quantize_rows(b, 4)
    again = refit_rows(b, codes, s, lo, 4)
    for before, after in zip((codes, s, lo), again, strict=True):
        np.testing.assert_array_equal(before, after)


def test_token_scale_needs_a_similar_direction():
    m = np.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]]], np.float32)
    near = np.array([[[0.2, 1.0], [0.5, 0.1], [1.0, 0.0], [-1.0, 0.0]]], np.float32)
    t, used = token_scale(m, near, axis=-1)
    assert used.tolist() == [[False, True, False, False]]
    np.testing.assert_allclose(t, [[1.0, 2.0, 1.0, 1.0]])
