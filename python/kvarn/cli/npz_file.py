"""A reader of NumPy's .npz files that loads no pickled objects and believes no size it cannot check."""

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from kvarn.cli.tensor_file import Tensor, unreadable
from kvarn.errors import FormatError

_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    EOFError,
    OverflowError,
    RuntimeError,
    ValueError,
)
"""What zipfile and NumPy raise for members that are damaged, encrypted or compressed in unknown ways."""


class NpzFile:
    """The arrays of a .npz file; the headers of all are checked when it is opened."""

    def __init__(self, path: Path):
        self._path = path
        self.tensors: dict[str, Tensor] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if not info.filename.endswith(".npy"):
                        continue
                    name = info.filename[: -len(".npy")]
                    if name in self.tensors:
                        self._refuse(f"{name} twice: expected each name once")
                    with archive.open(info) as member:
                        shape, _, dtype = _header(member)
                        size = info.file_size - member.tell()
                    if min(shape, default=0) < 0:
                        self._refuse(f"{name} of shape {list(shape)}: expected no negative numbers")
                    if not dtype.hasobject and size != math.prod(shape) * dtype.itemsize:
                        expected = f"{math.prod(shape) * dtype.itemsize} for {dtype} {list(shape)}"
                        self._refuse(f"{name} of {size} bytes: expected {expected}")
                    self.tensors[name] = Tensor(dtype.name if dtype.isnative else dtype.str, shape)
        except OSError as error:
            raise unreadable(path, error) from error
        except FormatError:
            raise
        except _DAMAGED as error:
            self._refuse(f"{error}: expected the arrays of numpy.savez")

    def read(self, name: str) -> NDArray[Any]:
        """The values of an array, as `TensorFile.read` says."""
        tensor = self.tensors[name]
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(f"{name}.npy") as member:
                shape, fortran, dtype = _header(member)
                if (shape, dtype.name) != (tensor.shape, tensor.dtype):
                    self._refuse(f"{name}: the file has changed")
                # Grows with what is there, so a lie about the size costs no memory; the end checks the CRC.
                data = member.read()
        except OSError as error:
            raise unreadable(self._path, error) from error
        except FormatError:
            raise
        except _DAMAGED as error:
            self._refuse(f"{name}: {error}: expected the arrays of numpy.savez")
        if len(data) != math.prod(shape) * dtype.itemsize:
            self._refuse(f"{name} of {len(data)} bytes: expected {math.prod(shape) * dtype.itemsize}")
        flat = np.frombuffer(data, dtype)
        return np.ascontiguousarray(flat.reshape(shape, order="F" if fortran else "C"))

    def _refuse(self, what: str) -> NoReturn:
        raise FormatError(f"{self._path}: {what}; save the file again, it is damaged or of another format")


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and type of an array, read up to its first value."""
    version = npy.read_magic(member)
    if version == (1, 0):
        return npy.read_array_header_1_0(member)
    if version == (2, 0):
        return npy.read_array_header_2_0(member)
    raise ValueError(f"version {version[0]}.{version[1]} of the .npy format: expected 1.0 or 2.0")
