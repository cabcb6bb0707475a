"""Files of named tensors: what all readers offer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from kvarn.errors import FormatError


@dataclass(frozen=True)
class Tensor:
    """What a file says of one tensor.

    Attributes:
        dtype: "float16", "bfloat16" or "float32"; anything else is another type, in the words of the format.
        shape: elements of each dimension.
    """

    dtype: str
    shape: tuple[int, ...]


class TensorFile(Protocol):
    """An open file; the tensors are read one by one."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by name, in the order of the file."""

    def read(self, name: str) -> NDArray[Any]:
        """The values of a tensor of type float16, bfloat16 (as float32) or float32, C contiguous.

        Raises:
            FormatError: the file does not hold what it said.
        """


def unreadable(path: Path, error: OSError) -> FormatError:
    """The error for a file that the system does not let us read."""
    return FormatError(
        f"{path}: {error.strerror or error}: expected a readable {path.suffix} file; check the path"
    )
