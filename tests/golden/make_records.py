"""Golden records of format version 1: `python tests/golden/make_records.py` writes `records_v1`.

Each file of `records_v1` is a saved file (docs/format.md) of one configuration, written by the CPU encoder.
Its input is made here by integer arithmetic alone, so that it comes out the same everywhere. `values.txt` has
a line for each file: its name, the CRC-32 of K and V as they go into the encoder (float16), and the CRC-32 of
K and V as they decode (float32), all in the rotated frame, [tiles, group, head_dim], little endian. Decoding
is exact, so every decoder that computes in float32 has these checksums.
"""

import itertools
import zlib
from pathlib import Path
from typing import NamedTuple

import kvarn
import numpy as np

FOLDER = Path(__file__).parent / "records_v1"
BITS = ((4, 4), (4, 2), (3, 3), (2, 2), (8, 4), (8, 8))
HEAD_DIMS = (64, 96, 128, 256)
# The head dim at which each pair of widths has tiles of 128 tokens; elsewhere 64, which keeps files small.
LARGE_TILES_AT = dict(zip(BITS, (64, 128, 96, 256, 64, 64), strict=True))


class Case(NamedTuple):
    """One file.

    Attributes:
        name: of the file.
        cfg: configuration of its records.
        tiles: number of records. The second tile has a constant channel, a token of zeros and a large token.
    """

    name: str
    cfg: kvarn.Config
    tiles: int


def cases() -> list[Case]:
    """Every pair of widths at every head dim; tile length and refit so that any two values meet."""
    made = []
    for (row, bits), (column, head_dim) in itertools.product(enumerate(BITS), enumerate(HEAD_DIMS)):
        group = 128 if LARGE_TILES_AT[bits] == head_dim else 64
        cfg = kvarn.Config(
            key_bits=bits[0],
            value_bits=bits[1],
            group=group,
            head_dim=head_dim,
            refit=(row + column) % 2 == 1,
            sink_tokens=0,
        )
        name = f"k{bits[0]}v{bits[1]}_g{group}_d{head_dim}_{'refit' if cfg.refit else 'plain'}.records"
        made.append(Case(name, cfg, 2 if (group, head_dim) == (64, 64) else 1))
    return made


def words(seed: int, count: int) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014) from the state `seed`: uint64 [count]."""
    z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bell(seed: int, *shape: int) -> np.ndarray:
    """Multiples of 1/128 from -1020/128 to 1020/128, bell shaped, standard deviation 1.6: float32 [*shape].

    Each is the sum of the eight bytes of a word, less 1020, over 128: float16 holds it exactly.
    """
    sums = words(seed, int(np.prod(shape))).view(np.uint8).reshape(-1, 8).sum(-1, dtype=np.int32)
    return ((sums - 1020).astype(np.float32) / 128).reshape(shape)


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """K and V of a case, float16 [tiles, group, head_dim], in the rotated frame.

    Scales are powers of two: 1/4 … 4 of K's channels, 1/2 … 2 of V's tokens; every 17th channel of K is
    shifted.
    """
    group, head_dim = case.cfg.group, case.cfg.head_dim
    seed = zlib.crc32(case.name.encode()) << 8
    k, v = (bell(seed + side, case.tiles, group, head_dim) for side in range(2))
    k *= np.ldexp(np.float32(1), (words(seed + 2, head_dim) % np.uint64(5)).astype(np.int32) - 2)
    k[..., ::17] += 6
    v *= np.ldexp(np.float32(1), (words(seed + 3, group) % np.uint64(3)).astype(np.int32) - 1)[:, None]
    for x in (k[1:], v[1:]):
        x[:, :, 5] = 0.5
        x[:, 7] = 0
        x[:, 11] *= 64
    return k.astype(np.float16), v.astype(np.float16)


def crc(array: np.ndarray) -> str:
    """CRC-32 of the bytes of an array, little endian, as eight hexadecimal digits."""
    return f"{zlib.crc32(np.ascontiguousarray(array).astype(array.dtype.newbyteorder('<')).tobytes()):08x}"


def listed() -> dict[str, tuple[str, ...]]:
    """The lines of `values.txt`: file name to the checksums of K, V, decoded K, decoded V."""
    lines = (FOLDER / "values.txt").read_text(encoding="utf-8").splitlines()
    return {name: tuple(checksums) for name, *checksums in (line.split() for line in lines)}


def main() -> None:
    """Writes every file."""
    FOLDER.mkdir(exist_ok=True)
    lines = []
    for case in cases():
        k, v = inputs(case)
        records = kvarn.encode(k, v, case.cfg, rotated=True)
        kvarn.save_records(FOLDER / case.name, records, case.cfg)
        decoded = kvarn.decode(records, case.cfg, rotated=True)
        lines.append(" ".join((case.name, *map(crc, (k, v, *decoded)))))
    (FOLDER / "values.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{len(lines)} files, {size:,} bytes in {FOLDER}")


if __name__ == "__main__":
    main()
