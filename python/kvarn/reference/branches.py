"""Row refits that hang on a tie: all outcomes of a row when codes on a boundary may fall either way.

A row refit rounds five times, each time with parameters fitted to the codes before. Two correct encoders
differ in the last bits of a fit, so now and then a code of a row lands on the other side of a boundary, and
the next fit follows it: parameters tens of half ulps away, the same quality. Between a plain float32 encoder
and this one that happens in about one of a hundred matrices at 2 bit, one of twenty at 4 bit.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from kvarn.reference.refit import ROUNDS, refit_rows
from kvarn.reference.rounding import quantize_rows
from kvarn.reference.settings import Bytes, Float32

# Distance from a boundary, in code steps over 2^bits, within which a code may fall either way: the error of
# (b - lo) / s grows with the code, to about ten float32 roundings of the largest.
EDGE = 1e-6
TIES = 4
OUTCOMES = 64

Row = tuple[Bytes, Float32, Float32]


def outcomes(b: Float32, bits: int) -> list[Row]:
    """Codes uint8 [C], step and offset (float32 scalars) of a row b, float32 [C]; the reference's own first.

    At most the 4 closest ties of a rounding are followed, and 64 outcomes given.
    """
    batch = b[None]
    codes, s, lo = quantize_rows(batch, bits)
    found = [(one, s, lo) for one in _ties(batch, codes, s, lo, bits)]
    for _ in range(ROUNDS):
        following: dict[bytes, Row] = {}
        for codes, s, lo in found:
            codes, s, lo = refit_rows(batch, codes, s, lo, bits, rounds=1)
            for one in _ties(batch, codes, s, lo, bits):
                following.setdefault(one.tobytes() + s.tobytes() + lo.tobytes(), (one, s, lo))
        found = list(following.values())[:OUTCOMES]
    return [(codes[0], s[0], lo[0]) for codes, s, lo in found]


def _ties(b: Float32, codes: Bytes, s: Float32, lo: Float32, bits: int) -> list[Bytes]:
    """The codes [1, C], then those with one or more of the codes near a boundary moved across it."""
    quotient = (b[0].astype(np.float64) - lo) / s
    below = np.floor(quotient)
    distance = np.abs(quotient - below - 0.5)
    inside = (below >= 0) & (below < 2**bits - 1)
    near = np.flatnonzero(inside & (distance < EDGE * 2**bits))
    near = near[np.argsort(distance[near])][:TIES]
    listed = []
    for moved in product((False, True), repeat=near.size):
        one = codes.copy()
        where = near[np.array(moved, bool)]
        one[0, where] = 2 * below[where] + 1 - one[0, where]
        listed.append(one)
    return listed
