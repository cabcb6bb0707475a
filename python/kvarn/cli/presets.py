"""`kvarn presets`: the configurations with a name, and what each costs."""

import argparse
from typing import Any

import kvarn
from kvarn.cli.console import print_json, results, table


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `kvarn`."""
    parser = commands.add_parser("presets", help="list presets with their bits and record sizes")
    parser.add_argument(
        "--head-dim", type=int, default=128, metavar="D", help="head dimension (default: 128)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
    rows = [describe(name, arguments.head_dim) for name in kvarn.presets()]
    if arguments.json:
        print_json({"head_dim": arguments.head_dim, "presets": rows})
        return
    shown = table(
        f"Presets at head dim {arguments.head_dim}; sizes in bytes, bits per element of K and V",
        "name",
        "K",
        "V",
        "tile",
        "record",
        "bits",
        "× smaller",
    )
    for row in rows:
        shown.add_row(
            row["name"],
            str(row["key_bits"]),
            str(row["value_bits"]),
            str(row["group"]),
            f"{row['record_bytes']:,}",
            f"{row['bits_per_element']:.3f}",
            f"{row['ratio_to_16_bit']:.2f}",
        )
    results().print(shown)
    results().print(
        "A record holds one tile (K and V of one head), every parameter and padding included.\n"
        "Sinks and tail are unquantised and come on top."
    )


def describe(name: str, head_dim: int) -> dict[str, Any]:
    """One preset's figures at a head dimension."""
    config = kvarn.Config(name, head_dim=head_dim)
    return {
        "name": name,
        "key_bits": config.key_bits,
        "value_bits": config.value_bits,
        "group": config.group,
        "record_bytes": config.record_bytes,
        "bits_per_element": config.bits_per_element,
        "ratio_to_16_bit": 16 / config.bits_per_element,
    }
