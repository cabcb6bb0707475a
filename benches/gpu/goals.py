"""What the kernels are meant to reach on an H200, and what the files of a run say of it."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

LARGE, LARGEST = 1e9, 4e9  # bytes of an fp16 cache of one layer
SIXTEEN_COLUMNS = range(9, 17)  # query columns that share one pass over a tile with 16
# From here on a step is the host's: the device waits for Python.
HOST_BOUND = 0.95


@dataclass(frozen=True)
class Goal:
    """A bar for some rows of one file.

    Attributes:
        text: what is measured, and on which rows.
        file: the file's name, without device and ending.
        pick: the value of a row, None for a row that the goal is not about.
        bar: the value to reach.
        at_most: the value must not exceed the bar, instead of reaching it.
        every: the goal is about every row; otherwise about their median.
        digits: decimals to print.
        unit: printed behind the bar.
    """

    text: str
    file: str
    pick: Callable[[dict], float | None]
    bar: float
    at_most: bool = False
    every: bool = False
    digits: int = 2
    unit: str = ""

    def values(self, runs):
        """The values of the rows that the goal is about; none if the file is not there."""
        picked = map(self.pick, runs.get(self.file, {}).get("rows", []))
        return [value for value in picked if value is not None]

    def reaches(self, value):
        return value <= self.bar if self.at_most else value >= self.bar

    def verdict(self, values):
        """yes: every row reaches the bar; at the median: the median does; no; not measured."""
        if not values:
            return "not measured"
        if all(map(self.reaches, values)):
            return "yes"
        median = self.reaches(statistics.median(values))
        return "at the median" if median and not self.every else "no"

    def wanted(self):
        return f"{'≤' if self.at_most else '≥'} {self.bar:.{self.digits}f}{self.unit}"

    def reached(self, values):
        """Median and range."""
        if not values:
            return "–"
        median, low, high = (
            f"{value:.{self.digits}f}" for value in (statistics.median(values), min(values), max(values))
        )
        return median if len(values) == 1 else f"{median} ({low} to {high})"


def short(preset):
    """The preset's name without what all of them share: k4v2."""
    return preset.removeprefix("kvarn_").removesuffix("_g128")


def _of(field, preset, least_bytes):
    """The field of a preset's rows whose fp16 cache has at least so many bytes."""
    return lambda row: (
        row[field] if short(row["preset"]) == preset and row["fp16_bytes"] >= least_bytes else None
    )


def _attention():
    for preset, large, largest in (
        ("k4v4", 0.87, 0.94),
        ("k4v2", 0.87, 0.94),
        ("k3v3", 0.82, 0.90),
        ("k2v2", 0.73, 0.82),
    ):
        for least, bar in ((LARGE, large), (LARGEST, largest)):
            text = f"attention {preset}, fraction of a plain read, fp16 cache of {least / 1e9:.0f} GB or more"
            yield Goal(text, "attend-main", _of("of_plain_read", preset, least), bar)
    at_sixteen = _of("of_plain_read", "k4v2", LARGE)
    yield Goal(
        "attention k4v2, fraction of a plain read, 9 to 16 query columns, fp16 cache of 1 GB or more",
        "attend-qlen",
        lambda row: (
            at_sixteen(row) if row["q_len"] * row["heads"] // row["kv_heads"] in SIXTEEN_COLUMNS else None
        ),
        0.70,
    )
    for preset, bar in (("k4v2", 4.1), ("k4v4", 3.3), ("k2v2", 4.8)):
        text = f"attention {preset}, × the fastest fp16 peer, fp16 cache of 1 GB or more"
        yield Goal(text, "attend-main", _of("times_peer", preset, LARGE), bar, unit=" ×")
    for context, bar in ((4096, 8.5), (32768, 15.0), (131072, 35.0)):
        yield Goal(
            f"attention k4v2, one sequence of {context} tokens, 32/8 heads",
            "attend-main",
            lambda row, context=context: row["us"] if _alone(row, context) else None,
            bar,
            at_most=True,
            digits=1,
            unit=" µs",
        )


def _alone(row, context):
    return short(row["preset"]) == "k4v2" and (row["batch"], row["context"]) == (1, context)


def _codec():
    for refit, bar in ((False, 3.0), (True, 1.2)):
        yield Goal(
            f"seal at D 128, refit {'on' if refit else 'off'}, million tile pairs a second",
            "codec",
            lambda row, refit=refit: (
                row["pairs_per_s"] / 1e6
                if (row["kind"], row.get("head_dim"), row.get("refit")) == ("seal", 128, refit)
                else None
            ),
            bar,
        )
    yield Goal(
        "expand, fraction of a plain write",
        "codec",
        lambda row: row["of_plain_write"] if row["kind"] == "expand" else None,
        0.85,
    )


def _rest():
    yield Goal(
        "ragged batch, speed against the same tokens evenly split",
        "attend-ragged",
        lambda row: row["of_even"],
        0.90,
    )
    for call in ("append", "attend"):
        yield Goal(
            f"host, one {call}, layers behind a step's first",
            "layer",
            lambda row, call=call: row[call] if row["kind"] == "host" else None,
            10.0,
            at_most=True,
            digits=1,
            unit=" µs",
        )
    dynamic = (("dynamic", "DynamicCache"), ("dynamic-flash", "DynamicCache without cuDNN"))
    graph = (("static-graph", "StaticCache by a CUDA graph"),)
    for cache, how, peers in (
        ("kvarn", "generation", (*dynamic, ("static", "StaticCache"))),
        ("kvarn-graph", "generation by a CUDA graph", (*dynamic, *graph)),
    ):
        for peer, name in dynamic:
            yield Goal(
                f"{how} at 131072 tokens × 4 sequences, × {name}",
                "generate",
                lambda row, cache=cache, peer=peer: (
                    _times(row, cache, peer) if (row["context"], row["batch"]) == (131072, 4) else None
                ),
                1.5,
                unit=" ×",
            )
        for peer, name in peers:
            yield Goal(
                f"{how}, every shape, × {name}",
                "generate",
                lambda row, cache=cache, peer=peer: _times(row, cache, peer),
                1.0,
                every=True,
                unit=" ×",
            )


def _times(row, cache, peer):
    return row.get("times", {}).get(peer) if row["cache"] == cache else None


GOALS = (*_attention(), *_codec(), *_rest())

STREAM = (
    "**Attention over large caches.** In an experiment apart, ncu at 32 × 32768 (1.74 GHz, samples of the "
    "program counter): two thirds of the samples lie in the loops over tiles. With k2v2 their schedulers "
    "issue in about three of four cycles: the masks that unpack codes are 515 of some 1270 instructions a "
    "tile, on a unit that takes one every second cycle. With k4v2 a seventh of all samples waits for "
    "records. Of the rest a tenth waits at barriers behind pieces, for the slowest warp; slots take three "
    "in a hundred. Longer pieces would help large batches by a few percent and make one sequence slower: "
    "how a sequence is cut must not depend on the batch. The goals against peers are missed by the same "
    "time."
)

SIXTEEN = (
    "**16 query columns** run with two warps per scheduler, because of registers, and a piece costs them "
    "much beside its tiles: in an experiment apart, eight sequences of 131072 tokens with 16 query heads of "
    "one KV head took 93 µs in pieces of 512 tokens, 78 in pieces of 1536 and 57 in pieces of 4096. One "
    "sequence alone took 29, 27 and 36 µs, and how it is cut must not depend on the batch, or results would."
)

EXPAND = (
    "**Expand** reads records beside what it writes, which the goal does not count. Under ncu its schedulers "
    "issue in most cycles, and the load-store unit moves data in more than half of them: additions of the "
    "rotation and stores of rows that the lanes hold in pieces. Twelve warps a multiprocessor, because of "
    "registers, do not overlap the two any better."
)

TRIED = (
    "**Tried and not faster**, each in an experiment apart: warps that do not wait for each other at the "
    "end of a piece (results in shared memory of their own, the last warp merges: slower, the "
    "instruction cache misses more); queries loaded before the records; laying out the queries while "
    "records arrive; another shared-memory carve-out; the next record asked into L2 ahead; half a buffer "
    "filled again as soon as it is read; with 16 query columns, results apart from the buffers "
    "of V, so that V of the next piece is on its way while they are merged; for expand, rows that leave by "
    "way of shared memory, as whole rows by bulk copies or 16 bytes a lane."
)


def bounds(runs):
    """Paragraphs on what bounds the goals that an H200 misses, with figures of the files that have them."""
    return [STREAM, _one_sequence(runs), SIXTEEN, _seal(runs), EXPAND, _host(runs), TRIED]


def _one_sequence(runs):
    rows = [
        row
        for row in runs.get("attend-main", {}).get("rows", [])
        if any(_alone(row, context) for context in (4096, 32768, 131072))
    ]
    listed = "; ".join(
        f"{row['us']:.1f} µs at {row['context']} tokens, "
        f"{row['us'] - row['plain_read_us']:.1f} beside a plain read"
        for row in rows
    )
    return (
        "**One sequence** meets the latency of a launch and of a chain of dependent loads (description, "
        f"queries, records, merge): {listed or 'not measured'}. Where that rest grows with the context, a "
        "fixed latency does not explain it."
    )


def _seal(runs):
    fills = [
        row["pairs_per_s"] / 1e6
        for row in runs.get("codec", {}).get("rows", [])
        if row["kind"] == "fill" and not row["refit"]
    ]
    reached = f"{min(fills):.2f} to {max(fills):.2f} M pairs a second" if fills else "not measured"
    return (
        "**Seal without refit.** The goal is about tiles of one long step, encoded from its rows. Tiles that "
        f"sequences fill with their next token: {reached}. What makes the difference has not been measured."
    )


def _host(runs):
    caches = {}
    for row in runs.get("generate", {}).get("rows", []):
        bound = row["host_ms"] >= HOST_BOUND * row["step_ms"]
        caches.setdefault(row["cache"], {})[f"{row['context']} × {row['batch']}"] = bound
    listed = []
    for cache, shapes in caches.items():
        free = [shape for shape, bound in shapes.items() if not bound]
        bound = "none" if len(free) == len(shapes) else f"all but {', '.join(free)}" if free else "all"
        listed.append(f"{cache}, {bound}")
    return (
        f"**Generation.** Where the host is busy for {100 * HOST_BOUND:.0f} % of a step or more, a row "
        f"compares Python and not caches. Such rows are, of {'; of '.join(listed) or 'nothing measured'}."
    )
