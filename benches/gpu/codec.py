"""Encoding and decoding on a GPU: `python benches/gpu/codec.py [--out FILE]`.

- seal: whole tiles of one long step, encoded from its rows; tile pairs (one of K, one of V) per second, with
  and without refit.
- fill: 64 sequences that all fill a tile with the same token: what append takes in a layer then.
- append: one token for each sequence, nothing sealed.
- expand: a sequence of records to dense fp16, as a fraction of a plain write of as many bytes.
"""

import sys

import kvarn
import torch
from filled import FilledPool
from report import Report, parser
from shapes import PRESETS
from timing import REPLAYS, cold_copies, eager_time, graph_time, host_time, plain_write_time

KV_HEADS = 8
MODEL_LAYERS = 32


def append_time(filled, count, stream, replays):
    """Median µs of append in one layer, of a step of `count` tokens for every sequence.

    The first layer is appended before, so that what the step uploads once is on the device.
    """
    tokens = count * len(filled.sequences)
    k, v = filled.rows(tokens), filled.rows(tokens)
    with torch.cuda.stream(stream):
        step = filled.step(count, captured=True)
        try:
            step.append(0, k, v)
            calls = [lambda layer=layer: step.append(layer, k, v) for layer in range(1, filled.layers)]
            return graph_time(calls, stream, replays=replays, warm=False)
        finally:
            step.abandon()


def seal_row(report, preset, head_dim, refit, stream, *, tiles, replays):
    cfg = kvarn.Config(preset, head_dim=head_dim, refit=refit, sink_tokens=0)
    filled = FilledPool(cfg, [0], kv_heads=KV_HEADS, layers=3, room=(tiles + 1) * cfg.group)
    us = append_time(filled, tiles * cfg.group, stream, replays)
    pairs = tiles * KV_HEADS
    report.row(
        f"seal {preset} D {head_dim} refit {'on ' if refit else 'off'}: {pairs} pairs in {us:.0f} µs, "
        f"{pairs / us:.2f} M pairs/s",
        kind="seal",
        preset=preset,
        head_dim=head_dim,
        refit=refit,
        pairs=pairs,
        us=us,
        pairs_per_s=pairs / us * 1e6,
    )


def fill_row(report, preset, head_dim, refit, stream, *, sequences, replays):
    cfg = kvarn.Config(preset, head_dim=head_dim, refit=refit)
    each = sequences * KV_HEADS * (cfg.record_bytes + cfg.group * head_dim * 4)
    filled = FilledPool(cfg, [3 * cfg.group - 1] * sequences, kv_heads=KV_HEADS, layers=1 + cold_copies(each))
    us = append_time(filled, 1, stream, replays)
    report.row(
        f"fill {preset} D {head_dim} refit {'on ' if refit else 'off'}: {sequences} sequences fill a tile: "
        f"{us / 1e3:.3f} ms a layer, {us * MODEL_LAYERS / 1e3:.1f} ms in {MODEL_LAYERS} layers, "
        f"{sequences * KV_HEADS / us:.2f} M pairs/s",
        kind="fill",
        preset=preset,
        head_dim=head_dim,
        refit=refit,
        sequences=sequences,
        us=us,
        pairs_per_s=sequences * KV_HEADS / us * 1e6,
    )


def append_row(report, preset, sequences, stream, *, replays):
    cfg = kvarn.Config(preset, head_dim=128)
    filled = FilledPool(
        cfg, [2 * cfg.group + cfg.group // 2] * sequences, kv_heads=KV_HEADS, layers=1 + MODEL_LAYERS
    )
    us = append_time(filled, 1, stream, replays)
    report.row(
        f"append {preset}: a token of {sequences} sequences: {us:.2f} µs a layer",
        kind="append",
        preset=preset,
        sequences=sequences,
        us=us,
    )


def expand_row(report, preset, head_dim, stream, *, tokens, repeats):
    cfg = kvarn.Config(preset, head_dim=head_dim)
    layers = 2
    with torch.cuda.stream(stream):
        filled = FilledPool(cfg, [tokens], kv_heads=KV_HEADS, layers=layers)
        like = torch.empty(0, device="cuda", dtype=torch.float16)

        def expand(index):
            filled.pool.expand(filled.sequences[0], index % layers, like=like)

        host_us = host_time(lambda: expand(0), 50)
        us = eager_time(expand, 8, stream, repeats=repeats)
    written = tokens * KV_HEADS * head_dim * 2 * 2
    plain = plain_write_time(written, stream)
    report.row(
        f"expand {preset} D {head_dim}: {tokens} tokens in {us:.1f} µs, "
        f"{written / us / 1e3:.0f} GB/s written, {plain / us:.2f} of a plain write, host {host_us:.1f} µs",
        kind="expand",
        preset=preset,
        head_dim=head_dim,
        tokens=tokens,
        us=us,
        bytes_written=written,
        plain_write_us=plain,
        of_plain_write=plain / us,
        host_us=host_us,
    )


def main():
    arguments = parser(__doc__).parse_args()
    report = Report(arguments, "gpu/codec.py")
    kvarn.warmup()
    stream = torch.cuda.Stream()
    small = arguments.small
    replays = 5 if small else 20
    k4v2 = "kvarn_k4v2_g128"
    presets = [k4v2] if small else PRESETS
    for preset in presets:
        for head_dim in (128, 64, 96, 256) if preset == k4v2 and not small else (128,):
            for refit in (False, True):
                with report.part(f"seal {preset} D {head_dim} refit {refit}"):
                    tiles = 64 if small else 1024
                    seal_row(report, preset, head_dim, refit, stream, tiles=tiles, replays=replays)
    for preset in presets:
        for refit in (False, True):
            with report.part(f"fill {preset} refit {refit}"):
                fill_row(report, preset, 128, refit, stream, sequences=8 if small else 64, replays=REPLAYS)
    for sequences in (1, 8, 32, 64):
        with report.part(f"append {sequences}"):
            append_row(report, k4v2, sequences, stream, replays=REPLAYS)
    for preset in presets:
        for head_dim in (128, 64, 96, 256) if preset == k4v2 and not small else (128,):
            with report.part(f"expand {preset} D {head_dim}"):
                tokens = (8192 if small else 131072) * 128 // head_dim
                expand_row(report, preset, head_dim, stream, tokens=tokens, repeats=replays)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
