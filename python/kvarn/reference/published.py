"""Published order: the record of the published KVarN code, for interchange; bits 2, 4 and 8 only.

    K: codes [D][G·bits/8], s_chan[D], z_chan[D], s_tok[G]
    V: codes [G][D·bits/8], s_chan[D], s_tok[G], z_tok[G]

Element c of a row sits in byte c // (8/bits), shift (c mod (8/bits))·bits. Parameters are halves, there is no
padding. Published parameters are not range guarded: `from_published` folds them.
"""

from __future__ import annotations

import numpy as np

from kvarn.reference import layout
from kvarn.reference.guard import fold
from kvarn.reference.matrix import Matrix
from kvarn.reference.rounding import to_half
from kvarn.reference.settings import Bytes, Float16, Settings


def published_bytes(cfg: Settings) -> int:
    """Bytes of a record in published order: the native record without padding.

    Raises:
        ValueError: 3-bit codes, which published order does not have.
    """
    for name, bits in (("key_bits", cfg.key_bits), ("value_bits", cfg.value_bits)):
        if bits == 3:
            raise ValueError(f"{name} 3: published order has only 2, 4 and 8 bits; keep the native record")
    return layout.offsets_of(cfg).end


def from_published(published: Bytes, cfg: Settings) -> Bytes:
    """Native records uint8 [n, record_bytes] from published records uint8 [n, published_bytes].

    The range guard is applied to the stored halves: a power of two, exact unless a scale becomes subnormal (a
    tile whose values are all below about 1e-3) or saturates.
    """
    layout.check_record(published, published_bytes(cfg))
    G, D = cfg.group, cfg.head_dim
    parts = np.split(published, _cuts(cfg), axis=1)
    key = Matrix(_unpack(parts[0], cfg.key_bits, D, G), _half(parts[1]), _half(parts[2]), _half(parts[3]))
    value = Matrix(_unpack(parts[4], cfg.value_bits, G, D), _half(parts[6]), _half(parts[7]), _half(parts[5]))
    return layout.write(folded(key), folded(value), cfg)


def to_published(record: Bytes, cfg: Settings) -> Bytes:
    """Published records of native ones: the folded parameters, so the same decoded values."""
    published_bytes(cfg)
    key, value = layout.read(record, cfg)
    parts = (
        _pack(key.codes, cfg.key_bits),
        _data(key.row_scale),
        _data(key.row_zero),
        _data(key.column_scale),
        _pack(value.codes, cfg.value_bits),
        _data(value.column_scale),
        _data(value.row_scale),
        _data(value.row_zero),
    )
    return np.concatenate(parts, axis=1)


def folded(matrix: Matrix) -> Matrix:
    """The same matrices with their range guards applied to the stored halves."""
    sides = (matrix.row_scale, matrix.row_zero, matrix.column_scale)
    row_scale, row_zero, column_scale = fold(*(side.astype(np.float32) for side in sides))
    return Matrix(matrix.codes, to_half(row_scale), to_half(row_zero), to_half(column_scale))


def _cuts(cfg: Settings) -> list[int]:
    at = layout.offsets_of(cfg)
    return [
        at.key_channel_scale,
        at.key_channel_zero,
        at.key_token_scale,
        at.value_codes,
        at.value_channel_scale,
        at.value_token_scale,
        at.value_token_zero,
    ]


def _unpack(data: Bytes, bits: int, rows: int, columns: int) -> Bytes:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: Bytes = data[..., None] >> shifts & np.uint8(2**bits - 1)
    return codes.reshape(-1, rows, columns)


def _pack(codes: Bytes, bits: int) -> Bytes:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    grouped = codes.reshape(codes.shape[0], -1, shifts.size) << shifts
    data: Bytes = np.bitwise_or.reduce(grouped, axis=-1)
    return data


def _half(data: Bytes) -> Float16:
    return np.ascontiguousarray(data).view("<f2").astype(np.float16)


def _data(halves: Float16) -> Bytes:
    return np.ascontiguousarray(halves, "<f2").view(np.uint8)
