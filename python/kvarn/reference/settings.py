"""What the codec needs to know: the attributes that a configuration object must have."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

BITS = (2, 3, 4, 8)
GROUPS = (64, 128)
HEAD_DIMS = tuple(range(16, 257, 16))


class Settings(Protocol):
    """Any object with these attributes; `kvarn.Config` is one."""

    @property
    def key_bits(self) -> int:
        """Bits of a K code: 2, 3, 4 or 8."""
        ...

    @property
    def value_bits(self) -> int:
        """Bits of a V code: 2, 3, 4 or 8."""
        ...

    @property
    def group(self) -> int:
        """G, tokens of a tile: 64 or 128."""
        ...

    @property
    def head_dim(self) -> int:
        """D, a multiple of 16 from 16 to 256."""
        ...

    @property
    def refit(self) -> bool:
        """Repair parameters after rounding (True), or KVarN as published (False)."""
        ...

    @property
    def iterations(self) -> int:
        """Iterations of the variance normalisation."""
        ...

    @property
    def sink_tokens(self) -> int:
        """S: positions below it are read in the slot type for good; 0, 16, 32, … G."""
        ...

    @property
    def recent_tokens(self) -> int:
        """R: so many of the newest committed tokens are never sealed; 0 … 4 G."""
        ...

    @property
    def record_bytes(self) -> int:
        """Bytes of one record, padding included."""
        ...
