"""Decode attention beside its peers: `python benches/gpu/attend.py [--set main] [--out FILE]`.

For each shape and preset: one launch of attend in a layer of a pool (rotations, sinks, tail and merge
included), beside a plain read of the bytes it must read and every peer of benches/gpu/peers over as many
tokens. Peers are first checked against float64. Correctness of kvarn itself is the business of
tests/gpu/check.py. The set "ragged" compares 64 sequences of Zipf-distributed lengths with the same tokens
evenly split.
"""

import random
import sys

import kvarn
import torch
from filled import FilledPool
from peers import all_peers
from peers.peer import Peers, fastest
from report import Report, parser
from shapes import PRESETS, Shape, bytes_to_read, even_lengths, sets, zipf_lengths
from timing import REPLAYS, cold_copies, graph_time, host_time, plain_read_time

SMALL = [Shape(32, 8, 128, 1, 1024), Shape(32, 8, 128, 2, 4096, 4)]
RAGGED_COUNT, RAGGED_LONGEST = 64, 32768


def attend_row(preset, lengths, *, heads, kv_heads, head_dim, q_len, stream, replays):
    """Times of attend over sequences of these lengths, the `q_len` query tokens included."""
    cfg = kvarn.Config(preset, head_dim=head_dim)
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim}
    must = bytes_to_read(
        lengths, group=cfg.group, sink_tokens=cfg.sink_tokens, record_bytes=cfg.record_bytes, **sizes
    )
    layers = cold_copies(must)
    with torch.cuda.stream(stream):
        filled = FilledPool(cfg, [length - q_len for length in lengths], kv_heads=kv_heads, layers=layers)
        step = filled.step(q_len, captured=True)
        tokens = q_len * len(lengths)
        k, v = filled.rows(tokens), filled.rows(tokens)
        q = torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.float16)
        for layer in range(layers):
            step.append(layer, k, v)
        out = torch.empty_like(q)
        host_us = host_time(lambda: step.attend(0, q, out=out))
        calls = [lambda layer=layer: step.attend(layer, q) for layer in range(layers)]
        us = graph_time(calls, stream, replays=replays)
        step.abandon()
    plain = plain_read_time(must, stream)
    return {
        "preset": preset,
        "us": us,
        "bytes": must,
        "gb_per_s": must / us / 1e3,
        "plain_read_us": plain,
        "of_plain_read": plain / us,
        "attend_host_us": host_us,
    }


def shape_rows(report, shape, presets, peers, stream, replays, skip):
    """One row for each preset, beside the peers."""
    times = peers.times(shape, stream, replays, skip)
    # Pools take their memory from the driver, past torch.
    torch.cuda.empty_cache()
    name, us = fastest(times)
    listed = ", ".join(f"{peer} {entry['us']:.1f}" for peer, entry in times.items())
    print(f"{shape}: peers µs: {listed or 'none'}", flush=True)
    for preset in presets:
        with report.part(f"{preset} {shape}"):
            row = attend_row(
                preset,
                [shape.tokens] * shape.batch,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                q_len=shape.q_len,
                stream=stream,
                replays=replays,
            )
            times_peer = us / row["us"] if us else None
            beside = f"{times_peer:5.2f} × {name} ({us:.1f} µs)" if us else "no fp16 peer"
            report.row(
                f"{preset} {shape}: {row['us']:7.1f} µs, {row['gb_per_s']:5.0f} GB/s, "
                f"{row['of_plain_read']:.2f} of plain read, {beside}, host {row['attend_host_us']:.1f} µs",
                **vars(shape),
                tokens=shape.tokens,
                fp16_bytes=2 * shape.elements,
                **row,
                peer=name,
                peer_us=us,
                times_peer=times_peer,
                peers={peer: entry["us"] for peer, entry in times.items()},
                peers_hold={peer: entry["holds"] for peer, entry in times.items()},
            )


def ragged_row(report, preset, count, longest, stream, replays):
    """A ragged batch against the same tokens evenly split."""
    ragged = zipf_lengths(count, longest)
    random.Random(0).shuffle(ragged)
    sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128, "q_len": 1, "stream": stream, "replays": replays}
    rows = [attend_row(preset, x, **sizes) for x in (ragged, even_lengths(count, sum(ragged)))]
    of_even = rows[1]["us"] / rows[0]["us"]
    report.row(
        f"{preset} ragged: {count} sequences of {min(ragged)} to {max(ragged)} tokens {rows[0]['us']:.1f} µs "
        f"({rows[0]['gb_per_s']:.0f} GB/s), evenly split {rows[1]['us']:.1f} µs "
        f"({rows[1]['gb_per_s']:.0f} GB/s): {of_even:.2f} of its speed",
        preset=preset,
        lengths=ragged,
        ragged=rows[0],
        even=rows[1],
        of_even=of_even,
    )


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--set", choices=[*sets(), "ragged", "all"], default="main", dest="chosen")
    arguments.add_argument("--contexts", type=int, nargs="+", help="only these contexts")
    arguments.add_argument("--batches", type=int, nargs="+", help="only these batches")
    arguments.add_argument("--presets", nargs="+", default=PRESETS)
    arguments.add_argument("--no-peers", action="store_true", help="kvarn alone")
    arguments.add_argument(
        "--flex",
        choices=["none", "few", "all"],
        default="few",
        help="flex_attention is compiled for every shape, which takes seconds: few is batches up to 8 from "
        "4096 tokens on",
    )
    arguments = arguments.parse_args()
    report = Report(arguments, "gpu/attend.py")
    kvarn.warmup()
    stream = torch.cuda.Stream()
    replays = 10 if arguments.small else REPLAYS
    chosen = sets() if arguments.chosen == "all" else {arguments.chosen: sets().get(arguments.chosen, [])}
    shapes = SMALL if arguments.small else [shape for shapes in chosen.values() for shape in shapes]
    peers = Peers([] if arguments.no_peers else all_peers(), report)
    for shape in shapes:
        if arguments.contexts and shape.context not in arguments.contexts:
            continue
        if arguments.batches and shape.batch not in arguments.batches:
            continue
        long = shape.batch <= 8 and shape.context >= 4096
        with_flex = arguments.flex == "all" or (arguments.flex == "few" and long)
        with report.part(str(shape)):
            skip = [] if with_flex else ["flex_attention"]
            shape_rows(report, shape, arguments.presets, peers, stream, replays, skip)
    if arguments.chosen in ("ragged", "all"):
        count, longest = (8, 4096) if arguments.small else (RAGGED_COUNT, RAGGED_LONGEST)
        for preset in arguments.presets:
            with report.part(f"{preset} ragged"):
                ragged_row(report, preset, count, longest, stream, replays)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
