"""kvarn: a quantised KV cache for LLM inference.

The codec (`encode`, `decode`), the cache memory of a model (`Pool`), and their errors (`kvarn.errors`).
Source of the method: KVarN, arXiv 2606.03458.
"""

from kvarn._kvarn import __version__
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
    DeviceError,
    DTypeError,
    FormatError,
    KvarnError,
    NonFiniteError,
    ShapeError,
    StateError,
    TensorError,
)
from kvarn.pool import LayerShape, Pool, Sequence, Stats
from kvarn.step import Step

__all__ = [
    "CapacityError",
    "Config",
    "ConfigError",
    "DTypeError",
    "DeviceError",
    "EncodeCounts",
    "FormatError",
    "KvarnError",
    "LayerShape",
    "NonFiniteError",
    "Pool",
    "Sequence",
    "ShapeError",
    "StateError",
    "Stats",
    "Step",
    "TensorError",
    "__version__",
    "decode",
    "encode",
    "from_published",
    "load_records",
    "presets",
    "save_records",
    "to_published",
]
