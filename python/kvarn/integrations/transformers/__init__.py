"""The kvarn pool as a transformers cache, and its attention function, registered as ``"kvarn"``.

Importing this package, as the first use of `kvarn.KVarNCache` does, registers ``"kvarn"`` with transformers'
attention and mask interfaces::

    from kvarn import KVarNCache

    model.set_attn_implementation("kvarn")
    model.generate(**inputs, past_key_values=KVarNCache(model.config, "kvarn_k4v2_g128"))

The cache gives the same result under every other attention implementation, where it builds dense tensors at
each step; ``KVarNCache.materializations`` counts them.

`kvarn.KVarNBatching` serves many prompts by transformers' continuous batching.
"""

from kvarn.integrations.transformers.attention import register
from kvarn.integrations.transformers.batching import KVarNBatching
from kvarn.integrations.transformers.cache import KVarNCache
from kvarn.integrations.transformers.captured import CapturedDecoder
from kvarn.integrations.transformers.errors import UnsupportedError
from kvarn.integrations.transformers.static_cache import KVarNStaticCache

register()

__all__ = ["CapturedDecoder", "KVarNBatching", "KVarNCache", "KVarNStaticCache", "UnsupportedError"]
