import numpy as np
import pytest
from kvarn.reference.normalization import best, iterates, normalize, sample_std


def test_later_iterate_wins_a_tie_and_nan_never_wins():
    nan = np.float32(np.nan)
    columns = np.array(
        [
            [3, 3, 3],  # equal: the last
            [3, 2, 2.5],  # the smallest
            [3, nan, nan],  # NaN never wins
            [3, nan, 3],  # … and does not stop a later tie
            [nan, 2, 1],  # nothing is <= NaN: the identity stays
            [2, 3, 2],
        ],
        np.float32,
    ).T
    assert best(columns).tolist() == [2, 1, 0, 2, 0, 2]


def plain_iterates(m, iterations):
    """Algorithm 1 for one matrix, in float64, one step after the other."""

    def imbalance(x):
        column, row = x.std(axis=0, ddof=1), x.std(axis=1, ddof=1)
        return column.max() / max(column.min(), 1e-8) + row.max() / max(row.min(), 1e-8)

    m = m.astype(np.float64)
    rows, columns = m.shape
    lc, lr = np.zeros(columns), np.zeros(rows)
    current = m
    found = [(np.ones(columns), np.ones(rows), imbalance(m))]
    for _ in range(iterations):
        lc = np.clip(lc + np.log(np.clip(current.std(axis=0, ddof=1), 1e-3, 1e3)), -0.3, 10)
        current = m / np.exp(lc)[None, :] / np.exp(lr)[:, None]
        lr = np.clip(lr + np.log(np.clip(current.std(axis=1, ddof=1), 1e-3, 1e3)), -0.3, 10)
        current = m / np.exp(lc)[None, :] / np.exp(lr)[:, None]
        found.append((np.exp(lc), np.exp(lr), imbalance(current)))
    return found


@pytest.mark.parametrize("shape", [(16, 64), (128, 128), (256, 128)])
@pytest.mark.parametrize("spread", [0.05, 1.0, 30.0])
def test_iterates_follow_the_algorithm(shape, spread, rng):
    channels = np.exp(rng.standard_normal((shape[0], 1)))
    tokens = np.exp(0.5 * rng.standard_normal((1, shape[1])))
    m = (spread * channels * tokens * rng.standard_normal(shape)).astype(np.float32)
    found = iterates(m[None], 8)
    for index, (column, row, value) in enumerate(plain_iterates(m, 8)):
        np.testing.assert_allclose(found.column[index, 0], column, rtol=5e-6, err_msg=f"iterate {index}")
        np.testing.assert_allclose(found.row[index, 0], row, rtol=5e-6, err_msg=f"iterate {index}")
        np.testing.assert_allclose(found.imbalance[index, 0], value, rtol=5e-6, err_msg=f"iterate {index}")


def test_kept_scales_are_those_of_the_best_iterate(rng):
    m = (rng.standard_normal((5, 32, 64)) * np.exp(rng.standard_normal((5, 32, 1)))).astype(np.float32)
    found = iterates(m, 8)
    column, row = normalize(m, 8)
    for tile, index in enumerate(best(found.imbalance)):
        assert found.imbalance[index, tile] == found.imbalance[:, tile].min()
        np.testing.assert_array_equal(column[tile], found.column[index, tile])
        np.testing.assert_array_equal(row[tile], found.row[index, tile])


def test_no_iteration_is_the_identity(rng):
    column, row = normalize(rng.standard_normal((2, 16, 64)).astype(np.float32), 0)
    assert (column == 1).all()
    assert (row == 1).all()


def test_std_survives_a_mean_far_above_it():
    # One pass in float32 would lose every digit: the mean is 30,000 times the std.
    x = (30_000 + np.tile([-1.0, 1.0], 64)).astype(np.float32)[None]
    np.testing.assert_allclose(sample_std(x, axis=-1), np.sqrt(128 / 127), rtol=1e-6)


def test_a_tile_does_not_depend_on_its_batch(rng):
    m = rng.standard_normal((7, 48, 64)).astype(np.float32) * 4
    column, row = normalize(m, 8)
    for tile in range(7):
        alone = normalize(m[tile : tile + 1], 8)
        np.testing.assert_array_equal(alone[0][0], column[tile])
        np.testing.assert_array_equal(alone[1][0], row[tile])
