"""Sequences out of pools and into them: the same calls on every device."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from kvarn import _files
from kvarn._device import current_stream
from kvarn._kvarn import Sequence
from kvarn.errors import FormatError

# A pool is a `_kvarn.Pool`, or a `_kvarn.CudaPool`, whose calls take a stream more: torch's current one.


def save(pool: Any, cuda: int | None, sequence: Sequence, file: Any) -> None:
    """Writes a sequence; see `Pool.save`."""
    header, memory = pool.save(sequence, *_stream(cuda))
    image: Any = np.from_dlpack(memory)
    _files.write(file, [header, memoryview(image)])


def load(pool: Any, cuda: int | None, file: Any) -> Sequence:
    """Reads a sequence; see `Pool.load`."""
    sequence: Sequence
    if not isinstance(file, str | os.PathLike):
        sequence = pool.load(_files.read(file), *_stream(cuda))
        return sequence
    try:
        sequence = pool.load(file, *_stream(cuda))
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from error
    return sequence


def offload(pool: Any, cuda: int | None, sequence: Sequence) -> None:
    """Moves a sequence out; see `Pool.offload`."""
    pool.offload(sequence, *_stream(cuda))


def restore(pool: Any, cuda: int | None, sequence: Sequence) -> None:
    """Brings a sequence back; see `Pool.restore`."""
    pool.restore(sequence, *_stream(cuda))


def _stream(cuda: int | None) -> tuple[int, ...]:
    return () if cuda is None else (current_stream(cuda),)
