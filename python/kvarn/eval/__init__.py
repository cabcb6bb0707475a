"""How far a quantised cache moves a model from what it does with a dense one.

Needs torch and transformers (`kvarn[transformers]`).
"""

from kvarn.eval.arms import Arm, dense_arm, kvarn_arm
from kvarn.eval.dense import DENSE_DTYPES, dense_cache
from kvarn.eval.divergence import Divergence, divergence
from kvarn.eval.memory import CacheBytes, cache_bytes, sixteen_bit_bytes

__all__ = [
    "DENSE_DTYPES",
    "Arm",
    "CacheBytes",
    "Divergence",
    "cache_bytes",
    "dense_arm",
    "dense_cache",
    "divergence",
    "kvarn_arm",
    "sixteen_bit_bytes",
]
