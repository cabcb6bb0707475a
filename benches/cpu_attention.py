"""Attention over packed K and V beside torch's on this CPU: `python benches/cpu_attention.py [--out FILE]`.

- decode: one query token, each preset beside three ways to compute attention over dense K and V, in three
  types each (benches/cpu/peers.py). What a row is compared with is the fastest of the nine.
- growth: time for each token at the longest context over that at a shorter one.
- prefill: a chunk of 512 query tokens behind a packed history, beside SDPA.
- expand: attend beside decoding the records and calling SDPA.

All in one process with the same threads: medians of alternating runs, each over cold memory
(benches/cpu/timing.py). Peers and kvarn are checked against float64 on a small shape first.
"""

import sys

import torch
from cpu import packed, peers, processor, tables
from cpu.timing import COLD_BYTES, Alternation
from gpu.report import Report, parser
from gpu.shapes import PRESETS, SHORT_OF_CONTEXT, Shape, bytes_to_read
from torch.nn.functional import scaled_dot_product_attention

HEADS = 32
CONTEXTS, BATCHES = (4096, 16384, 65536), (1, 4)
HISTORY, CHUNK = 16384, 512
EXPANDED = "kvarn_k4v2_g128"
# Tokens of the sequence that wakes kvarn's threads.
WAKE_TOKENS = 4096


def shape_of(batch, context, q_len=1):
    return Shape(HEADS, packed.KV_HEADS, packed.HEAD_DIM, batch, context, q_len)


def prefill_shape(history, chunk):
    """A chunk behind a history of exactly so many tokens."""
    return shape_of(1, history + chunk + SHORT_OF_CONTEXT, chunk)


class Attending:
    """Open steps of pools of several presets, and calls that attend in them."""

    def __init__(self, pools, shape):
        self.steps = {}
        q = torch.randn(shape.batch * shape.q_len, shape.heads, shape.head_dim, dtype=torch.float16)
        out = torch.empty_like(q)
        for preset, pool in pools.items():
            pool.truncate(shape.tokens - shape.q_len)
            self.steps[preset] = pool.step(shape.batch, shape.q_len)
        self.calls = {
            preset: lambda step=step: step.attend(0, q, out=out) for preset, step in self.steps.items()
        }
        self._awake = packed.Packed(EXPANDED, WAKE_TOKENS, 1).step(1, 1)
        token = torch.randn(1, shape.heads, shape.head_dim, dtype=torch.float16)
        self.wakes = dict.fromkeys(self.calls, lambda: self._awake.attend(0, token))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for step in (*self.steps.values(), self._awake):
            step.abandon()


def shape_rows(report, kind, pools, shape, ways, compared, arguments):
    """Rows of every preset at a shape, beside the peers of the types `compared`."""
    turns = Alternation(arguments.runs, arguments.cold_bytes)
    names = []
    with Attending(pools, shape) as attending:
        for dtype_name, dtype in peers.DTYPES.items():
            # One type at a time: float32 takes gigabytes. kvarn takes its turns with each.
            dense = peers.Dense(shape, dtype)
            calls = {f"{way} {dtype_name}": dense.call(way) for way in ways}
            names += calls
            turns.run(calls | attending.calls, attending.wakes)
            del dense, calls
    times = {name: turns.us(name) for name in names}
    peer = min((name for name in names if name.endswith(compared)), key=times.get)
    listed = ", ".join(f"{name} {us / 1e3:.2f}" for name, us in times.items())
    print(f"{kind} {shape}: peers ms: {listed}", flush=True)
    for preset, pool in pools.items():
        must = bytes_to_read(
            [shape.tokens] * shape.batch,
            group=pool.cfg.group,
            sink_tokens=pool.cfg.sink_tokens,
            record_bytes=pool.cfg.record_bytes,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
        us = turns.us(preset)
        of_read = must / us * 1e6 / turns.read_bytes_per_s
        report.row(
            f"{kind} {preset} {shape}: {us / 1e3:.2f} ms, {times[peer] / us:.2f} × {peer}, "
            f"{of_read:.2f} of a plain read",
            kind=kind,
            preset=preset,
            **vars(shape),
            tokens=shape.tokens,
            us=us,
            bytes=must,
            plain_read_gb_per_s=turns.read_bytes_per_s / 1e9,
            of_plain_read=of_read,
            peer=peer,
            times_peer=times[peer] / us,
            peers=times,
        )


def growth_rows(report):
    """Time for each token at the longest context, over that at the one before, for each preset and batch."""
    groups = {}
    for row in report.rows:
        if row["kind"] == "decode":
            groups.setdefault((row["preset"], row["batch"]), []).append(row)
    for (preset, batch), rows in groups.items():
        if len(rows) < 2:
            continue
        shorter, longest = sorted(rows, key=lambda row: row["context"])[-2:]
        ratio = (longest["us"] / longest["tokens"]) / (shorter["us"] / shorter["tokens"])
        report.row(
            f"growth {preset} batch {batch}: a token of {longest['context']} takes {ratio:.2f} × the time of "
            f"one of {shorter['context']}",
            kind="growth",
            preset=preset,
            batch=batch,
            shorter=shorter["context"],
            longest=longest["context"],
            ratio=ratio,
        )


def expand_row(report, pools, shape, arguments):
    """Attend beside decoding the records and calling SDPA, in the two types in which that is fast."""
    turns = Alternation(arguments.runs, arguments.cold_bytes)
    calls = {}
    with Attending({EXPANDED: pools[EXPANDED]}, shape) as attending:
        step = attending.steps[EXPANDED]
        for name in ("fp32", "bf16"):
            calls[name] = expand_call(step, shape, peers.DTYPES[name])
        wake = attending.wakes[EXPANDED]
        turns.run(attending.calls | calls, attending.wakes | dict.fromkeys(calls, wake))
    us, (dense_us, name) = turns.us(EXPANDED), min((turns.us(name), name) for name in calls)
    report.row(
        f"expand {EXPANDED} {shape}: attend {us / 1e3:.2f} ms, decode then SDPA in {name} "
        f"{dense_us / 1e3:.2f} ms: {dense_us / us:.2f} ×",
        kind="expand",
        preset=EXPANDED,
        **vars(shape),
        tokens=shape.tokens,
        us=us,
        decode_then_sdpa_us={name: turns.us(name) for name in calls},
        times=dense_us / us,
    )


def expand_call(step, shape, dtype):
    like = torch.empty(0, dtype=dtype)
    folded = shape.kv_heads, shape.group * shape.q_len, shape.head_dim
    q = torch.randn(folded, dtype=dtype)[None]
    bias = None if shape.q_len == 1 else peers.causal_bias(shape, dtype).repeat(shape.group, 1)

    def call():
        k, v = (x.transpose(0, 1)[None] for x in step.expand(0, 0, like=like))
        return scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return call


def check(presets, shapes):
    """Compare every preset and peer with float64."""
    for shape in shapes:
        errors = {
            f"{way} {dtype}": peers.check(shape, dtype, way) for way in peers.WAYS for dtype in peers.DTYPES
        }
        errors |= {preset: packed.check(preset, shape.heads, shape.q_len) for preset in presets}
        listed = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
        print(f"checked, {shape.q_len} query tokens, error against float64: {listed}", flush=True)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    arguments.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    arguments.add_argument("--presets", nargs="+", default=PRESETS)
    arguments.add_argument("--runs", type=int, default=7, help="timed runs of each call beside each type")
    arguments.add_argument("--threads", type=int, default=processor.THREADS)
    arguments = arguments.parse_args()
    history, chunk, arguments.cold_bytes = HISTORY, CHUNK, COLD_BYTES
    if arguments.small:
        history, chunk, arguments.cold_bytes = 512, 64, 1 << 20
        arguments.contexts, arguments.batches, arguments.runs = [512, 1024], [1, 2], 2
    processor.use_threads(arguments.threads)
    neighbours = processor.Neighbours()
    report = Report(arguments, "cpu_attention.py", processor.name(), **processor.facts(arguments.threads))
    torch.manual_seed(0)
    prefill = prefill_shape(history, chunk)
    with report.part("check"):
        check(arguments.presets, [shape_of(1, 4096), prefill])
    if report.failed:
        return report.close()
    longest = max(*arguments.contexts, prefill.context)
    pools = {preset: packed.Packed(preset, longest, max(arguments.batches)) for preset in arguments.presets}
    # From long to short: sequences are cut, not filled again.
    contexts = sorted(arguments.contexts, reverse=True)
    behind = [context for context in contexts if context >= prefill.context]
    for context in behind:
        decode_rows(report, pools, context, arguments)
    with report.part("prefill"):
        shape_rows(report, "prefill", pools, prefill, peers.WAYS[:2], ("bf16", "fp16"), arguments)
    if EXPANDED in pools:
        with report.part("expand prefill"):
            expand_row(report, pools, prefill, arguments)
    for context in contexts[len(behind) :]:
        decode_rows(report, pools, context, arguments)
        if EXPANDED in pools:
            with report.part(f"expand {context}"):
                expand_row(report, pools, shape_of(1, context), arguments)
    growth_rows(report)
    tables.show(report, "cpu_attention", neighbours)
    return report.close()


def decode_rows(report, pools, context, arguments):
    for batch in arguments.batches:
        shape = shape_of(batch, context)
        with report.part(f"decode {shape}"):
            shape_rows(report, "decode", pools, shape, peers.WAYS, tuple(peers.DTYPES), arguments)


if __name__ == "__main__":
    sys.exit(main())
