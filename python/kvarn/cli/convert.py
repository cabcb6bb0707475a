"""`kvarn convert`: native records to published ones and back, or an error where something would be lost."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvarn
from kvarn import Config
from kvarn.cli.console import print_json, results
from kvarn.cli.published_file import parameters, read_published, write_published
from kvarn.errors import ConfigError, FormatError

_MAGIC = b"KVARNREC"
_FORMAT = """\
A file of native records, as kvarn.save_records writes it, becomes a NumPy .npz file with the array
"record", uint8 [tiles, published_bytes], in the order of the published implementation, and the
configuration as integers. Such a .npz file becomes a file of native records. What IN holds decides;
both orders are described in docs/format.md.

Published records have 2, 4 or 8 bits: 3-bit records cannot be converted. From native records to
published ones and back gives the same bytes. Published records get a range guard, a power of two
moved between their scales: decoded values are the same, bytes may differ. Where a scale is too small
or too large for that to be exact, nothing is written.
"""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `kvarn`."""
    parser = commands.add_parser(
        "convert",
        help="native records to published ones and back",
        epilog=_FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "input", type=Path, metavar="IN", help="native records, or published ones in a .npz file"
    )
    parser.add_argument(
        "output", type=Path, metavar="OUT", help="the file to write; .npz for published records"
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="configuration of published records whose file does not say it; with --head-dim",
    )
    parser.add_argument("--head-dim", type=int, metavar="D", help="their head dimension; with --config")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert, write, say what was written."""
    source, target = arguments.input, arguments.output
    given = _given(arguments)
    if _is_native(source):
        if given is not None:
            raise ConfigError(
                f"--config with native records, {source}: expected it for published ones; leave it out"
            )
        report = _to_published(source, target)
    else:
        report = _to_native(source, target, given)
    if arguments.json:
        print_json({"input": str(source), "output": str(target), **report})
        return
    results().print(
        f"{target}: {report['tiles']:,} {report['order']} records of {report['config']}, "
        f"head dim {report['head_dim']}, {report['record_bytes']:,} bytes each{report.get('note', '')}",
        markup=False,
        soft_wrap=True,
    )


def _given(arguments: argparse.Namespace) -> Config | None:
    """The configuration of the options: of the published encoder."""
    name, head_dim = arguments.config, arguments.head_dim
    if name is None and head_dim is None:
        return None
    if name is None or head_dim is None:
        raise ConfigError(
            f"--config {name} with --head-dim {head_dim}: expected both or neither; pass the other one too"
        )
    return Config(name, head_dim=head_dim, refit=False)


def _is_native(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise FormatError(
            f"{path}: {error.strerror or error}: expected a readable file of records; check the path"
        ) from error


def _to_published(source: Path, target: Path) -> dict[str, Any]:
    if target.suffix.lower() != ".npz":
        raise ConfigError(f"OUT {target} for published records: expected a name that ends in .npz; change it")
    records, cfg = kvarn.load_records(source)
    published = kvarn.to_published(records, cfg)
    back, _ = _from_published(published, cfg)
    if (changed := _first(np.any(back != records, axis=1))) is not None:
        raise FormatError(
            f"tile {changed} of {source}: expected a record of kvarn's encoder, whose range guard and "
            "padding come back as they were; keep the native records"
        )
    write_published(target, published, cfg)
    return _report("published", published, cfg)


def _to_native(source: Path, target: Path, given: Config | None) -> dict[str, Any]:
    if target.suffix.lower() == ".npz":
        raise ConfigError(
            f"OUT {target} for native records: expected a name that does not end in .npz; name it .kvarn"
        )
    published, cfg = read_published(source, given)
    records, saturated = _from_published(published, cfg)
    folded = kvarn.to_published(records, cfg)
    inexact = _first(~_are_equal(published, folded, cfg))
    if saturated or inexact is not None:
        where = "" if inexact is None else f"tile {inexact} of "
        raise FormatError(
            f"{where}{source} with scales that are not finite, too small or too large for a range guard: "
            "expected ones that a power of two moves exactly; keep the published records"
        )
    try:
        kvarn.save_records(target, records, cfg)
    except OSError as error:
        raise FormatError(
            f"{target}: {error.strerror or error}: expected a file to write; check the path"
        ) from error
    guarded = int(np.any(folded != published, axis=1).sum())
    note = f"; {guarded:,} got a range guard: the same values, other bytes" if guarded else ""
    return {**_report("native", records, cfg), "guarded": guarded, "note": note}


def _report(order: str, records: NDArray[np.uint8], cfg: Config) -> dict[str, Any]:
    return {
        "order": order,
        "tiles": len(records),
        "record_bytes": records.shape[1],
        "config": cfg.name,
        "head_dim": cfg.head_dim,
        "refit": cfg.refit,
    }


def _from_published(published: NDArray[np.uint8], cfg: Config) -> tuple[NDArray[np.uint8], bool]:
    """Native records, and whether a parameter saturated."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        records = kvarn.from_published(published, cfg)
    return records, bool(caught)


def _are_equal(one: NDArray[np.uint8], other: NDArray[np.uint8], cfg: Config) -> NDArray[np.bool_]:
    """Of each tile, whether two published records with the same codes decode to the same values.

    They do if rows and columns of each side differ by one power of two and its inverse.
    """
    equal = np.ones(len(one), np.bool_)
    for mine, theirs in zip(parameters(one, cfg), parameters(other, cfg), strict=True):
        # Of the largest parameters the factor can be told, if there are any; it is checked on all.
        top, bottom = (np.abs(side.rows).max(axis=1, initial=0) for side in (mine, theirs))
        some = (top > 0) & (bottom > 0)
        factor = np.where(some, top, 1) / np.where(some, bottom, 1)
        with np.errstate(invalid="ignore"):  # NaN is equal to nothing
            equal &= np.frexp(factor)[0] == 0.5
            equal &= (mine.rows == theirs.rows * factor[:, None]).all(axis=1)
            equal &= (mine.columns * factor[:, None] == theirs.columns).all(axis=1)
    return equal


def _first(found: NDArray[np.bool_]) -> int | None:
    """Index of the first true element."""
    return int(found.argmax()) if found.any() else None
