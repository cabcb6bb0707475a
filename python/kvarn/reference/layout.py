"""Where every code and parameter lies in a record (native order).

    record = K codes | K s_chan | K z_chan | K s_tok | V codes | V s_chan | V s_tok | V z_tok | zeros

padded to a multiple of 128 bytes, little endian, parameters IEEE half. Codes lie in the order of tensor core
fragments: 16 tokens × 16 channels make a fragment, 32 lanes hold its 256 codes, and `W` 32-bit words per lane
hold all fragments. The maps below give the place of every bit, so that packing is one scatter and unpacking
one gather, whatever the width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate

import numpy as np

from kvarn.reference.matrix import Matrix, Side
from kvarn.reference.settings import BITS, GROUPS, HEAD_DIMS, Bytes, Float16, Integers, Settings

ALIGNMENT = 128


@dataclass(frozen=True)
class Offsets:
    """Byte offset of each section of a record, and of its end with and without padding."""

    key_codes: int
    key_channel_scale: int
    key_channel_zero: int
    key_token_scale: int
    value_codes: int
    value_channel_scale: int
    value_token_scale: int
    value_token_zero: int
    end: int
    padded_end: int


@cache
def offsets(key_bits: int, value_bits: int, group: int, head_dim: int) -> Offsets:
    """Section offsets in bytes.

    Raises:
        ValueError: a parameter the format does not have.
    """
    for bits in (key_bits, value_bits):
        if bits not in BITS:
            raise ValueError(f"{bits} bits: expected 2, 3, 4 or 8; choose one of these")
    if group not in GROUPS:
        raise ValueError(f"group {group}: expected 64 or 128; choose one of these")
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"head_dim {head_dim}: expected a multiple of 16 from 16 to 256; "
            "pad the head or choose another cache"
        )
    token, channel = 2 * group, 2 * head_dim
    codes = group * head_dim // 8
    sizes = (codes * key_bits, channel, channel, token, codes * value_bits, channel, token, token)
    k_chan_scale, k_chan_zero, k_tok_scale, v_codes, v_chan_scale, v_tok_scale, v_tok_zero, end = accumulate(
        sizes
    )
    return Offsets(
        key_codes=0,
        key_channel_scale=k_chan_scale,
        key_channel_zero=k_chan_zero,
        key_token_scale=k_tok_scale,
        value_codes=v_codes,
        value_channel_scale=v_chan_scale,
        value_token_scale=v_tok_scale,
        value_token_zero=v_tok_zero,
        end=end,
        padded_end=-(-end // ALIGNMENT) * ALIGNMENT,
    )


def offsets_of(cfg: Settings) -> Offsets:
    """Section offsets of a configuration's records."""
    return offsets(cfg.key_bits, cfg.value_bits, cfg.group, cfg.head_dim)


@lru_cache(maxsize=32)
def code_bits(side: Side, bits: int, group: int, head_dim: int) -> Integers:
    """Place of every bit of every code, from the start of its code section.

    Returns:
        int64 [G, D, bits]: for token t, channel d and bit i of its code (0 the least significant), the number
        8·byte + bit, bits of a byte counted from the least significant. A bijection onto 0 … G·D·bits - 1.
    """
    t = np.arange(group)[:, None, None]
    d = np.arange(head_dim)[None, :, None]
    i = np.arange(bits)[None, None, :]
    f = t // 16 * (head_dim // 16) + d // 16
    row, k = (t % 16, d % 16) if side == "key" else (d % 16, t % 16)
    rr, kh = row // 8, k // 8
    h, u = (kh, rr) if side == "key" else (rr, kh)
    e = k % 2
    lane = 4 * (row % 8) + k % 8 // 2

    if bits == 4:
        word, bit = f, 8 * u + 4 * h + i
    elif bits == 2:
        word, bit = f // 2, 8 * u + 4 * (f % 2) + 2 * h + i
    elif bits == 8:
        word, bit = 2 * f + h, 8 * u + i
    else:
        j, b = f % 4, 3 * (f // 4)
        # Three fragments fill bits 3 … 14 of a word each; the fourth is spread over what they leave.
        corner = 2 * h + u
        word = np.where(j < 3, b + j, np.where(corner < 3, b + corner, b + i))
        bit = np.where(j < 3, 3 + 3 * h + 6 * u + i, np.where(corner < 3, i, 15))
    bit = bit + 16 * e

    words = group * head_dim * bits // 1024
    quads = 4 * (words // 4)
    rest = words - quads
    byte = np.where(
        word < quads,
        word // 4 * 512 + 16 * lane + 4 * (word % 4),
        128 * quads + 4 * rest * lane + 4 * (word - quads),
    )
    places = np.broadcast_to(8 * byte + bit, (group, head_dim, bits)).astype(np.int64)
    places.flags.writeable = False
    return places


def pack(codes: Bytes, side: Side, bits: int) -> Bytes:
    """Pack codes uint8 [n, G, D] into bytes uint8 [n, G·D·bits/8]."""
    n, group, head_dim = codes.shape
    places = code_bits(side, bits, group, head_dim)
    stream = np.zeros((n, group * head_dim * bits), np.uint8)
    stream[:, places] = codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(stream, axis=-1, bitorder="little")


def unpack(data: Bytes, side: Side, bits: int, group: int, head_dim: int) -> Bytes:
    """Codes uint8 [n, G, D] from bytes uint8 [n, G·D·bits/8]."""
    stream = np.unpackbits(data, axis=-1, bitorder="little")
    parts = stream[:, code_bits(side, bits, group, head_dim)] << np.arange(bits, dtype=np.uint8)
    codes: Bytes = np.bitwise_or.reduce(parts, axis=-1)
    return codes


@cache
def row_order(n: int) -> Integers:
    """Byte offset of parameter i of n in K s_tok and V s_chan; int64 [n]."""
    i = np.arange(n)
    return i % 8 * (n // 16) * 4 + i // 16 * 4 + i % 16 // 8 * 2


@cache
def k_order(n: int) -> Integers:
    """Byte offset of parameter i of n in K s_chan, K z_chan, V s_tok and V z_tok; int64 [n]."""
    i = np.arange(n)
    return i % 8 // 2 * (n // 16) * 8 + i // 16 * 8 + i % 16 // 8 * 4 + i % 2 * 2


def write(key: Matrix, value: Matrix, cfg: Settings) -> Bytes:
    """Records uint8 [n, record_bytes] of n encoded K matrices [D, G] and V matrices [G, D]."""
    at = offsets_of(cfg)
    record = np.zeros((key.codes.shape[0], at.padded_end), np.uint8)

    def put(start: int, data: Bytes) -> None:
        record[:, start : start + data.shape[1]] = data

    put(at.key_codes, pack(key.codes.transpose(0, 2, 1), "key", cfg.key_bits))
    put(at.key_channel_scale, _permute(key.row_scale, k_order(cfg.head_dim)))
    put(at.key_channel_zero, _permute(key.row_zero, k_order(cfg.head_dim)))
    put(at.key_token_scale, _permute(key.column_scale, row_order(cfg.group)))
    put(at.value_codes, pack(value.codes, "value", cfg.value_bits))
    put(at.value_channel_scale, _permute(value.column_scale, row_order(cfg.head_dim)))
    put(at.value_token_scale, _permute(value.row_scale, k_order(cfg.group)))
    put(at.value_token_zero, _permute(value.row_zero, k_order(cfg.group)))
    return record


def read(record: Bytes, cfg: Settings) -> tuple[Matrix, Matrix]:
    """K and V matrices of records uint8 [n, record_bytes].

    Raises:
        ValueError: wrong shape or dtype of `record`.
    """
    at = offsets_of(cfg)
    check_record(record, at.padded_end)
    G, D = cfg.group, cfg.head_dim

    def parameters(start: int, order: Integers) -> Float16:
        halves = np.ascontiguousarray(record[:, start : start + 2 * order.size]).view("<f2")
        return halves[:, order // 2].astype(np.float16)

    key_codes = unpack(record[:, at.key_codes : at.key_channel_scale], "key", cfg.key_bits, G, D)
    key = Matrix(
        codes=key_codes.transpose(0, 2, 1),
        row_scale=parameters(at.key_channel_scale, k_order(D)),
        row_zero=parameters(at.key_channel_zero, k_order(D)),
        column_scale=parameters(at.key_token_scale, row_order(G)),
    )
    value = Matrix(
        codes=unpack(record[:, at.value_codes : at.value_channel_scale], "value", cfg.value_bits, G, D),
        row_scale=parameters(at.value_token_scale, k_order(G)),
        row_zero=parameters(at.value_token_zero, k_order(G)),
        column_scale=parameters(at.value_channel_scale, row_order(D)),
    )
    return key, value


def check_record(record: Bytes, size: int) -> None:
    """Refuse anything but uint8 [n, size]."""
    if record.dtype != np.uint8 or record.ndim != 2 or record.shape[1] != size:
        raise ValueError(
            f"record {record.dtype} {list(record.shape)}: expected uint8 [tiles, {size}]; "
            "check that it was encoded with the same configuration"
        )


def _permute(halves: Float16, order: Integers) -> Bytes:
    data = np.empty(halves.shape, "<f2")
    data[:, order // 2] = halves
    return data.view(np.uint8)
