"""Rounding: to codes, to IEEE half, and of hostile input to finite numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvarn.reference.settings import Bytes, Float16, Float32

HALF_MAX = np.float32(65504.0)
# Larger float32 elements are cut to this. Nothing above 6e10 · 2^bits is representable in a record anyway,
# and below it no sum of squares over a tile of 128 × 256 rotated elements leaves float32.
INPUT_MAX = np.float32(2.0**48)
SCALE_MIN = np.float32(1e-10)


@dataclass
class Counts:
    """What was changed on the way in, summed over calls.

    Attributes:
        nonfinite: input elements that were NaN or infinite and were replaced by 0.
        saturated: input elements beyond ±2^48, slot elements beyond ±65504 and record parameters beyond
            ±65504, each cut to that bound.
    """

    nonfinite: int = 0
    saturated: int = 0

    def add(self, other: Counts) -> None:
        """Add another count to this one."""
        self.nonfinite += other.nonfinite
        self.saturated += other.saturated


def finite(x: npt.NDArray[np.generic], counts: Counts) -> Float32:
    """Input as finite float32: NaN and ±Inf become 0, the rest is cut to ±2^48; both are counted."""
    out = np.array(x, dtype=np.float32)
    bad = ~np.isfinite(out)
    out[bad] = 0.0
    counts.nonfinite += int(bad.sum())
    counts.saturated += int((np.abs(out) > INPUT_MAX).sum())
    return np.clip(out, -INPUT_MAX, INPUT_MAX)


def to_half(x: Float32, counts: Counts | None = None) -> Float16:
    """Round to nearest even half; whatever exceeds ±65504 becomes ±65504 and is counted.

    Also between 65504 and 65520, where plain rounding would give 65504 too.
    """
    if counts is not None:
        counts.saturated += int((np.abs(x) > HALF_MAX).sum())
    return np.clip(x, -HALF_MAX, HALF_MAX).astype(np.float16)


def quantize_rows(b: Float32, bits: int) -> tuple[Bytes, Float32, Float32]:
    """Round each row to nearest on an asymmetric grid from its minimum to its maximum.

    Args:
        b: float32 [..., R, C], the balanced matrix.
        bits: bits of a code.

    Returns:
        codes uint8 [..., R, C], step s and offset lo, float32 [..., R]. s is at least 1e-10.
    """
    lo = b.min(axis=-1)
    hi = b.max(axis=-1)
    s = np.maximum((hi - lo) / np.float32(2**bits - 1), SCALE_MIN)
    return codes_of(b, s, lo, bits), s, lo


def codes_of(b: Float32, s: Float32, lo: Float32, bits: int) -> Bytes:
    """clamp(round_half_even((b - lo) / s), 0, 2^bits - 1) with unrounded float32 s and lo; uint8 like b."""
    steps = np.rint((b - lo[..., None]) / s[..., None])
    return np.asarray(np.clip(steps, 0, 2**bits - 1), np.uint8)
