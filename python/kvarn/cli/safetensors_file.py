"""A strict reader of the safetensors format.

A file is 8 bytes, the length of the header as a little-endian integer; the header, a JSON object from the
name of each tensor to its `dtype`, `shape` and `data_offsets` [begin, end), padded with spaces; and the data,
to which the offsets refer. `__metadata__` is no tensor but a map of strings. The data of the tensors fill the
rest of the file without gap or overlap. Source: the README of github.com/huggingface/safetensors.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
from numpy.typing import NDArray

from kvarn.cli.tensor_file import Tensor, unreadable
from kvarn.errors import FormatError

MAX_HEADER = 100_000_000
"""Bytes of the longest header; the format sets this limit."""
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_STORED = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}


class SafetensorsFile:
    """The tensors of a .safetensors file; its header is checked as a whole when it is opened."""

    def __init__(self, path: Path):
        self._path = path
        self._begins: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    self._refuse(f"{size} bytes: expected 8 or more")
                length = int.from_bytes(file.read(8), "little")
                if length > min(MAX_HEADER, size - 8):
                    limit = min(MAX_HEADER, size - 8)
                    self._refuse(
                        f"header of {length} bytes: expected {limit} at most, as the file has {size}"
                    )
                text = file.read(length)
        except OSError as error:
            raise unreadable(path, error) from error
        self._data = 8 + length
        self._index(self._header(text), size - self._data)

    def read(self, name: str) -> NDArray[Any]:
        """The values of a tensor, as `TensorFile.read` says."""
        tensor = self.tensors[name]
        count = math.prod(tensor.shape)
        try:
            with open(self._path, "rb") as file:
                file.seek(self._data + self._begins[name])
                stored = np.fromfile(file, _STORED[tensor.dtype], count)
        except OSError as error:
            raise unreadable(self._path, error) from error
        if stored.size != count:
            self._refuse(f"{name} ends after {stored.size} of {count} elements: the file has changed")
        if tensor.dtype == "bfloat16":
            # A bfloat16 is the upper half of a float32.
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.reshape(tensor.shape)

    def _header(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=self._once)
        except FormatError:
            raise
        except (ValueError, RecursionError) as error:
            self._refuse(f"header: {error}: expected JSON")
        if not isinstance(header, dict):
            self._refuse(f"header: a {type(header).__name__}: expected a JSON object")
        return header

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            name = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            self._refuse(f"header: {name} twice: expected each name once")
        return made

    def _index(self, header: dict[str, Any], data: int) -> None:
        header.pop("__metadata__", None)
        ends: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            dtype, shape, offsets = self._entry(name, entry)
            begin, end = offsets
            if not begin <= end <= data:
                self._refuse(
                    f"{name} with data_offsets {offsets}: expected to end within {data} bytes of data"
                )
            count = math.prod(shape)
            if dtype in _BYTES and end - begin != count * _BYTES[dtype]:
                expected = f"{count * _BYTES[dtype]} for {dtype} {shape}"
                self._refuse(f"{name} of {end - begin} bytes: expected {expected}")
            ends.append((begin, end, name))
            self._begins[name] = begin
            self.tensors[name] = Tensor(_NAMES.get(dtype, dtype), tuple(shape))
        filled = 0
        for begin, end, name in sorted(ends):
            if begin != filled:
                kind = "overlaps what is before it" if begin < filled else "leaves a gap before it"
                self._refuse(
                    f"{name} with data_offsets [{begin}, {end}] {kind}: expected to begin at {filled}"
                )
            filled = end
        if filled != data:
            self._refuse(f"{data} bytes of data: expected {filled}, as the tensors take")

    def _entry(self, name: str, entry: Any) -> tuple[str, list[int], list[int]]:
        found = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (found.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            text = repr(entry)
            shown = text if len(text) <= 100 else text[:100] + "…"
            self._refuse(f"{name}: {shown}: expected dtype, shape and two data_offsets")
        return dtype, shape, offsets

    def _refuse(self, what: str) -> NoReturn:
        raise FormatError(f"{self._path}: {what}; save the file again, it is damaged or of another format")


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
