"""What the codec makes of tiles: encoded, decoded, and compared in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvarn
from kvarn.cli.tile_statistics import CHUNK
from kvarn.reference import Counts
from kvarn.reference.codec import to_slot


@dataclass(frozen=True)
class MatrixError:
    """What encoding and decoding has changed in K or in V.

    Attributes:
        difference: sum of the squares of x̂ − x.
        energy: sum of the squares of x.
        scales: token-scale errors ⟨x, x̂⟩/⟨x, x⟩ − 1, of each token and KV head that is not zero, float64 [n].
    """

    difference: float
    energy: float
    scales: NDArray[np.float64]

    @classmethod
    def of(cls, x: NDArray[Any], decoded: NDArray[Any]) -> MatrixError:
        """Compare tiles [tiles, group, head_dim] with what was decoded of them."""
        parts = []
        for first in range(0, len(x), CHUNK):
            a, b = (each[first : first + CHUNK].astype(np.float64) for each in (x, decoded))
            squares = np.sum(a * a, axis=2)
            some = squares > 0
            scales = np.sum(a * b, axis=2)[some] / squares[some] - 1
            parts.append(cls(float(np.sum((b - a) ** 2)), float(squares.sum()), scales))
        return cls.together(parts)

    @classmethod
    def together(cls, parts: list[MatrixError]) -> MatrixError:
        """All parts, such as several KV heads."""
        return cls(
            sum(part.difference for part in parts),
            sum(part.energy for part in parts),
            np.concatenate([part.scales for part in parts]),
        )

    def summary(self) -> dict[str, float | None]:
        """Relative L2 error, mean and standard deviation (divisor n) of the scales; None if x is 0."""
        some = self.energy > 0
        return {
            "error": float(np.sqrt(self.difference / self.energy)) if some else None,
            "scale_mean": float(self.scales.mean()) if some else None,
            "scale_spread": float(self.scales.std()) if some else None,
        }


@dataclass(frozen=True)
class CodecError:
    """Errors of K and V under one configuration.

    Attributes:
        k: of the keys.
        v: of the values.
        saturated: values or parameters beyond the range of their stored type, stored as the largest.
    """

    k: MatrixError
    v: MatrixError
    saturated: int

    @classmethod
    def of(
        cls, k: NDArray[Any], v: NDArray[Any], cfg: kvarn.Config, *, rotated: bool, bfloat16: bool
    ) -> CodecError:
        """Encode and decode tiles [tiles, group, head_dim] of one KV head, float16 or float32.

        Args:
            k: keys.
            v: values, of the same shape and type.
            cfg: the configuration.
            rotated: K and V are in the rotated frame.
            bfloat16: K and V are bfloat16 values in float32: slots, and so the encoder, hold them as half.
        """
        cut = Counts()
        if bfloat16:
            held = [to_slot(x, "float16", rotated, cut).astype(np.float16) for x in (k, v)]
            records, counts = kvarn.encode(held[0], held[1], cfg, True, return_counts=True)
        else:
            records, counts = kvarn.encode(k, v, cfg, rotated, return_counts=True)
        decoded = kvarn.decode(records, cfg, rotated)
        return cls(
            MatrixError.of(k, decoded[0]), MatrixError.of(v, decoded[1]), counts.saturated + cut.saturated
        )

    @classmethod
    def together(cls, parts: list[CodecError]) -> CodecError:
        """All parts, such as several KV heads."""
        return cls(
            MatrixError.together([part.k for part in parts]),
            MatrixError.together([part.v for part in parts]),
            sum(part.saturated for part in parts),
        )

    def summary(self) -> dict[str, Any]:
        """The same numbers, ready for JSON."""
        return {"k": self.k.summary(), "v": self.v.summary(), "saturated": self.saturated}
