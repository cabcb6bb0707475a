"""`kvarn estimate`: what the cache of a model takes by format, and what fits."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvarn
from kvarn._model_config import CachedLayers, read_model_config
from kvarn.cli.console import print_json, results, table
from kvarn.errors import ConfigError, ShapeError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `kvarn`."""
    parser = commands.add_parser("estimate", help="say what a model's cache takes by format, and what fits")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="PATH", help="a model's config.json, or its folder"
    )
    parser.add_argument("--context", type=int, required=True, metavar="N", help="tokens of each sequence")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences (default: 1)")
    parser.add_argument(
        "--memory", metavar="SIZE", help="bytes for the cache, such as 80GiB: adds what fits into them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
    for name in ("context", "batch"):
        number = getattr(arguments, name)
        if number < 1:
            raise ShapeError(f"{name} {number}: expected 1 or more; pass --{name}")
    layers = read_model_config(arguments.model)
    if not layers.full:
        raise ConfigError(
            f"{layers.name} without full_attention layers: expected one or more; its cache does not grow"
        )
    memory = None if arguments.memory is None else parse_size(arguments.memory)
    rows = estimate(layers, arguments.context, arguments.batch, memory)
    if arguments.json:
        print_json(
            {"model": layers.name, "context": arguments.context, "batch": arguments.batch, "rows": rows}
        )
        return
    columns = ["format", "bytes a token", "GiB a sequence", f"GiB of {arguments.batch}", "× smaller"]
    columns += [] if memory is None else ["sequences that fit", "tokens of one that fit"]
    shown = table(f"{layers.name}, {arguments.context:,} tokens a sequence", *columns)
    for row in rows:
        cells = [
            row["format"],
            f"{row['bytes_per_token']:,.0f}",
            f"{row['sequence_bytes'] / 2**30:.3f}",
            f"{row['batch_bytes'] / 2**30:.2f}",
            f"{row['times_smaller']:.2f}",
        ]
        cells += [] if memory is None else [f"{row['sequences']:,}", f"{row['tokens']:,}"]
        shown.add_row(*cells)
    results().print(shown)
    results().print("Sinks and tail, in 16 bit, and room for a step are part of a sequence; weights are not.")
    if layers.sliding:
        kept = f"{len(layers.sliding)} layers keep {layers.window:,} tokens in 16 bit"
        results().print(f"{kept}: part of a sequence.")
    if layers.other:
        kinds = ", ".join(layers.other)
        results().print(f"Not counted: the state of layers of kind {kinds}, which does not grow.")


def estimate(layers: CachedLayers, context: int, batch: int, memory: int | None) -> list[dict[str, Any]]:
    """One row for each format: sizes in bytes."""
    values = sum(shape.kv_heads * shape.head_dim for shape in layers.full) * 2
    windows = sum(shape.kv_heads * shape.head_dim for shape in layers.sliding) * 2
    fixed = 2 * windows * min(context, layers.window)
    rows: list[dict[str, Any]] = []

    def add(name: str, per_token: float, sequence: int, longest: Callable[[int], int]) -> None:
        """`sequence`: bytes without sliding layers; `longest`: tokens of one that fit into so many bytes."""
        sequence += fixed
        row: dict[str, Any] = {
            "format": name,
            "bytes_per_token": per_token,
            "sequence_bytes": sequence,
            "batch_bytes": batch * sequence,
            "times_smaller": rows[0]["sequence_bytes"] / sequence if rows else 1.0,
        }
        if memory is not None:
            row["sequences"] = memory // sequence
            row["tokens"] = longest(max(memory - fixed, 0))
        rows.append(row)

    def dense(name: str, width: int) -> None:
        add(name, width * values, width * values * context, lambda memory: memory // (width * values))

    def records(preset: str) -> None:
        cfg = kvarn.Config(preset, head_dim=layers.full[0].head_dim)
        one = kvarn.capacity(cfg, 2**62, layers=layers.full)
        slots = one.slots * one.slot_bytes
        # Full tiles are sealed, but for the sinks.
        sealed = max(context // cfg.group - int(cfg.sink_tokens == cfg.group), 0)

        def longest(memory: int) -> int:
            if memory < slots:
                return 0
            return kvarn.capacity(cfg, memory, layers=layers.full).tokens_per_sequence

        add(preset, one.bytes_per_token, slots + sealed * one.page_bytes, longest)

    dense("fp16", 2)
    dense("fp8", 1)
    for preset in kvarn.presets():
        records(preset)
    return rows


def parse_size(text: str) -> int:
    """Bytes of a size such as "80GiB", "1.5 GB" or "4096".

    Raises:
        ShapeError: no number, an unknown unit, or nothing.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit:
        raise ShapeError(f"size {text}: expected a number and B, KB, MB, GB, KiB, MiB or GiB; as in 80GiB")
    size = math.floor(float(match[1]) * unit)
    if size < 1:
        raise ShapeError(f"size {text}: expected a byte or more; as in 80GiB")
    return size
