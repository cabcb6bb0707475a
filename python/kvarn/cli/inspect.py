"""`kvarn inspect`: K and V of a file, tile by tile: how uneven they are, and what the codec makes of them."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from rich.markup import escape

import kvarn
from kvarn.cli.codec_error import CodecError
from kvarn.cli.console import progress, results, table
from kvarn.cli.error_chart import error_chart
from kvarn.cli.kv_file import NAMES, SHAPE, KvFile, Layer
from kvarn.cli.tile_statistics import TileStatistics
from kvarn.errors import ConfigError, ShapeError
from kvarn.reference import rotate

BITS = ("k4v4", "k4v2", "k3v3", "k2v2")
ENCODERS = {"refit": True, "published": False}

_FORMAT = f"""\
FILE is a NumPy .npz or a .safetensors file with keys and values, after RoPE and not rotated by
the codec (--rotated if they are). Each is of shape {SHAPE} and of type
float16, bfloat16 (safetensors only) or float32; the two agree in both. They are named
{NAMES} (LAYER a number: 0, 1, …), or as
--k and --v say, which a file needs that has names of two of these kinds. Other arrays are ignored.

Tokens beyond the last whole tile are left out, and counted.

Printed for each layer:
  rms              root of the mean square of a tile
  peak             largest |x| of a tile over its rms
  channel spread   largest over smallest standard deviation of a channel, over the tile's tokens
  token spread     largest over smallest standard deviation of a token, over its channels
                   all as median (largest) of the tiles, before and after the rotation
  B/token          bytes of records for a token: all KV heads, K and V
  K error, V error relative L2 error after encoding and decoding, in percent
  K scale, V scale token-scale error <x, decoded x>/<x, x> - 1 of each token and KV head,
                   in percent: mean ± standard deviation
for each pair of bits, with refit and as published.
"""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `kvarn`."""
    parser = commands.add_parser(
        "inspect",
        help="say what the codec makes of the K and V in a file, by bits",
        epilog=_FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a .npz or .safetensors file; see below")
    parser.add_argument("--k", metavar="NAME", help="the array of keys; with --v")
    parser.add_argument("--v", metavar="NAME", help="the array of values; with --k")
    parser.add_argument(
        "--group", type=int, choices=(128, 64), default=128, help="tokens of a tile (default: 128)"
    )
    parser.add_argument(
        "--rotated", action="store_true", help="K and V are in the rotated (Hadamard) frame already"
    )
    parser.add_argument("--heads", action="store_true", help="the same for each KV head too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw errors by layer and bits as SVG")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write JSON and plot if asked to; print the tables."""
    for option in ("json", "plot"):
        path = getattr(arguments, option)
        if path and not path.parent.is_dir():
            raise ConfigError(
                f"--{option} {path}: expected a path in a folder that exists; make the folder first"
            )
    file = KvFile(arguments.file, arguments.k, arguments.v)
    for layer in file.layers:
        _check(layer, arguments.group)
    heads = sum(layer.kv_heads for layer in file.layers)
    rows = []
    with progress() as bars:
        bar = bars.add_task("encoding", total=heads * len(BITS) * len(ENCODERS))
        for layer in file.layers:
            k, v = file.read(layer)
            rows.append(
                inspect_layer(
                    layer,
                    k,
                    v,
                    arguments.group,
                    rotated=arguments.rotated,
                    heads=arguments.heads,
                    advance=lambda: bars.advance(bar),
                )
            )
    found = {
        "file": str(arguments.file),
        "group": arguments.group,
        "rotated": arguments.rotated,
        "layers": rows,
    }
    if arguments.json:
        text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
        _write("--json", arguments.json, text + "\n")
    if arguments.plot:
        title = f"{arguments.file.name}, tiles of {arguments.group} tokens"
        _write("--plot", arguments.plot, error_chart(title, rows))
    for row in rows:
        _print_layer(row, arguments.group)


def inspect_layer(
    layer: Layer,
    k: NDArray[Any],
    v: NDArray[Any],
    group: int,
    *,
    rotated: bool,
    heads: bool,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The figures of one layer, ready for JSON.

    Args:
        layer: what the file says of it.
        k: keys [tokens, kv_heads, head_dim], float16 or float32.
        v: values, of the same shape and type.
        group: tokens of a tile.
        rotated: K and V are in the rotated frame.
        heads: add the figures of each KV head.
        advance: called after each encoding of a KV head.
    """
    tiles = layer.tokens // group
    statistics: list[dict[str, TileStatistics]] = []
    errors: list[dict[str, dict[str, CodecError]]] = []
    for head in range(layer.kv_heads):
        of_k, of_v = (x[: tiles * group, head].reshape(tiles, group, layer.head_dim) for x in (k, v))
        statistics.append(_frames(of_k, of_v, rotated))
        made: dict[str, dict[str, CodecError]] = {}
        for bits in BITS:
            made[bits] = {}
            for encoder, refit in ENCODERS.items():
                cfg = _config(layer, bits, group).replace(refit=refit)
                made[bits][encoder] = CodecError.of(
                    of_k, of_v, cfg, rotated=rotated, bfloat16=layer.dtype == "bfloat16"
                )
                advance()
        errors.append(made)
    row = {
        "layer": layer.number,
        "k": layer.k,
        "v": layer.v,
        "dtype": layer.dtype,
        "tokens": layer.tokens,
        "tokens_left_out": layer.tokens - tiles * group,
        "kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "tiles": tiles * layer.kv_heads,
        **_figures(layer, group, statistics, errors),
    }
    if heads:
        row["heads"] = [
            {"head": head, **_figures(layer, group, [statistics[head]], [errors[head]])}
            for head in range(layer.kv_heads)
        ]
    return row


def _frames(k: NDArray[Any], v: NDArray[Any], rotated: bool) -> dict[str, TileStatistics]:
    """Statistics of both in the frame of the model and in the rotated one; rotating twice changes nothing."""
    frames = {}
    for name, given in (("k", k), ("v", v)):
        there, here = TileStatistics.of(given), TileStatistics.of(rotate(given))
        frames[name], frames[f"{name}_rotated"] = (here, there) if rotated else (there, here)
    return frames


def _figures(
    layer: Layer,
    group: int,
    statistics: list[dict[str, TileStatistics]],
    errors: list[dict[str, dict[str, CodecError]]],
) -> dict[str, Any]:
    """Figures of KV heads together: one entry of `statistics` and `errors` for each."""
    rows = []
    for bits in BITS:
        cfg = _config(layer, bits, group)
        row: dict[str, Any] = {
            "preset": cfg.name,
            "bytes_per_token": len(errors) * cfg.record_bytes / group,
            "times_smaller": 16 / cfg.bits_per_element,
        }
        for encoder in ENCODERS:
            row[encoder] = CodecError.together([each[bits][encoder] for each in errors]).summary()
        rows.append(row)
    return {
        "statistics": {
            name: TileStatistics.together([each[name] for each in statistics]).summary()
            for name in statistics[0]
        },
        "bits": rows,
    }


def _check(layer: Layer, group: int) -> None:
    _config(layer, BITS[0], group)
    if layer.tokens < group:
        fix = "use --group 64, or more tokens" if group == 128 else "use more tokens"
        raise ShapeError(
            f"{layer.k} of {layer.tokens} tokens: expected a tile of {group} or more, in {SHAPE}; {fix}"
        )


def _config(layer: Layer, bits: str, group: int) -> kvarn.Config:
    try:
        return kvarn.Config(f"kvarn_{bits}_g{group}", head_dim=layer.head_dim)
    except ConfigError as error:
        raise ConfigError(f"{layer.k}: {error}") from error


def _print_layer(row: dict[str, Any], group: int) -> None:
    shape = (
        f"{row['tokens']:,} tokens, {row['kv_heads']} KV heads, head dim {row['head_dim']}, {row['dtype']}"
    )
    tiles = f"{row['tiles']:,} tiles of {group} tokens, {row['tokens_left_out']:,} tokens left out"
    names = escape(f"{row['k']}, {row['v']}")
    results().print(f"[bold]{names}[/]: {shape}; {tiles}", soft_wrap=True)
    for part in (row, *row.get("heads", ())):
        name = f"KV head {part['head']}: " if "head" in part else ""
        _print_statistics(f"{name}tiles before the codec, median (largest)", part["statistics"])
        _print_errors(f"{name}after the codec: errors in percent, × smaller than 16 bit", part["bits"])
    worst = max(part[encoder]["saturated"] for part in row["bits"] for encoder in ENCODERS)
    if worst:
        results().print(
            f"Up to {worst:,} values or parameters were beyond half range and stored as the largest.\n",
            soft_wrap=True,
        )


def _print_statistics(title: str, statistics: dict[str, Any]) -> None:
    shown = table(title, "", "rms", "peak", "channel spread", "token spread")
    for name, each in statistics.items():
        cells = [f"{item['median']:.3g} ({item['largest']:.3g})" for item in each.values()]
        shown.add_row(name[0].upper() + name[1:].replace("_", " "), *cells)
    results().print(shown)


def _print_errors(title: str, rows: list[dict[str, Any]]) -> None:
    shown = table(title, "", "B/token", "×", "K error", "V error", "K scale", "V scale")
    for scale in shown.columns[-2:]:
        scale.no_wrap = True
    for bits, row in zip(BITS, rows, strict=True):
        sizes = f"{row['bytes_per_token']:,.0f}", f"{row['times_smaller']:.2f}"
        for encoder, label, size in (
            ("refit", f"{bits} refit", sizes),
            ("published", "published", ("", "")),
        ):
            both = [row[encoder][name] for name in ("k", "v")]
            shown.add_row(label, *size, *map(_error_text, both), *map(_scale_text, both))
    results().print(shown)


def _error_text(figures: dict[str, float | None]) -> str:
    error = figures["error"]
    return "–" if error is None else _percent(error)


def _scale_text(figures: dict[str, float | None]) -> str:
    mean, spread = figures["scale_mean"], figures["scale_spread"]
    return "–" if mean is None or spread is None else f"{_percent(mean)} ±{_percent(spread)}"


def _percent(share: float) -> str:
    percent = 100 * share
    # Adding 0 turns a negative zero into a positive one.
    return f"{round(percent, 2) + 0.0:.{2 if abs(percent) < 10 else 1}f}"


def _write(option: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise kvarn.KvarnError(
            f"{option} {path}: {error.strerror}: expected a file that can be written; choose another path"
        ) from error
