import numpy as np
import pytest
from kvarn.reference.guard import exponent, fold


def one(scale, zero, column):
    return tuple(np.array([x], np.float32) for x in (scale, zero, column))


@pytest.mark.parametrize(
    ("scale", "zero", "column", "k"),
    [
        ([0.5, 0.1], [0, 0], [1, 1], 0),  # in [0.5, 1): nothing to move
        ([0.25, 0.1], [0, 0], [1, 1], -1),
        ([1.0, 0.1], [0, 0], [1, 1], 1),
        ([700.0, 0.1], [0, 0], [1, 1], 10),
        ([0.5, 0.1], [0, -2048], [1, 1], 2),  # |zero| / 1024 = 2
        ([0.9998, 0.1], [0, 0], [1, 1], 1),  # 11 bits round it to 1
        ([0.9997, 0.1], [0, 0], [1, 1], 0),
        ([0.0, 0.0], [0, 0], [1, 1], 0),  # all zero
        ([1024.0, 0.1], [0, 0], [1000, 1], 6),  # 11, but 1000·2^7 would exceed 65504
        ([0.5, 0.1], [0, 0], [70000, 1], -1),  # below 0 if need be
        ([2.0, 0.1], [0, 0], [32750, 1], 1),  # 65500 is within
        ([2.0, 0.1], [0, 0], [32755, 1], 1),  # 65510 rounds to 65504
        ([2.0, 0.1], [0, 0], [32761, 1], 0),  # 65522 would round up
        ([2.0, 0.1], [0, 0], [0, 0], 2),
    ],
)
def test_exponent(scale, zero, column, k):
    assert exponent(*one(scale, zero, column)).tolist() == [k]


def test_fold_keeps_the_product(rng):
    scale = (
        np.abs(rng.standard_normal((9, 16))).astype(np.float32)
        * np.float32(10.0) ** np.arange(-4, 5)[:, None]
    )
    scale = scale.astype(np.float32)
    zero = rng.standard_normal((9, 16)).astype(np.float32)
    column = np.abs(rng.standard_normal((9, 8))).astype(np.float32) + np.float32(0.1)
    scale2, zero2, column2 = fold(scale, zero, column)
    np.testing.assert_array_equal(scale2[:, :, None] * column2[:, None], scale[:, :, None] * column[:, None])
    np.testing.assert_array_equal(zero2[:, :, None] * column2[:, None], zero[:, :, None] * column[:, None])
    assert (scale2.max(axis=1) <= 1).all()
    assert (np.abs(zero2).max(axis=1) <= 1024).all()


def test_fold_is_idempotent(rng):
    scale, zero, column = (np.abs(rng.standard_normal((5, 16))).astype(np.float32) for _ in range(3))
    once = fold(scale, zero, column)
    for a, b in zip(once, fold(*once), strict=True):
        np.testing.assert_array_equal(a, b)
