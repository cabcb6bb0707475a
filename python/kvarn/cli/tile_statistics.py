"""What tiles look like before the codec, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_STD = 1e-8
"""Smaller deviations count as this one in a spread, as they do in the imbalance of the codec."""
CHUNK = 64
"""Tiles in float64 at a time: 8 MiB at head dim 128 and tiles of 128 tokens."""


@dataclass(frozen=True)
class TileStatistics:
    """Statistics of each tile of one kind, such as the keys of a KV head.

    Attributes:
        rms: root of the mean square, float64 [tiles].
        peak: largest |x| over rms, float64 [tiles]; 0 for a tile of zeros.
        channel_spread: largest over smallest standard deviation of a channel over tokens, float64 [tiles].
        token_spread: largest over smallest standard deviation of a token over channels, float64 [tiles].
    """

    rms: NDArray[np.float64]
    peak: NDArray[np.float64]
    channel_spread: NDArray[np.float64]
    token_spread: NDArray[np.float64]

    @classmethod
    def of(cls, tiles: NDArray[Any]) -> TileStatistics:
        """Statistics of tiles [tiles, group, head_dim]; standard deviations are those of a sample, n − 1."""
        parts = []
        for first in range(0, len(tiles), CHUNK):
            x = tiles[first : first + CHUNK].astype(np.float64)
            rms = np.sqrt(np.mean(x * x, axis=(1, 2)))
            largest = np.abs(x).max(axis=(1, 2))
            peak = np.divide(largest, rms, out=np.zeros_like(rms), where=rms > 0)
            parts.append(cls(rms, peak, _spread(x, axis=1), _spread(x, axis=2)))
        return cls.together(parts)

    @classmethod
    def together(cls, parts: list[TileStatistics]) -> TileStatistics:
        """The tiles of all parts, such as several KV heads."""
        each = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(np.concatenate(arrays) for arrays in each))

    def summary(self) -> dict[str, dict[str, float]]:
        """Median and largest over the tiles, of each statistic."""
        return {
            name: {"median": float(np.median(each)), "largest": float(each.max())}
            for name, each in vars(self).items()
        }


def _spread(x: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    std = np.maximum(np.std(x, axis=axis, ddof=1), LEAST_STD)
    spread: NDArray[np.float64] = std.max(axis=1) / std.min(axis=1)
    return spread
