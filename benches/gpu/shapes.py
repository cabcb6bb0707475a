"""Which shapes are measured, and how many bytes they hold: pure, without a GPU."""

from dataclasses import dataclass

PRESETS = ("kvarn_k4v4_g128", "kvarn_k4v2_g128", "kvarn_k3v3_g128", "kvarn_k2v2_g128")

CONTEXTS = (1024, 4096, 16384, 32768, 131072)
BATCHES = (1, 8, 32, 64)

# One shape that is all latency, one of many sequences, one of few long ones.
TYPICAL = ((131072, 1), (4096, 32), (32768, 8))

# Tokens that a context lacks to its full length: the last tile is half full, on an average the truth.
SHORT_OF_CONTEXT = 64


@dataclass(frozen=True)
class Shape:
    """Decode attention of a batch over its cache.

    Attributes:
        heads: query heads.
        kv_heads: KV heads.
        head_dim: channels of a head.
        batch: sequences.
        context: nominal length; each sequence holds SHORT_OF_CONTEXT tokens fewer.
        q_len: query tokens of each sequence, the newest of its tokens.
    """

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int
    q_len: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of each sequence, the queries' included."""
        return self.context - SHORT_OF_CONTEXT

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def elements(self) -> int:
        """Elements of K and V of one layer."""
        return 2 * self.batch * self.tokens * self.kv_heads * self.head_dim

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} D {self.head_dim} q {self.q_len}: {self.batch} × {self.context}"


def main_shapes(contexts=CONTEXTS, batches=BATCHES):
    """Every context with every batch, 32 query heads over 8 KV heads of 128 channels."""
    return [Shape(32, 8, 128, batch, context) for context in contexts for batch in batches]


def sets():
    """The shapes of each set, by name."""

    def typical(heads, kv_heads, head_dim=128, q_len=1):
        return [Shape(heads, kv_heads, head_dim, batch, context, q_len) for context, batch in TYPICAL]

    return {
        "main": main_shapes(),
        "heads": [
            shape
            for heads, kv_heads in ((64, 8), (32, 4), (16, 1), (8, 8))
            for shape in typical(heads, kv_heads)
        ],
        "dims": [shape for head_dim in (64, 96, 256) for shape in typical(32, 8, head_dim)],
        # 16 query columns twice, then 4 and 32.
        "qlen": [
            shape
            for heads, kv_heads, q_len in ((32, 8, 4), (64, 8, 2), (8, 8, 4), (32, 4, 4))
            for shape in typical(heads, kv_heads, q_len=q_len)
        ],
    }


def bytes_to_read(lengths, *, group, sink_tokens, record_bytes, kv_heads, head_dim):
    """Fewest bytes that attention over one layer reads of sequences of these lengths.

    Records of sealed tiles, the sink tokens, and the stored part of the tail. For sinks of a whole tile or
    none, without a recent window, everything committed.
    """
    if sink_tokens not in (0, group):
        raise ValueError(f"sink_tokens {sink_tokens}: expected 0 or the group, {group}; choose one")
    records = tokens = 0
    for length in lengths:
        tiles = length // group
        sealed = max(tiles - (sink_tokens > 0), 0)
        records += sealed
        tokens += length - sealed * group
    return kv_heads * (records * record_bytes + tokens * head_dim * 2 * 2)


def zipf_lengths(count, longest):
    """Lengths of a Zipf law: the one of rank r has longest / r tokens.

    64 sequences from 32768 go down to 512.
    """
    return [longest // rank for rank in range(1, count + 1)]


def even_lengths(count, total):
    """The same number of tokens, evenly split."""
    return [total // count + (index < total % count) for index in range(count)]
