"""The figures of a CPU as Markdown: one section for each script."""

from cpu.bars import HEADER, bars
from cpu.processor import describe
from gpu.goals import short
from gpu.markdown import distinct, grid


def ms(us):
    return f"{us / 1e3:.2f}"


def at(row):
    """Context and batch; of a chunk, the history before it."""
    if row["q_len"] > 1:
        return f"{row['q_len']} behind {row['tokens'] - row['q_len']}"
    return f"{row['context']} × {row['batch']}"


def attention(run):
    """Presets beside each other, then the peers, then growth and decoding first."""
    by_shape = {}
    for row in run["rows"]:
        if row["kind"] in ("decode", "prefill"):
            by_shape.setdefault((row["kind"] == "prefill", row["context"], row["batch"]), []).append(row)
    shapes = [by_shape[key] for key in sorted(by_shape)]
    presets = distinct(row["preset"] for rows in shapes for row in rows)
    ways = distinct(name for rows in shapes for name in rows[0]["peers"])
    kvarn_lines, peer_lines = [], []
    for rows in shapes:
        cells = {row["preset"]: cell(row) for row in rows}
        some = rows[0]
        kvarn_lines.append([at(some), *(cells.get(preset, "–") for preset in presets)])
        peer_lines.append([at(some), *(peer_cell(some, way) for way in ways)])
    speeds = [row["plain_read_gb_per_s"] for rows in shapes for row in rows[:1]]
    read = f"{min(speeds):.1f} to {max(speeds):.1f} GB/s" if speeds else "not measured"
    return [
        "32 query heads over 8 KV heads, D 128, context × batch. kvarn: ms · × the fastest peer · packed "
        f"bytes per second as a fraction of a plain read, which reached {read}.",
        grid(["kvarn", *map(short, presets)], kvarn_lines),
        "Peers: ms; bold is the one that kvarn is compared with: the fastest, for a chunk the fastest in 16 "
        "bits.",
        grid(["peers", *ways], peer_lines),
        *growth(run),
        *expand(run),
    ]


def cell(row):
    return f"{ms(row['us'])} · {row['times_peer']:.2f} × · {row['of_plain_read']:.3f}"


def peer_cell(row, way):
    if way not in row["peers"]:
        return "–"
    text = ms(row["peers"][way])
    return f"**{text}**" if way == row["peer"] else text


def growth(run):
    rows = [row for row in run["rows"] if row["kind"] == "growth"]
    if not rows:
        return []
    lines = [
        [short(row["preset"]), row["batch"], row["shorter"], row["longest"], f"{row['ratio']:.2f}"]
        for row in rows
    ]
    return [
        "Time for each token at the longest context, × that at the one before:",
        grid(["preset", "batch", "shorter", "longest", "time for a token, ×"], lines),
    ]


def expand(run):
    rows = [row for row in run["rows"] if row["kind"] == "expand"]
    if not rows:
        return []
    rows.sort(key=lambda row: (row["q_len"], row["context"]))
    types = list(rows[0]["decode_then_sdpa_us"])
    lines = [
        [
            at(row),
            short(row["preset"]),
            ms(row["us"]),
            *(ms(row["decode_then_sdpa_us"][name]) for name in types),
            f"{row['times']:.2f} ×",
        ]
        for row in rows
    ]
    header = ["tokens", "preset", "attend ms", *(f"decode, then SDPA in {name} ms" for name in types)]
    return [
        "Attention over records beside decoding them and calling SDPA:",
        grid([*header, "attend is faster by"], lines),
    ]


def encode(run):
    found = {}
    for row in run["rows"]:
        if row["kind"] in ("encode", "seal"):
            key = row["kind"], short(row["preset"]), row["head_dim"]
            found.setdefault(key, {})[row["refit"], row["row_threads"]] = row
    columns = sorted({column for rows in found.values() for column in rows})
    header = [f"refit {'on' if refit else 'off'}, threads {threads}" for refit, threads in columns]
    lines = [
        [*key, *(speed(rows[column]) if column in rows else "–" for column in columns)]
        for key, rows in found.items()
    ]
    appended = [
        [row["kind"], short(row["preset"]), row["sequences"], row["row_threads"], f"{row['us']:.1f}"]
        for row in run["rows"]
        if row["kind"] in ("append", "append cold", "fill")
    ]
    return [
        "Tile pairs a second, in brackets for each thread. Encode: `kvarn.encode`, from float32 tiles. Seal: "
        "append of a pool, whole tiles of one long step, from float16 rows.",
        grid(["", "preset", "D", *header], lines, text=2),
        "Append: one token for each sequence, nothing sealed, one step after the other, the first of a "
        "process not counted; cold: each step behind a read of 256 MB. Fill: the token fills a tile of each.",
        grid(["", "preset", "sequences", "threads", "µs a layer"], appended, text=2),
    ]


def speed(row):
    return f"{row['pairs_per_s']:.0f} ({row['pairs_per_s_and_thread']:.0f})"


def generate(run):
    compared = {row["model"]: row for row in run["rows"] if row["kind"] == "compare"}
    found = {}
    for row in run["rows"]:
        if row["kind"] == "decode":
            found.setdefault((row["model"], row["dtype"], row["context"]), {})[row["cache"]] = row
    lines = []
    for (model, dtype, context), caches in found.items():
        dynamic, packed = caches["dynamic"], caches["kvarn"]
        times = f"{packed['tokens_per_s'] / dynamic['tokens_per_s']:.2f} ×"
        counts = model in compared and compared[model]["dtype"] == dtype
        lines.append(
            [
                model,
                dtype,
                context,
                *(f"{row['tokens_per_s']:.2f} · {row['cache_bytes'] / 1e6:.1f}" for row in (dynamic, packed)),
                f"**{times}**" if counts else times,
            ]
        )
    presets = ", ".join(distinct(short(row["preset"]) for row in run["rows"] if row.get("preset")))
    return [
        f"Tokens a second · MB of the cache; kvarn holds {presets}. Bold is the type in which DynamicCache "
        "is the faster one.",
        grid(["model", "type", "tokens", "DynamicCache", "KVarNCache", "kvarn × dynamic"], lines, text=2),
    ]


SECTIONS = {
    "cpu_attention": ("Attention", attention),
    "cpu_encode": ("Encoding", encode),
    "cpu_generate": ("Generation", generate),
}


def judged(runs, instruction_set):
    """The bars that files say something of, as a table."""
    lines = [bar.cells(runs) for bar in bars(instruction_set) if bar.least.file in runs]
    return grid(HEADER, lines)


def broken(run):
    """What failed, if something did."""
    lines = [f"- {name} failed: {reason}" for name, reason in run["failed"].items()]
    return ["\n".join(lines)] if lines else []


def show(report, name, neighbours):
    """Print what a run has found, as the document has it."""
    report.head["others_cores"] = neighbours.cores()
    run = report.values()
    parts = [*SECTIONS[name][1](run), judged({name: run}, run["instruction_set"]), *broken(run)]
    print("\n" + "\n\n".join([f"On {describe(run)}", *parts]) + "\n", flush=True)


def document(runs):
    """The document of the runs of all scripts.

    Raises:
        ValueError: the runs are of different processors or instruction sets.
    """
    machines = distinct((run["device"], run["instruction_set"]) for run in runs.values())
    if len(machines) != 1:
        raise ValueError(f"runs of {len(machines)} processors: expected one; measure all of them on one")
    (_, instruction_set) = machines[0]
    parts = [
        "# Performance on a CPU",
        "`make bench` measures this and writes it anew, with the JSON files beside the scripts in "
        "[benches](../benches). `python benches/cpu_table.py --out docs/performance.md` makes it from those "
        "files. GPU figures: [benches/gpu/RESULTS.md](../benches/gpu/RESULTS.md).",
        "Keys and values are random; of each call the median counts.\n\n"
        "- Attention: calls take turns in one process, each over cold memory. A read of 256 MB, torch's sum "
        "of float32, comes before each, and is what *plain read* means; then a pause until torch's threads "
        "sleep, and other work that wakes kvarn's. Peers and kvarn are checked against float64 on a small "
        "shape first. Sequences hold 64 tokens fewer than the context says, so that the last tile is half "
        "full.\n"
        "- Encoding: a process for each number of threads.\n"
        "- Generation: caches are filled without a prompt and take turns of a few steps.",
        "## Bars",
        "Every row that a bar is about must reach it. Reached: the median of these rows, and their range.",
        judged(runs, instruction_set),
    ]
    for name, run in runs.items():
        title, section = SECTIONS[name]
        parts += [
            f"## {title}",
            f"`{run['command']} --out benches/{name}.json`\n\n{describe(run)}",
            *section(run),
            *broken(run),
        ]
    return "\n\n".join(parts) + "\n"
