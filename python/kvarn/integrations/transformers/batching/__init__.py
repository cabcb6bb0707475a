"""transformers' continuous batching over one kvarn pool."""

from kvarn.integrations.transformers.batching.api import KVarNBatching
from kvarn.integrations.transformers.batching.attention import register

register()

__all__ = ["KVarNBatching"]
