"""Latency and bandwidth over context: `python benches/gpu/plot.py FILE… [--out attend.svg]`.

Reads what attend.py wrote, one file or several of the same device and commit, and draws for each batch of
32 query heads over 8 KV heads of 128 channels: µs of one launch, and GB/s of the bytes that each
implementation must read of its own cache. Of torch's backends the fastest of each point is drawn.
"""

import argparse
import json
import pathlib
import sys

from svg import Line, Panel, document

COLOURS = {
    "kvarn k4v4": "#9ecae1",
    "kvarn k4v2": "#08519c",
    "kvarn k3v3": "#41ab5d",
    "kvarn k2v2": "#00441b",
    "sdpa, fastest backend": "#d94801",
    "flex_attention": "#fdae6b",
    "flashinfer fp16": "#a50f15",
    "flashinfer fp8": "#fb6a4a",
    "triton published style": "#756bb1",
    "plain read": "#969696",
}


def points(rows):
    """What one row of attend.py says of each line: {(batch, line): {context: (µs, GB/s)}}."""
    found = {}

    def add(batch, line, context, us, count_bytes):
        at = found.setdefault((batch, line), {})
        if context not in at or us < at[context][0]:
            at[context] = us, count_bytes / us / 1e3

    for row in rows:
        if "lengths" in row or (row["heads"], row["kv_heads"], row["head_dim"], row["q_len"]) != (
            32,
            8,
            128,
            1,
        ):
            continue
        batch, context = row["batch"], row["context"]
        preset = row["preset"].removeprefix("kvarn_").removesuffix("_g128")
        add(batch, f"kvarn {preset}", context, row["us"], row["bytes"])
        if preset == "k4v2":
            add(batch, "plain read", context, row["plain_read_us"], row["bytes"])
        for peer, us in row["peers"].items():
            line = "sdpa, fastest backend" if peer.startswith("sdpa ") else peer
            holds = row["peers_hold"][peer]
            if holds == "k4v2" and preset != "k4v2":
                continue  # its bytes are those of a k4v2 row
            count_bytes = {"fp16": row["fp16_bytes"], "fp8": row["fp16_bytes"] // 2, "k4v2": row["bytes"]}
            add(batch, line, context, us, count_bytes[holds])
    return found


def panels(found):
    """Two panels for each batch: µs, then GB/s."""
    made = []
    for batch in sorted({batch for batch, _ in found}):
        for index, label, log_y in ((0, "µs", True), (1, "GB/s", False)):
            lines = [
                Line(
                    name,
                    [(context, values[index]) for context, values in found[batch, name].items()],
                    colour,
                    dashed=name == "plain read",
                )
                for name, colour in COLOURS.items()
                if (batch, name) in found
            ]
            made.append(Panel(f"batch {batch}", label, lines, log_y))
    return made


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benches/gpu/attend.svg"))
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.files]
    heads = {(run["device"], run["commit"]) for run in runs}
    if len(heads) > 1:
        text = ", ".join(f"{device} at {commit[:10]}" for device, commit in sorted(heads))
        sys.exit(f"runs of {text}: expected one device and one commit; draw them apart")
    device, commit = heads.pop()
    found = points([row for run in runs for row in run["rows"]])
    if not found:
        sys.exit("no row of 32/8 heads, head dim 128, one query token: expected the set main of attend.py")
    title = f"Decode attention, 32/8 heads, D 128, on {device} ({commit[:10]})"
    arguments.out.write_text(document(title, panels(found), columns=2), encoding="utf-8")
    print(f"{arguments.out}: {len(found)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
