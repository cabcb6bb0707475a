import numpy as np
import pytest
from kvarn.reference.rotation import blocks, matrix, rotate
from kvarn.reference.settings import HEAD_DIMS


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [(64, (64,)), (96, (64, 32)), (80, (64, 16)), (112, (64, 32, 16)), (192, (128, 64)), (256, (256,))],
)
def test_blocks_are_greedy_powers_of_two(head_dim, expected):
    assert blocks(head_dim) == expected


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_orthogonal_and_its_own_inverse(head_dim, rng):
    H = matrix(head_dim)
    np.testing.assert_allclose(H @ H, np.eye(head_dim), atol=1e-14)
    np.testing.assert_array_equal(H, H.T)
    x = rng.standard_normal((7, head_dim)).astype(np.float32)
    np.testing.assert_allclose(rotate(x), x.astype(np.float64) @ H, atol=2e-6)
    np.testing.assert_allclose(rotate(rotate(x)), x, atol=2e-6)


def test_small_matrix_by_hand():
    signs = np.sign(matrix(16)[:4, :4])
    np.testing.assert_array_equal(signs, [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


@pytest.mark.parametrize("head_dim", [16, 112, 192])
def test_order_of_operations_is_the_specified_one(head_dim, rng):
    x = (rng.standard_normal(head_dim) * 100).astype(np.float32)
    expected = x.copy()
    start = 0
    for size in blocks(head_dim):
        stride = 1
        while stride < size:
            for base in range(start, start + size, 2 * stride):
                for i in range(base, base + stride):
                    a, b = expected[i], expected[i + stride]
                    expected[i], expected[i + stride] = a + b, a - b
            stride *= 2
        expected[start : start + size] *= np.float32(1 / np.sqrt(size))
        start += size
    np.testing.assert_array_equal(rotate(x), expected)


def test_input_is_not_changed():
    x = np.ones((2, 32), np.float32)
    rotate(x)
    np.testing.assert_array_equal(x, 1)
