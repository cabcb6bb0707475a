"""Published records in a .npz file: the container that `kvarn convert` reads and writes."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvarn import Config
from kvarn._files import write_whole
from kvarn.cli.npz_file import NpzFile
from kvarn.errors import ConfigError, FormatError

RECORDS = "record"
"""Name of the array uint8 [tiles, published_bytes]."""
FIELDS = (
    "head_dim",
    "group",
    "key_bits",
    "value_bits",
    "refit",
    "iterations",
    "sink_tokens",
    "recent_tokens",
)
"""Names of the integers that hold the configuration, which the records themselves do not."""

_INTEGERS = {"bool"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def write_published(path: Path, published: NDArray[np.uint8], cfg: Config) -> None:
    """Writes published records and their configuration; the file appears whole or not at all.

    Raises:
        FormatError: the file cannot be written.
    """
    arrays: dict[str, Any] = {RECORDS: published}
    arrays.update({name: np.int64(getattr(cfg, name)) for name in FIELDS})
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        write_whole(path, [buffer.getvalue()])
    except OSError as error:
        raise FormatError(
            f"{path}: {error.strerror or error}: expected a file to write; check the path"
        ) from error


def read_published(path: Path, given: Config | None) -> tuple[NDArray[np.uint8], Config]:
    """Published records and their configuration.

    Args:
        path: a .npz file with an array `record`, uint8 [tiles, published_bytes], and the numbers of the
            configuration.
        given: the configuration, for a file without those numbers.

    Raises:
        ConfigError: neither the file nor the caller says the configuration, or they disagree.
        FormatError: no such array, one of another shape, or a damaged file.
    """
    file = NpzFile(path)
    found = {name: _integer(file, path, name) for name in FIELDS if name in file.tensors}
    if missing := [name for name in FIELDS if name not in found]:
        if given is None:
            raise ConfigError(
                f"{path} without {', '.join(missing)}: expected the configuration in the file, or as "
                "options; pass --config NAME --head-dim D"
            )
        cfg = given
    else:
        cfg = Config(**{**found, "refit": bool(found["refit"])})  # type: ignore[arg-type]
    for name, value in found.items():
        if given is not None and value != getattr(given, name):
            raise ConfigError(
                f"{name} {getattr(given, name)}: expected {value}, as {path} says; leave the options out"
            )
    tensor = file.tensors.get(RECORDS)
    expected = f"{RECORDS}, uint8 [tiles, {cfg.published_bytes}] for {cfg.name} at head dim {cfg.head_dim}"
    if tensor is None:
        names = ", ".join(file.tensors) or "no arrays"
        raise FormatError(f"{path} with {names}: expected {expected}; name the array so")
    shape = list(tensor.shape)
    if tensor.dtype != "uint8" or len(shape) != 2 or shape[1] != cfg.published_bytes:
        raise FormatError(
            f"{path} with {RECORDS} of type {tensor.dtype} and shape {shape}: expected {expected}; use the "
            "configuration that made them"
        )
    return file.read(RECORDS), cfg


class Parameters(NamedTuple):
    """Parameters of one side of published records, float64 [tiles, …].

    Attributes:
        rows: scales, then zero points, of the quantised rows.
        columns: scales of the columns.
    """

    rows: NDArray[np.float64]
    columns: NDArray[np.float64]


def parameters(published: NDArray[np.uint8], cfg: Config) -> tuple[Parameters, Parameters]:
    """The parameters of K and of V; the order is that of docs/format.md."""
    d, g = cfg.head_dim, cfg.group
    codes = d * g // 8
    halves = []
    start = codes * cfg.key_bits
    for count in (d, d, g):
        halves.append(published[:, start : start + 2 * count])
        start += 2 * count
    start += codes * cfg.value_bits
    for count in (d, g, g):
        halves.append(published[:, start : start + 2 * count])
        start += 2 * count
    k_scale, k_zero, k_token, v_channel, v_scale, v_zero = (
        np.ascontiguousarray(part).view("<f2").astype(np.float64) for part in halves
    )
    return (
        Parameters(np.concatenate([k_scale, k_zero], axis=1), k_token),
        Parameters(np.concatenate([v_scale, v_zero], axis=1), v_channel),
    )


def _integer(file: NpzFile, path: Path, name: str) -> int:
    tensor = file.tensors[name]
    if tensor.shape != () or tensor.dtype not in _INTEGERS:
        raise FormatError(
            f"{path} with {name} of type {tensor.dtype} and shape {list(tensor.shape)}: expected an integer; "
            "save it with numpy.int64"
        )
    return int(file.read(name).item())
