"""Writing and reading whole files: by path, or as a file object."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from typing import Any

from kvarn.errors import DTypeError

BytesLike = bytes | memoryview


def write_whole(path: str | os.PathLike[str], parts: Sequence[BytesLike]) -> None:
    """Writes a file that appears whole or not at all: it is written beside `path` and renamed.

    Raises:
        OSError: The file cannot be written.
    """
    folder, name = os.path.split(os.fspath(path))
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.part")
    file = open(temporary, "xb")  # noqa: SIM115  (closed before the rename)
    try:
        with file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write(file: Any, parts: Sequence[BytesLike]) -> None:
    """Writes to a path, as `write_whole` does, or to a binary file object.

    Raises:
        DTypeError: Neither a path nor an object with a method `write`.
        OSError: As the file says.
    """
    if isinstance(file, str | os.PathLike):
        write_whole(file, parts)
        return
    if not hasattr(file, "write"):
        kind = type(file).__name__
        raise DTypeError(f"file of type {kind}: expected a path or a binary file; open it with mode 'wb'")
    for part in parts:
        rest = memoryview(part)
        # An unbuffered file may take less than it is given.
        while len(rest):
            written = file.write(rest)
            rest = rest[len(rest) if written is None else written :]


def read(file: Any) -> bytes:
    """All that a binary file object has left.

    Raises:
        DTypeError: No object with a method `read`, or one that gives text.
        OSError: As the file says.
    """
    if not hasattr(file, "read"):
        kind = type(file).__name__
        raise DTypeError(f"file of type {kind}: expected a path or a binary file; open it with mode 'rb'")
    data = file.read()
    if not isinstance(data, bytes):
        kind = type(data).__name__
        raise DTypeError(f"file that gives {kind}: expected bytes; open it with mode 'rb'")
    return data
