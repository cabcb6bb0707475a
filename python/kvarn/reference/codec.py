"""Tiles to records and back. Source: KVarN, arXiv 2606.03458, with the refit of `kvarn.reference.refit`."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from kvarn.reference import layout, matrix
from kvarn.reference.rotation import rotate
from kvarn.reference.rounding import Counts, finite, to_half
from kvarn.reference.settings import Bytes, Float32, Settings

SlotType = Literal["float16", "float32"]
# The statistics need float64 copies of each tile; this bounds the memory of one pass.
TILES_PER_PASS = 64


def encode(
    k: npt.NDArray[np.generic],
    v: npt.NDArray[np.generic],
    cfg: Settings,
    rotated: bool = False,
    *,
    slot_type: SlotType | None = None,
    counts: Counts | None = None,
) -> Bytes:
    """Encode tiles.

    Args:
        k: K after RoPE, float16 or float32 [tiles, G, D].
        v: V, like k.
        cfg: the configuration.
        rotated: True if k and v are in the rotated frame already.
        slot_type: type that the rotated values are rounded to first, so that a tile encoded here equals one
            that was sealed from a slot: "float16" for fp16 and bf16 models, "float32" for float32 models.
            None: by the dtype of k.
        counts: receives the numbers of non-finite and saturated elements.

    Returns:
        uint8 [tiles, record_bytes].

    Raises:
        ValueError: a shape that does not fit `cfg`.
    """
    shape = (cfg.group, cfg.head_dim)
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 3 or x.shape[1:] != shape or x.shape[0] != k.shape[0]:
            raise ValueError(
                f"{name} {list(x.shape)}: expected [tiles, {shape[0]}, {shape[1]}], alike for k and v"
            )
    if slot_type is None:
        slot_type = "float16" if k.dtype == np.float16 else "float32"
    counts = Counts() if counts is None else counts
    return encode_slots(
        to_slot(k, slot_type, rotated, counts), to_slot(v, slot_type, rotated, counts), cfg, counts
    )


def to_slot(x: npt.NDArray[np.generic], slot_type: SlotType, rotated: bool, counts: Counts) -> Float32:
    """What a slot holds of an input: rotated, rounded to the slot type, given back as float32 like x.

    Non-finite elements become 0 before the rotation, so they do not spread over their token; elements beyond
    ±2^48 are cut before it, rotated values beyond ±65504 after it if the slot is half; all are counted.

    Args:
        x: K or V, any float type [..., D].
        slot_type: "float16" or "float32".
        rotated: True if x is in the rotated frame already.
        counts: receives the counts.
    """
    out = finite(x, counts)
    if not rotated:
        out = rotate(out)
    return to_half(out, counts).astype(np.float32) if slot_type == "float16" else out


def encode_slots(k: Float32, v: Float32, cfg: Settings, counts: Counts) -> Bytes:
    """Encode what slots hold: rotated finite float32 [tiles, G, D] -> uint8 [tiles, record_bytes]."""
    record = np.zeros((k.shape[0], layout.offsets_of(cfg).padded_end), np.uint8)
    for start in range(0, k.shape[0], TILES_PER_PASS):
        part = slice(start, start + TILES_PER_PASS)
        key = matrix.encode(
            k[part].transpose(0, 2, 1), "key", cfg.key_bits, cfg.iterations, cfg.refit, counts
        )
        value = matrix.encode(v[part], "value", cfg.value_bits, cfg.iterations, cfg.refit, counts)
        record[part] = layout.write(key, value, cfg)
    return record


def decode(record: Bytes, cfg: Settings, rotated: bool = False) -> tuple[Float32, Float32]:
    """Decode records.

    Args:
        record: uint8 [tiles, record_bytes].
        cfg: the configuration they were encoded with.
        rotated: True to get K and V in the rotated frame.

    Returns:
        k and v, float32 [tiles, G, D].
    """
    key, value = layout.read(record, cfg)
    k = np.ascontiguousarray(matrix.decode(key).transpose(0, 2, 1))
    v = matrix.decode(value)
    return (k, v) if rotated else (rotate(k), rotate(v))
