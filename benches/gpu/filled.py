"""A pool whose layers all hold random tokens of the same sequences, put there by append."""

import kvarn
import torch

# Rows of one step: enough to fill the device, few enough to lie in memory beside a large cache.
ROWS = 65536


class FilledPool:
    """Sequences of given lengths in every layer of a pool.

    Args:
        cfg: the configuration.
        lengths: tokens of each sequence.
        kv_heads: KV heads of every layer.
        layers: layers.
        room: tokens that each sequence can still take.
        device: "cuda", or "cpu" to look at the tables.

    Attributes:
        pool: the pool.
        sequences: its sequences.
    """

    def __init__(self, cfg, lengths, *, kv_heads, layers, room=256, device="cuda"):
        self.cfg, self.kv_heads, self.layers = cfg, kv_heads, layers
        self.pool = kvarn.Pool(
            cfg,
            layers=layers,
            kv_heads=kv_heads,
            pages=sum(-(-(length + room) // cfg.group) for length in lengths),
            # A sequence needs three; with a first chunk that is no whole tile, one more in passing.
            slots=4 * len(lengths),
            device=device,
        )
        self.sequences = [self.pool.create() for _ in lengths]
        self.device = device
        self.arrays = None
        self._fill(list(lengths))

    def rows(self, count):
        """Random keys or values, [count, kv_heads, head_dim]."""
        return torch.randn(count, self.kv_heads, self.cfg.head_dim, device=self.device, dtype=torch.float16)

    def step(self, count, *, captured=False):
        """An open step of `count` new tokens for every sequence.

        With `captured` its calls may be captured, once one of each kind has run; then it cannot be finished,
        only abandoned.
        """
        counts = [count] * len(self.sequences)
        if captured:
            longest = max(sequence.length for sequence in self.sequences) + count
            self.arrays = self.pool.static_arrays(counts, tokens=longest)  # kept as long as a graph
        return self.pool.step(self.sequences, counts, arrays=self.arrays if captured else None)

    def _fill(self, missing):
        group = self.cfg.group
        chunk = max(1, ROWS // len(missing) // group) * group
        k, v = (self.rows(min(len(missing) * chunk, sum(missing))) for _ in range(2))
        while any(missing):
            live = [index for index, count in enumerate(missing) if count]
            counts = [min(chunk, missing[index]) for index in live]
            with self.pool.step([self.sequences[index] for index in live], counts) as step:
                for layer in range(self.layers):
                    step.append(layer, k[: sum(counts)], v[: sum(counts)])
            for index, count in zip(live, counts, strict=True):
                missing[index] -= count
