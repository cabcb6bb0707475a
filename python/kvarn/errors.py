"""Errors of kvarn.

Every text names the offending value, what was expected, and the fix. A call that raises has changed nothing.
"""

from __future__ import annotations


class KvarnError(Exception):
    """Base of all errors of kvarn.

    Raised itself only for an internal error, which is a bug of kvarn.
    """


class ConfigError(KvarnError, ValueError):
    """A configuration that is not supported: name, bits, group, head dim, sinks, window, iterations."""


class ShapeError(KvarnError, ValueError):
    """A shape, stride, count, index or other number that does not fit."""


class DTypeError(KvarnError, TypeError):
    """An element type, or a kind of object, that is not supported here."""


class TensorError(KvarnError, ValueError):
    """A tensor that cannot be used: it requires grad, is read-only, or its DLPack capsule is foreign."""


class DeviceError(TensorError):
    """A tensor, or a request, for a device that this build does not serve."""


class NonFiniteError(TensorError):
    """A NaN or an infinity in a tensor that was to be checked."""


class FormatError(KvarnError, ValueError):
    """A format that cannot be read or written: a truncated or corrupted file, another version."""


class CapacityError(KvarnError, RuntimeError):
    """Too few free pages or slots. The call works again once enough of them are free."""


class StateError(KvarnError, RuntimeError):
    """A call in the wrong state: a freed or foreign sequence, a finished step."""


class CudaError(KvarnError, RuntimeError):
    """CUDA failed, or was used in an order that has no meaning."""


class CudaUnavailableError(CudaError):
    """CUDA cannot be used here: no driver, no device, a driver too old, no kernel for the device."""
