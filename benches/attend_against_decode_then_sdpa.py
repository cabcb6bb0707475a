"""Attention over records against decoding them and calling torch's attention, in one process.

    python benches/attend_against_decode_then_sdpa.py

Both sides read the same records, of one layer of one sequence without sinks, with the same threads. `kvarn`
is `step.attend` after `append`; `decode` is `kvarn.decode` of all records, then torch's attention over them
and the new tokens, which are ready as a dense tail. Medians of alternating runs. Exits with 1 where kvarn is
the slower one.
"""

import argparse
import statistics
import sys
import time

import kvarn
import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, HEAD_DIM, GROUP = 32, 8, 128, 128


class Case:
    """One context of sealed tiles and the tokens of one step after it.

    Args:
        context: tokens in records, a multiple of the group.
        tokens: new tokens, fewer than the group or as many.
        bits: name of the preset.
    """

    def __init__(self, context, tokens, preset):
        # With a recent window of a group the new tokens stay in slots, so that `append` seals nothing.
        self.cfg = kvarn.Config(preset, head_dim=HEAD_DIM, sink_tokens=0, recent_tokens=GROUP)
        rng = np.random.default_rng(0)
        shape = (context + GROUP, KV_HEADS, HEAD_DIM)
        k, v = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for _ in range(2))
        self.q = torch.from_numpy(rng.standard_normal((tokens, HEADS, HEAD_DIM), dtype=np.float32))
        tiles = context // GROUP
        pool = kvarn.Pool(self.cfg, layers=1, kv_heads=KV_HEADS, pages=tiles + 1, slots=8, dtype="float32")
        self.pool, self.sequence = pool, pool.create()
        with pool.step([self.sequence], [context + GROUP]) as step:
            step.append(0, k, v)
        pool.truncate(self.sequence, context)
        pages = np.from_dlpack(self.sequence.block_table)[:tiles]
        assert (pages >= 0).all()
        self.records = torch.from_dlpack(pool.pages[0])[pages.tolist()].reshape(-1, self.cfg.record_bytes)
        self.k, self.v = k[context : context + tokens], v[context : context + tokens]
        self.step = pool.step([self.sequence], [tokens])
        self.step.append(0, self.k, self.v)
        self.mask = torch.ones(tokens, context + tokens, dtype=torch.bool).tril(context)

    def attend(self):
        return self.step.attend(0, self.q)

    def decode_then_sdpa(self):
        decoded = kvarn.decode(self.records, self.cfg)
        # Records lie [tiles, kv_heads]; torch wants [1, kv_heads, tokens, head_dim].
        k, v = (
            torch.cat(
                (x.view(-1, KV_HEADS, GROUP, HEAD_DIM).transpose(0, 1).flatten(1, 2), new.transpose(0, 1)), 1
            )
            for x, new in zip(decoded, (self.k, self.v), strict=True)
        )
        mask = None if len(self.q) == 1 else self.mask
        out = scaled_dot_product_attention(
            self.q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def medians(self, runs):
        """Seconds of `attend` and of `decode_then_sdpa`, after checking that they agree."""
        own, other = self.attend(), self.decode_then_sdpa()
        error = float((own - other).norm() / other.norm())
        if error > 2e-3:
            sys.exit(f"outputs differ by {error:.1e}: expected at most 2e-3")
        seconds = [], []
        for _ in range(runs):
            for times, call in zip(seconds, (self.attend, self.decode_then_sdpa), strict=True):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
        return tuple(statistics.median(times) for times in seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="kvarn_k4v2_g128")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(kvarn._kvarn.threads())
    print(
        f"{arguments.preset}, {HEADS}/{KV_HEADS} heads, D {HEAD_DIM}, float32, "
        f"{torch.get_num_threads()} threads, medians of {arguments.runs}"
    )
    print(f"{'context':>8} {'tokens':>7} {'kvarn ms':>10} {'decode ms':>10} {'decode / kvarn':>15}")
    slower = False
    for context in arguments.contexts:
        for tokens in arguments.tokens:
            own, other = Case(context, tokens, arguments.preset).medians(arguments.runs)
            slower |= own > other
            print(f"{context:>8} {tokens:>7} {own * 1e3:>10.2f} {other * 1e3:>10.2f} {other / own:>15.2f}")
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
