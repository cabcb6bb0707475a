"""Devices: where a pool lives, and the stream that its work goes to."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from kvarn import _kvarn
from kvarn.errors import DeviceError, NonFiniteError


def cuda_index(device: object) -> int | None:
    """Index of a CUDA device; None for the CPU.

    Args:
        device: "cpu", "cuda", "cuda:1", or a ``torch.device``. "cuda" is torch's current device.

    Raises:
        DeviceError: Another device.
    """
    name, _, index = str(device).partition(":")
    if name == "cpu" and not index:
        return None
    if name == "cuda" and (not index or index.isdecimal()):
        if index:
            return int(index)
        torch: Any = sys.modules.get("torch")
        return int(torch.cuda.current_device()) if torch is not None and torch.cuda.is_available() else 0
    raise DeviceError(f"device {str(device)!r}: expected 'cpu', 'cuda' or 'cuda:N'; choose one of these")


def warmup(device: object = "cuda") -> None:
    """Makes a CUDA device ready: context and kernels.

    To be called before a graph capture, or to have the time it takes early.

    Args:
        device: As in `Pool`.

    Raises:
        CudaUnavailableError: CUDA cannot be used here; the text says what is missing.
        DeviceError: Not a CUDA device.
    """
    index = cuda_index(device)
    if index is None:
        raise DeviceError("device 'cpu': expected a CUDA device; the CPU needs no warm-up")
    _kvarn.warmup(index)


def current_stream(index: int) -> int:
    """Address of torch's current stream on a CUDA device."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        raise DeviceError("a CUDA pool without torch: expected torch tensors; import torch first")
    return int(torch.cuda.current_stream(index).cuda_stream)


def default_like(dtype: str, cuda: int | None) -> Any:
    """An empty array of the kind and type that a pool's results take by default."""
    if cuda is None:
        return np.empty(0, dtype)
    import torch

    return torch.empty(0, dtype=getattr(torch, dtype), device=f"cuda:{cuda}")


def refuse_non_finite(name: str, layer: int, tensor: Any) -> None:
    """Raises NonFiniteError if a torch tensor [rows, heads, head_dim] holds a NaN or an infinity.

    Waits for the device.
    """
    import torch

    found = (~torch.isfinite(tensor)).nonzero()
    if len(found):
        token, head, channel = found[0].tolist()
        raise NonFiniteError(
            f"{name} at layer {layer}, token {token}, head {head}, channel {channel}: "
            f"{tensor[token, head, channel].item()}: expected a finite number; find out where it comes from"
        )
