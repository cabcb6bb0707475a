"""The compiled pool against the NumPy reference pool on random steps: moments, values and attention."""

from dataclasses import dataclass

import kvarn
import numpy as np
import pytest
from kvarn import Config, reference

LAYERS, KV_HEADS, HEADS, GROUP, HEAD_DIM = 2, 2, 6, 64, 32
COUNTS = [0, 1, 1, 1, 2, 5, 17, 63, 64, 65, 130, 200]
# Relative L2 of a tile. At 8 bit a code on the other side of a rounding boundary moves it by less than this,
# and a tile that is a record in one pool and a slot in the other by more: rounding alone costs about 6e-3.
VALUES = 3e-3
# Attention, ‖o - o'‖ / ‖o'‖ per head. The parameters of the two encoders may be half an ulp apart, 5e-4 of a
# value, which weighs more where outputs nearly cancel.
MEDIAN, WORST = 7e-4, 2e-2


@dataclass(eq=False)
class Pair:
    """One sequence in both pools."""

    own: kvarn.Sequence
    twin: reference.Sequence


class Pools:
    """Both pools, driven alike."""

    def __init__(self, cfg, dtype, seed):
        self.cfg, self.dtype = cfg, dtype
        self.own = kvarn.Pool(cfg, layers=LAYERS, kv_heads=KV_HEADS, pages=128, slots=64, dtype=dtype)
        self.twin = reference.Pool(cfg, LAYERS, KV_HEADS, dtype)
        self.rng = np.random.default_rng(seed)
        self.live, self.errors, self.lse_differences = [], [], []
        self.tokens = self.sealed = 0

    def rows(self, count, heads):
        return self.rng.standard_normal((count, heads, HEAD_DIM)).astype(self.dtype)

    def create(self):
        self.live.append(Pair(self.own.create(), self.twin.create()))

    def step(self):
        size = int(self.rng.integers(1, len(self.live) + 1))
        batch = [self.live[i] for i in self.rng.permutation(len(self.live))[:size]]
        counts = [int(self.rng.choice(COUNTS)) for _ in batch]
        holds = [
            int(self.rng.integers(0, min(count, 5) + 1)) if self.rng.random() < 0.4 else 0 for count in counts
        ]
        steps = (
            self.own.step([one.own for one in batch], counts, holds),
            self.twin.step([one.twin for one in batch], counts, holds),
        )
        abandon = self.rng.random() < 0.1
        for layer in range(LAYERS):
            q, k, v = (self.rows(sum(counts), heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
            if self.rng.random() < 0.3:
                self.attend(steps, layer, q)
            for step in steps:
                step.append(layer, k, v)
            self.attend(steps, layer, q)
        if abandon:
            steps[0].abandon()
        else:
            for step in steps:
                step.finish()
            self.tokens += sum(counts)
        self.check()

    def attend(self, steps, layer, q):
        options = {"return_lse": True, "rotated": bool(self.rng.integers(2))}
        if self.rng.random() < 0.5:
            options["window"] = int(self.rng.integers(1, 200))
        if self.rng.random() < 0.3:
            options["softcap"] = 4.0
        if self.rng.random() < 0.3:
            options["scale"] = 0.4
        if self.rng.random() < 0.3:
            options["sink_logits"] = self.rng.standard_normal(HEADS).astype(np.float32)
        (own, own_lse), (twin, twin_lse) = (step.attend(layer, q, **options) for step in steps)
        # A tile of which the encoders took different iterates (docs/codec.md) moves a logit by thousandths.
        differs = own_lse != twin_lse  # not where both are minus infinity
        difference = np.abs(own_lse[differs] - twin_lse[differs]) / (5e-3 + 1e-3 * np.abs(twin_lse[differs]))
        assert difference.max(initial=0) <= 3
        self.lse_differences.append(difference)
        floor = 1e-3 * np.sqrt(HEAD_DIM)
        norms = np.linalg.norm(twin, axis=-1)
        error = np.linalg.norm(own.astype(np.float64) - twin, axis=-1) / np.maximum(norms, floor)
        assert error.max(initial=0) <= WORST
        self.errors.append(error.ravel())

    def truncate(self):
        """Cuts anywhere in the last five tiles; what is decoded is what was read of the record."""
        pair = self.live[int(self.rng.integers(len(self.live)))]
        length = int(self.rng.integers(max(0, pair.twin.length - 5 * GROUP), pair.twin.length + 1))
        first, unsealed = length // GROUP * GROUP, self.twin.unsealed
        stored = [self.own.expand(pair.own, layer, rotated=True) for layer in range(LAYERS)]
        self.own.truncate(pair.own, length)
        self.twin.truncate(pair.twin, length)
        assert self.own.stats().unsealed == self.twin.unsealed
        self.check()
        if self.twin.unsealed == unsealed:
            return
        for layer, before in enumerate(stored):
            after = self.own.expand(pair.own, layer, rotated=True)
            for old, new in zip(before, after, strict=True):
                np.testing.assert_array_equal(new, old[:length])
            # The records of the two pools may be half an ulp apart, which is not to decide codes later.
            twin = pair.twin.layers[layer]
            for mine, values in zip(after, (twin.k, twin.v), strict=True):
                values[first:] = mine[first:]

    def free(self):
        pair = self.live.pop(int(self.rng.integers(len(self.live))))
        self.own.free(pair.own)
        self.twin.free(pair.twin)

    def check(self):
        for pair in self.live:
            own, twin = pair.own, pair.twin
            assert (own.length, own.committed) == (twin.length, twin.committed)
            blocks = np.flatnonzero(np.from_dlpack(own.block_table) >= 0)
            assert blocks.tolist() == list(twin.sealed)
            self.sealed = max(self.sealed, len(blocks))
            for layer in range(LAYERS):
                for mine, wanted in zip(
                    self.own.expand(own, layer, rotated=True),
                    self.twin.expand(twin, layer, rotated=True),
                    strict=True,
                ):
                    assert mine.shape == wanted.shape
                    for start in range(0, len(mine), GROUP):
                        tile = slice(start, start + GROUP)
                        distance = np.linalg.norm(mine[tile] - wanted[tile]) / np.linalg.norm(wanted[tile])
                        assert distance <= VALUES, (layer, start, distance)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("recent_tokens", [0, 40, 150])
@pytest.mark.parametrize("sink_tokens", [0, 16, 64])
def test_random_steps(sink_tokens, recent_tokens, dtype):
    cfg = Config(
        head_dim=HEAD_DIM,
        key_bits=8,
        value_bits=8,
        group=GROUP,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
    )
    pools = Pools(cfg, dtype, seed=sink_tokens * 1000 + recent_tokens)
    for _ in range(3):
        pools.create()
    for _ in range(30):
        action = pools.rng.random()
        if action < 0.2:
            pools.truncate()
        elif action < 0.25 and len(pools.live) > 1:
            pools.free()
        elif action < 0.35 and len(pools.live) < 4:
            pools.create()
        else:
            pools.step()
    assert pools.sealed >= 2
    errors, lse = np.concatenate(pools.errors), np.concatenate(pools.lse_differences)
    print(
        f"S {sink_tokens}, R {recent_tokens}, {dtype}: {pools.tokens} tokens, up to {pools.sealed} records, "
        f"{pools.twin.unsealed} unsealed; "
        f"attention differs by median {np.median(errors):.1e}, at most {errors.max():.1e}; "
        f"log-sum-exps by at most {lse.max():.1f} tolerances, more than one: {(lse > 1).mean():.1e} of them"
    )
    assert (lse > 1).mean() <= 1e-3
    assert np.median(errors) <= MEDIAN
