"""NumPy arrays and torch tensors, without importing torch before the caller has."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvarn._kvarn import Memory
from kvarn.errors import DTypeError

if TYPE_CHECKING:
    import torch

# The same kind out as in.
Array = TypeVar("Array", NDArray[Any], "torch.Tensor")


def torch_of(array: object) -> Any:
    """The module torch if `array` is a torch tensor, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else None


def view(memory: Memory, like: Array) -> Array:
    """`memory` as an array of the kind of `like`; no copy."""
    array: Array = (torch_of(like) or np).from_dlpack(memory)
    return array


def empty(shape: tuple[int, ...], name: str, like: Array, *, float32: bool = False) -> Array:
    """An uninitialised array of the kind of `like`, the argument `name`, in its type or in float32."""
    framework = _framework(name, like)
    options = {} if framework is np else {"device": like.device}
    array: Array = framework.empty(shape, dtype=framework.float32 if float32 else like.dtype, **options)
    return array


def empty_like(name: str, like: Array) -> Array:
    """An uninitialised, contiguous array of the shape, type and kind of `like`, the argument `name`."""
    framework = _framework(name, like)
    array: Array
    tensor: Any = like
    if framework is np:
        array = framework.empty(like.shape, dtype=like.dtype)
    elif tensor.is_contiguous():
        # What torch does anyway, without the keyword that takes it longer.
        array = framework.empty_like(like)
    else:
        array = framework.empty_like(like, memory_format=framework.contiguous_format)
    return array


def _framework(name: str, array: object) -> Any:
    torch = torch_of(array)
    if torch is None and not isinstance(array, np.ndarray):
        kind = type(array).__name__
        raise DTypeError(f"{name} of type {kind}: expected a NumPy array or a torch tensor; convert it first")
    return torch or np
