"""Keys and values of one or several layers, found by name among the tensors of a file."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn.cli.npz_file import NpzFile
from kvarn.cli.safetensors_file import SafetensorsFile
from kvarn.cli.tensor_file import TensorFile
from kvarn.errors import ConfigError, DTypeError, FormatError, NonFiniteError, ShapeError

NAMES = "k and v, keys and values, or k.LAYER and v.LAYER of each layer"
SHAPE = "[tokens, kv_heads, head_dim]"
_READERS: dict[str, Callable[[Path], TensorFile]] = {".npz": NpzFile, ".safetensors": SafetensorsFile}
_LAYERED = re.compile(r"([kv])\.(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Layer:
    """K and V of one layer in a file; not read yet.

    Attributes:
        number: the layer, None where the names do not say.
        k: name of the keys.
        v: name of the values.
        dtype: "float16", "bfloat16" or "float32".
        tokens: tokens of both.
        kv_heads: KV heads.
        head_dim: channels of a head.
    """

    number: int | None
    k: str
    v: str
    dtype: str
    tokens: int
    kv_heads: int
    head_dim: int


class KvFile:
    """A file with K and V of one or several layers.

    Attributes:
        layers: the layers, in order; shapes and types are checked, values are not read yet.

    Raises:
        ConfigError: no K and V by these names, or more than one way to take them.
        FormatError: no .npz or .safetensors file, or a malformed one.
        ShapeError: K or V is not [tokens, kv_heads, head_dim], or their shapes differ.
        DTypeError: K or V is not float16, bfloat16 or float32, or their types differ.
    """

    def __init__(self, path: Path, k: str | None = None, v: str | None = None):
        self._path = path
        self._file = _open(path)
        self.layers = [self._layer(*found) for found in self._pairs(k, v)]

    def read(self, layer: Layer) -> tuple[NDArray[Any], NDArray[Any]]:
        """K and V of a layer, [tokens, kv_heads, head_dim]; float16 or float32, as which bfloat16 comes.

        Raises:
            NonFiniteError: a NaN or an infinity, with its place.
            FormatError: the file is damaged or has changed.
        """
        k, v = (self._finite(name) for name in (layer.k, layer.v))
        return k, v

    def _pairs(self, k: str | None, v: str | None) -> list[tuple[int | None, str, str]]:
        names = self._file.tensors
        if k is not None and v is not None:
            return [(None, self._named(k), self._named(v))]
        if k is not None or v is not None:
            raise ConfigError(f"--k {k} with --v {v}: expected both or neither; pass the other name too")
        usual = [pair for pair in (("k", "v"), ("keys", "values")) if not names.keys().isdisjoint(pair)]
        numbers = sorted({int(match[2]) for match in map(_LAYERED.fullmatch, names) if match})
        if len(usual) + bool(numbers) > 1:
            raise ConfigError(
                f"{self._path} with {self._found()}: expected one of {NAMES}; choose with --k and --v"
            )
        found: list[tuple[int | None, str, str]] = [(None, *pair) for pair in usual]
        found += [(number, f"k.{number}", f"v.{number}") for number in numbers]
        if not found:
            raise ConfigError(f"{self._path} with {self._found()}: expected {NAMES}; choose with --k and --v")
        return [(number, self._named(k), self._named(v)) for number, k, v in found]

    def _named(self, name: str) -> str:
        if name not in self._file.tensors:
            raise ConfigError(
                f"{self._path} with {self._found()}: expected {name} among them; choose with --k and --v"
            )
        return name

    def _found(self) -> str:
        names = list(self._file.tensors)
        shown = ", ".join(names[:8]) or "no arrays"
        return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"

    def _layer(self, number: int | None, k: str, v: str) -> Layer:
        for name in (k, v):
            tensor = self._file.tensors[name]
            shape = list(tensor.shape)
            if len(shape) != 3 or 0 in shape:
                fix = "of transformers' [1, kv_heads, tokens, head_dim] save x[0].transpose(0, 1)"
                raise ShapeError(f"{name} of shape {shape}: expected {SHAPE}, all at least 1; {fix}")
            if tensor.dtype not in ("float16", "bfloat16", "float32"):
                fix = "convert it before saving"
                raise DTypeError(
                    f"{name} of type {tensor.dtype}: expected float16, bfloat16 or float32; {fix}"
                )
        of_k, of_v = self._file.tensors[k], self._file.tensors[v]
        if of_k.shape != of_v.shape:
            raise ShapeError(
                f"{v} of shape {list(of_v.shape)}: expected {list(of_k.shape)}, as {k} has; save both alike"
            )
        if of_k.dtype != of_v.dtype:
            raise DTypeError(f"{v} of type {of_v.dtype}: expected {of_k.dtype}, as {k} has; save both alike")
        return Layer(number, k, v, of_k.dtype, *of_k.shape)

    def _finite(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = self._file.read(name)
        finite = np.isfinite(values)
        if not finite.all():
            place = tuple(map(int, np.unravel_index(int(finite.argmin()), values.shape)))
            where = f"token {place[0]}, KV head {place[1]}, channel {place[2]}"
            count = values.size - int(finite.sum())
            raise NonFiniteError(
                f"{name} with {values[place]} at {where}, {count} of {values.size} elements: expected finite "
                "values; find where the model makes them"
            )
        return values


def _open(path: Path) -> TensorFile:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise FormatError(f"{path}: expected a .npz or .safetensors file; save K and V with numpy.savez")
    if path.exists() and not path.is_file():
        raise FormatError(f"{path}: no regular file: expected a {path.suffix} file; pass its path")
    return reader(path)
