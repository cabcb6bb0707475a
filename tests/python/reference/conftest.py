from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from kvarn.reference import layout

GOLDEN = Path(__file__).parents[2] / "golden"


@dataclass(frozen=True)
class PlainSettings:
    """The attributes that the reference needs, without the compiled module."""

    key_bits: int = 4
    value_bits: int = 2
    group: int = 128
    head_dim: int = 128
    refit: bool = True
    iterations: int = 8
    sink_tokens: int = 128
    recent_tokens: int = 0

    @property
    def record_bytes(self) -> int:
        return layout.offsets_of(self).padded_end


@pytest.fixture
def settings() -> Callable[..., PlainSettings]:
    return PlainSettings


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260603)


@pytest.fixture
def golden() -> Callable[[str], tuple[PlainSettings, dict[str, np.ndarray]]]:
    """A golden file and its configuration; records in published order, made by the published code."""

    def load(name: str) -> tuple[PlainSettings, dict[str, np.ndarray]]:
        with np.load(GOLDEN / f"official_{name}.npz") as data:
            arrays = dict(data)
        preset = str(arrays["preset"])
        cfg = PlainSettings(
            key_bits=int(preset[preset.index("k4") + 1]),
            value_bits=int(preset[preset.index("v", 6) + 1]),
            group=int(arrays["group"]),
            head_dim=int(arrays["head_dim"]),
            refit=False,
            iterations=int(arrays["iterations"]),
        )
        return cfg, arrays

    return load
