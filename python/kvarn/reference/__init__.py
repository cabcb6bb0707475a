"""The codec and the pool in plain NumPy: the executable specification of kvarn.

Written to be read, and to be compared with: everything fast (Rust, CUDA) is tested against it. It needs NumPy
only, is float32 where the format says float32, and computes attention in float64. Source of the method:
KVarN, arXiv 2606.03458.

Start with `codec` (tiles to records), then `matrix` (one matrix), which names the steps in order:
`normalization`, `rounding`, `refit`, `guard`; `layout` says where the bits lie, `pool` when a tile is sealed
and `contract` when two implementations agree.
"""

from kvarn.reference.attention import attend
from kvarn.reference.codec import decode, encode
from kvarn.reference.contract import Verdict, judge, mismatch_rate
from kvarn.reference.pool import Pool, Sequence, Step
from kvarn.reference.published import from_published, published_bytes, to_published
from kvarn.reference.rotation import rotate
from kvarn.reference.rounding import Counts
from kvarn.reference.settings import Settings

__all__ = [
    "Counts",
    "Pool",
    "Sequence",
    "Settings",
    "Step",
    "Verdict",
    "attend",
    "decode",
    "encode",
    "from_published",
    "judge",
    "mismatch_rate",
    "published_bytes",
    "rotate",
    "to_published",
]
