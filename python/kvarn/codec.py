"""The tile codec: K and V of whole tiles to records and back, and records in files.

Source of the method: KVarN, arXiv 2606.03458; with ``refit=True`` scales are refitted after rounding.
Everywhere NumPy arrays or torch tensors on the CPU come in, and the same kind goes out.
Arrays must not be written by another thread while a call runs.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from kvarn import _kvarn
from kvarn._arrays import Array, torch_of, view
from kvarn._files import write_whole
from kvarn._kvarn import Config, presets

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = [
    "Config",
    "EncodeCounts",
    "decode",
    "encode",
    "from_published",
    "load_records",
    "presets",
    "save_records",
    "to_published",
]


class EncodeCounts(NamedTuple):
    """What an encoder met.

    Attributes:
        non_finite: Elements that were NaN or infinite, encoded as 0.
        saturated: Values or parameters beyond the range of their stored type, stored as the largest.
    """

    non_finite: int
    saturated: int


@overload
def encode(
    k: Array,
    v: Array,
    cfg: Config,
    rotated: bool = False,
    check: bool = False,
    *,
    return_counts: Literal[False] = False,
) -> Array: ...


@overload
def encode(
    k: Array,
    v: Array,
    cfg: Config,
    rotated: bool = False,
    check: bool = False,
    *,
    return_counts: Literal[True],
) -> tuple[Array, EncodeCounts]: ...


def encode(
    k: Array,
    v: Array,
    cfg: Config,
    rotated: bool = False,
    check: bool = False,
    *,
    return_counts: bool = False,
) -> Array | tuple[Array, EncodeCounts]:
    """Encodes tiles, each apart from the others.

    Values are first rounded to what a pool's slot would hold (float16 for float16 and bfloat16 input, float32
    for float32), so these are the records that a pool makes of the same tokens.

    Args:
        k: Keys after RoPE, [tiles, group, head_dim]: float16, bfloat16 (torch) or float32, any strides of the
            first two dimensions.
        v: Values, of the same shape and type.
        cfg: Bit widths, tile length and encoder.
        rotated: The input is in the rotated (Hadamard) frame already.
        check: Refuse NaN and infinities. Otherwise they are encoded as 0 and counted.
        return_counts: Return ``(records, EncodeCounts)``.

    Returns:
        Records, uint8 [tiles, cfg.record_bytes].

    Raises:
        ShapeError: A shape or stride does not fit.
        DTypeError: An element type is not supported, or those of `k` and `v` differ.
        NonFiniteError: With `check`, names tensor, tile, token and channel.
        TensorError: A tensor cannot be read: on a device (DeviceError), requires grad.
    """
    memory, non_finite, saturated = _kvarn.encode(cfg, k, v, rotated, check)
    records = view(memory, k)
    return (records, EncodeCounts(non_finite, saturated)) if return_counts else records


def decode(rec: Array, cfg: Config, rotated: bool = False) -> tuple[Array, Array]:
    """Decodes records.

    Args:
        rec: Records, uint8 [tiles, cfg.record_bytes], contiguous.
        cfg: The configuration that made them; only bit widths, group and head dim matter.
        rotated: Leave the result in the rotated (Hadamard) frame.

    Returns:
        K and V, float32 [tiles, group, head_dim].

    Raises:
        ShapeError: `rec` is not [tiles, cfg.record_bytes], or not contiguous.
        DTypeError: `rec` is not uint8.
    """
    k, v = _kvarn.decode(cfg, rec, rotated)
    return view(k, rec), view(v, rec)


def to_published(rec: Array, cfg: Config) -> Array:
    """Reorders records to the order of the published implementation.

    Args:
        rec: Records, uint8 [tiles, cfg.record_bytes], contiguous.
        cfg: Their configuration, without 3-bit codes.

    Returns:
        uint8 [tiles, cfg.published_bytes]: K codes, s_chan, z_chan, s_tok, V codes, s_chan, s_tok, z_tok.
        Range guards stay folded into the scales: decoded values are the same.

    Raises:
        FormatError: `cfg` has 3-bit codes, for which there is no published order.
        ShapeError: `rec` is not [tiles, cfg.record_bytes], or not contiguous.
    """
    return view(_kvarn.to_published(cfg, rec), rec)


def from_published(pub: Array, cfg: Config) -> Array:
    """Reorders records from the order of the published implementation, and folds range guards into them.

    Warns with RuntimeWarning if parameters are beyond half range after folding; they are stored as ±65504.

    Args:
        pub: uint8 [tiles, cfg.published_bytes], contiguous.
        cfg: Their configuration, without 3-bit codes.

    Returns:
        Records, uint8 [tiles, cfg.record_bytes], which decode to the same values.

    Raises:
        FormatError: `cfg` has 3-bit codes, for which there is no published order.
        ShapeError: `pub` is not [tiles, cfg.published_bytes], or not contiguous.
    """
    memory, saturated = _kvarn.from_published(cfg, pub)
    if saturated:
        text = (
            f"{saturated} parameters beyond half range: stored as ±65504; check where the records come from"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return view(memory, pub)


def save_records(path: str | os.PathLike[str], rec: NDArray[np.uint8] | torch.Tensor, cfg: Config) -> None:
    """Saves records with a header that holds their configuration and checksums; layout: docs/format.md.

    The file appears whole or not at all: it is written beside `path` and renamed.

    Args:
        path: The file to write, replaced if it exists.
        rec: Records, uint8 [tiles, cfg.record_bytes], contiguous.
        cfg: Their configuration.

    Raises:
        ShapeError: `rec` is not [tiles, cfg.record_bytes], or not contiguous.
        OSError: The file cannot be written.
    """
    header = _kvarn.records_header(cfg, rec)
    array: Any = rec.numpy() if torch_of(rec) else np.from_dlpack(rec)  # type: ignore[union-attr]
    write_whole(path, [header, memoryview(array).cast("B") if array.size else b""])


def load_records(path: str | os.PathLike[str]) -> tuple[NDArray[np.uint8], Config]:
    """Loads records and their configuration; every byte is checked against the checksums of the header.

    Args:
        path: A file made by `save_records`.

    Returns:
        Records, uint8 [tiles, cfg.record_bytes], and their configuration.

    Raises:
        FormatError: The file is truncated, corrupted, of another version, or something else.
        OSError: The file cannot be read.
    """
    memory, config = _kvarn.load_records(path)
    records: Any = np.from_dlpack(memory)
    return records, config
