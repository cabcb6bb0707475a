"""The figures of a device as Markdown: `python benches/gpu/table.py [--device h200] [--out FILE]`.

Reads the JSON files beside it that carry the device's name, and prints what the goals say of them and a
table for each file. Needs neither a GPU nor torch.
"""

import argparse
import json
import pathlib
import re
import sys

from goals import GOALS, bounds, short
from markdown import distinct, grid

HERE = pathlib.Path(__file__).parent
GOALS_DEVICE = "h200"
SHAPE = re.compile(r"^\d+/\d+ D \d+ q \d+: \d+ × \d+: ")


def read(folder, device):
    """Files of a device in a folder by name, without device and ending, in the document's order."""
    paths = {name: folder / f"{name}-{device}.json" for name in SECTIONS}
    return {
        name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()
    }


def first_column(row):
    return f"{row['context']} × {row['batch']}"


def layout(row):
    """Heads, head dim and query tokens of a row of attention."""
    return f"{row['heads']}/{row['kv_heads']} D {row['head_dim']} q {row['q_len']}"


def peer_column(peer):
    return "sdpa, fastest backend" if peer.startswith("sdpa ") else peer


def attend(run):
    """µs · fraction of plain read · × the fastest fp16 peer, for each preset; then the peers' µs."""
    shapes = {}
    for row in run["rows"]:
        shapes.setdefault((layout(row), first_column(row)), {})[short(row["preset"])] = row
    presets = distinct(short(row["preset"]) for row in run["rows"])
    peers = distinct(peer_column(peer) for row in run["rows"] for peer in row["peers"])
    lines = []
    for (heads, at), by_preset in shapes.items():
        some = next(iter(by_preset.values()))
        times = {}
        for peer, us in some["peers"].items():
            times.setdefault(peer_column(peer), {})[peer] = us
        lines.append(
            [
                f"{heads}: {at}",
                f"{some['fp16_bytes'] / 1e9:.2f}",
                *(attend_cell(by_preset.get(preset)) for preset in presets),
                *(peer_cell(times.get(peer, {}), some["peer"]) for peer in peers),
            ]
        )
    header = ["heads, context × batch", "fp16 GB", *presets, *peers]
    explained = (
        "Presets: µs · fraction of a plain read · × the fastest fp16 peer. Peers: µs; bold is the fastest "
        "that holds fp16. q: query tokens of each sequence."
    )
    return [explained, grid(header, lines)]


def attend_cell(row):
    if row is None:
        return "–"
    times = "–" if row["times_peer"] is None else f"{row['times_peer']:.2f} ×"
    return f"{row['us']:.1f} · {row['of_plain_read']:.2f} · {times}"


def peer_cell(times, fastest):
    if not times:
        return "–"
    text = f"{min(times.values()):.1f}"
    return f"**{text}**" if fastest in times else text


def ragged(run):
    lines = [
        [
            short(row["preset"]),
            f"{len(row['lengths'])} of {min(row['lengths'])} to {max(row['lengths'])}",
            f"{row['ragged']['us']:.1f}",
            f"{row['even']['us']:.1f}",
            f"{row['of_even']:.2f}",
        ]
        for row in run["rows"]
    ]
    return [grid(["preset", "sequences of tokens", "ragged µs", "even µs", "speed, of even"], lines)]


def codec(run):
    """Seal and fill beside each other, append, expand."""
    kinds = {}
    for row in run["rows"]:
        kinds.setdefault(row["kind"], []).append(row)
    encoded = {}
    for kind in ("seal", "fill"):
        for row in kinds.get(kind, []):
            at = encoded.setdefault((short(row["preset"]), row["head_dim"]), {})
            at[kind, row["refit"]] = f"{row['pairs_per_s'] / 1e6:.2f}"
    columns = [(kind, refit) for kind in ("seal", "fill") for refit in (False, True)]
    seal = grid(
        ["preset", "D", *(f"{kind}, refit {'on' if refit else 'off'}" for kind, refit in columns)],
        [[*at, *(found.get(column, "–") for column in columns)] for at, found in encoded.items()],
    )
    append = grid(
        ["preset", "sequences", "append µs"],
        [[short(row["preset"]), row["sequences"], f"{row['us']:.2f}"] for row in kinds.get("append", [])],
    )
    expand = grid(
        ["preset", "D", "tokens", "expand µs", "of a plain write", "host µs"],
        [
            [
                short(row["preset"]),
                row["head_dim"],
                row["tokens"],
                f"{row['us']:.1f}",
                f"{row['of_plain_write']:.2f}",
                f"{row['host_us']:.1f}",
            ]
            for row in kinds.get("expand", [])
        ],
    )
    explained = (
        "Million tile pairs a second: seal, tiles of one long step, from its rows; fill, sequences that fill "
        "a tile with the same token. Host µs of expand: calls in a row."
    )
    return [explained, seal, append, expand]


def layer(run):
    layers = [row for row in run["rows"] if row["kind"] == "layer"]
    hosts = [row for row in run["rows"] if row["kind"] == "host"]
    device = grid(
        ["context × batch", "preset", "append + attend µs", "attend µs", "append µs", "of a plain read"],
        [
            [
                first_column(row),
                short(row["preset"]),
                f"{row['both_us']:.1f}",
                f"{row['attend_us']:.1f}",
                f"{row['append_us']:.1f}",
                f"{row['of_plain_read']:.2f}",
            ]
            for row in layers
        ],
    )
    names = {
        "append": "append",
        "attend": "attend",
        "first_append": "append, first layer",
        "first_attend": "attend, first layer",
        "step": "step",
        "finish": "finish",
        "torch_add": "torch.add",
        "torch_empty_like": "torch.empty_like",
    }
    host = grid(
        ["host µs: batch", "preset", *names.values()],
        [[row["batch"], short(row["preset"]), *(f"{row[name]:.1f}" for name in names)] for row in hosts],
    )
    return [device, host]


def generate(run):
    """Tokens per second of every cache, then how those of kvarn compare with the others."""
    shapes = {}
    for row in run["rows"]:
        shapes.setdefault(first_column(row), {})[row["cache"]] = row
    caches = distinct(row["cache"] for row in run["rows"])
    ours = distinct(row["cache"] for row in run["rows"] if row["preset"])
    others = [cache for cache in caches if cache not in ours]

    def speed(row):
        if row is None:
            return "–"
        size = f"{row['cache_bytes'] / 1e9:.2f} GB"
        return f"{row['tokens_per_s']:.1f} · {row['step_ms']:.1f} ({row['host_ms']:.1f}) ms · {size}"

    def beside(row, field, other):
        value = (row or {}).get(field, {}).get(other)
        return "–" if value is None else f"{value:.2f}"

    speeds = [[at, *(speed(by_cache.get(cache)) for cache in caches)] for at, by_cache in shapes.items()]
    ratios = [
        [
            at,
            cache,
            *(beside(by_cache.get(cache), "times", other) for other in others),
            beside(by_cache.get(cache), "logits_distance", "dynamic"),
        ]
        for at, by_cache in shapes.items()
        for cache in ours
    ]
    presets = ", ".join(distinct(short(row["preset"]) for row in run["rows"] if row["preset"]))
    explained = (
        f"Tokens per second · step (host) · bytes of the cache; kvarn holds {presets}. dynamic-flash: "
        "DynamicCache with torch's cuDNN backend off, which prepares itself anew for every length. -graph: "
        "steps replayed from a CUDA graph, StaticCache and KVarNStaticCache."
    )
    compared = (
        "Tokens per second of kvarn over those of the others. Distance: of the first step's logits from "
        "those of dynamic, relative; weights, keys and values are random, so that it says nothing of a "
        "trained model."
    )
    return [
        explained,
        grid(["context × batch", *caches], speeds),
        compared,
        grid(["context × batch", "cache", *(f"× {other}" for other in others), "distance"], ratios),
    ]


def check(run):
    """Every command, its exit status, and what it printed last."""
    lines = [
        [
            f"`{found['command']}`",
            f"{found['seconds']} s",
            found["status"],
            found["printed"] + _repeated(found, run),
        ]
        for found in run["runs"]
    ]
    passed = sum(found["status"] == 0 for found in run["runs"])
    noted = [f"- {note}" for found in run["runs"] for note in found["notes"]]
    parts = [
        f"{passed} of {len(run['runs'])} ended with status 0.",
        grid(["command", "time", "status", "printed"], lines, text=4),
    ]
    return parts + (["Notes:\n\n" + "\n".join(noted)] if noted else [])


def _repeated(found, run):
    """Which commit a run was of, if it was repeated for another."""
    commit = found.get("commit", run.get("commit"))
    return "" if commit == run.get("commit") else f" (commit {commit})"


SECTIONS = {
    "attend-main": attend,
    "attend-heads": attend,
    "attend-dims": attend,
    "attend-qlen": attend,
    "attend-ragged": ragged,
    "codec": codec,
    "layer": layer,
    "generate": generate,
    "check": check,
}


def left_out(run):
    """What a file says is missing or failed, without the shapes of which it says so."""
    lines = []
    for name, reasons in run.get("missing", {}).items():
        why = distinct(SHAPE.sub("", reason).split(". ")[0].rstrip(".") for reason in reasons)
        measured = any(name in row.get("peers", {}) for row in run["rows"])
        lines.append(
            f"- {name}, not measured at {'some shapes' if measured else 'any shape'}: {'; '.join(why)}."
        )
    lines += [f"- {name} failed: {reason}" for name, reason in run.get("failed", {}).items()]
    return ["\n".join(lines)] if lines else []


def section(name, run, device, main_commit):
    commit = f"commit {run['commit'][:10]}"
    if run["commit"] != main_commit:
        commit += f", another than attend-main's {main_commit[:10]}"
    return [
        f"## {name}",
        f"`{run['command']} --out benches/gpu/{name}-{device}.json`\n\n"
        f"{run['device']}, torch {run['torch']}, {commit}.",
        *SECTIONS[name](run),
        *left_out(run),
    ]


def goals_section(runs):
    lines = []
    for goal in GOALS:
        values = goal.values(runs)
        commit = runs[goal.file]["commit"][:10] if goal.file in runs else "–"
        judged = [goal.text, goal.wanted(), goal.reached(values), len(values), goal.verdict(values)]
        lines.append([*judged, goal.file, commit])
    counts = [verdict for *_, verdict, _, _ in lines]
    summary = ", ".join(f"{counts.count(verdict)} {verdict}" for verdict in distinct(counts))
    return [
        "## Goals",
        "Reached: the median of the rows that a goal is about, and their range. Met: by every row (yes), by "
        f"the median alone (at the median), or not. Of {len(lines)} goals: {summary}.",
        grid(["goal", "wanted", "reached", "rows", "met", "file", "commit"], lines),
        "### What bounds what is missed",
        *bounds(runs),
    ]


def document(runs, device):
    """The whole document.

    Args:
        runs: files by name, as `read` gives them.
        device: the device's name in the files' names. Goals are those of an H200.
    """
    main_commit = runs.get("attend-main", next(iter(runs.values())))["commit"]
    parts = [
        f"# Figures of {next(iter(runs.values()))['device']}",
        "Made by `python benches/gpu/table.py` from the JSON files beside it; how things are measured is "
        "said in [README.md](README.md). Figures come from those files, except where an experiment apart is "
        "named.",
    ]
    if (HERE / "attend.svg").exists() and device == GOALS_DEVICE:
        parts.append("![Decode attention: µs and GB/s over context](attend.svg)")
    if device == GOALS_DEVICE:
        parts += goals_section(runs)
    for name, run in runs.items():
        parts += section(name, run, device, main_commit)
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=GOALS_DEVICE, help="how the JSON files' names end")
    parser.add_argument("--out", type=pathlib.Path, help="write the document there; default: print it")
    arguments = parser.parse_args()
    runs = read(HERE, arguments.device)
    if not runs:
        sys.exit(
            f"device {arguments.device!r}: expected a file like attend-main-{arguments.device}.json beside "
            "table.py; measure with --out, or name a device that has files"
        )
    text = document(runs, arguments.device)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
