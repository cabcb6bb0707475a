"""kvarn: a quantised KV cache for LLM inference.

The codec (`encode`, `decode`), the cache memory of a model (`Pool`), the cache of
transformers models (`KVarNCache`), their continuous batching (`KVarNBatching`), and the
errors (`kvarn.errors`).
Source of the method: KVarN, arXiv 2606.03458.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvarn._capacity import Capacity, capacity
from kvarn._device import warmup
from kvarn._kvarn import __version__
from kvarn._model_config import CachedLayers, cached_layers
from kvarn.codec import (
    Config,
    EncodeCounts,
    decode,
    encode,
    from_published,
    load_records,
    presets,
    save_records,
    to_published,
)
from kvarn.errors import (
    CapacityError,
    ConfigError,
    CudaError,
    CudaUnavailableError,
    DeviceError,
    DTypeError,
    FormatError,
    KvarnError,
    NonFiniteError,
    ShapeError,
    StateError,
    TensorError,
)
from kvarn.pool import LayerShape, Pool, Sequence, StaticArrays, Stats
from kvarn.prefix import prefix_keys
from kvarn.step import Step

if TYPE_CHECKING:
    from kvarn.integrations.transformers import (
        CapturedDecoder,
        KVarNBatching,
        KVarNCache,
        KVarNStaticCache,
    )

__all__ = [
    "CachedLayers",
    "Capacity",
    "CapacityError",
    "CapturedDecoder",
    "Config",
    "ConfigError",
    "CudaError",
    "CudaUnavailableError",
    "DTypeError",
    "DeviceError",
    "EncodeCounts",
    "FormatError",
    "KVarNBatching",
    "KVarNCache",
    "KVarNStaticCache",
    "KvarnError",
    "LayerShape",
    "NonFiniteError",
    "Pool",
    "Sequence",
    "ShapeError",
    "StateError",
    "StaticArrays",
    "Stats",
    "Step",
    "TensorError",
    "__version__",
    "cached_layers",
    "capacity",
    "decode",
    "encode",
    "from_published",
    "load_records",
    "prefix_keys",
    "presets",
    "save_records",
    "to_published",
    "warmup",
]

# Names that need an optional dependency: imported at first use, so that `import kvarn` works without it.
_LAZY = dict.fromkeys(
    ("CapturedDecoder", "KVarNBatching", "KVarNCache", "KVarNStaticCache"),
    "kvarn.integrations.transformers",
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
