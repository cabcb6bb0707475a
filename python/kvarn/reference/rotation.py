"""The rotation: a block-diagonal Hadamard matrix along the head dimension.

H is the Sylvester (natural order) Hadamard matrix divided by sqrt(size), without random signs: symmetric,
orthogonal, its own inverse. A head dimension that is no power of two is split greedily into powers of two
(96 = 64 + 32, 80 = 64 + 16). Source: KVarN, arXiv 2606.03458, section "Hadamard rotation".
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvarn.reference.settings import Float32, Float64


def blocks(head_dim: int) -> tuple[int, ...]:
    """Sizes of the diagonal blocks, largest first: the binary digits of `head_dim`."""
    return tuple(1 << bit for bit in reversed(range(head_dim.bit_length())) if head_dim >> bit & 1)


def rotate(x: npt.NDArray[np.generic]) -> Float32:
    """Rotate the last axis in float32; applied twice it gives x back, up to rounding.

    The order of operations is part of the specification, so that every implementation gives the same bits:
    per block, for stride 1, 2, 4, … the pair (a, b) at distance stride becomes (a + b, a - b), and at the end
    each element is multiplied once by float32(1 / sqrt(block)), the quotient formed in float64.

    Args:
        x: [..., D], any float type; converted to float32 first.

    Returns:
        float32 [..., D], a new array.
    """
    out = np.array(x, dtype=np.float32)
    start = 0
    for size in blocks(out.shape[-1]):
        part = out[..., start : start + size]
        stride = 1
        while stride < size:
            pairs = part.reshape(*part.shape[:-1], size // (2 * stride), 2, stride)
            low, high = pairs[..., 0, :], pairs[..., 1, :]
            part = np.stack((low + high, low - high), axis=-2).reshape(part.shape)
            stride *= 2
        out[..., start : start + size] = part * np.float32(1.0 / np.sqrt(np.float64(size)))
        start += size
    return out


def matrix(head_dim: int) -> Float64:
    """The same rotation as a float64 matrix [D, D], from the definition of the entries.

    Entry (i, j) inside a block of size n is (-1)^popcount(i & j) / sqrt(n); outside the blocks it is 0.
    """
    out = np.zeros((head_dim, head_dim))
    start = 0
    for size in blocks(head_dim):
        parity = [[(i & j).bit_count() & 1 for j in range(size)] for i in range(size)]
        out[start : start + size, start : start + size] = (1.0 - 2.0 * np.array(parity)) / np.sqrt(size)
        start += size
    return out
