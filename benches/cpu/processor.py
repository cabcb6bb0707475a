"""The processor that is measured, and how many of its threads."""

import os
import pathlib
import platform

import torch
from kvarn import _kvarn

THREADS = 2


def use_threads(count):
    """Give kvarn and torch so many threads: once for each process, before kvarn's first work.

    Raises:
        RuntimeError: kvarn refuses the number.
    """
    os.environ["KVARN_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
    if _kvarn.threads() != count:
        raise RuntimeError(f"{count} threads: kvarn would use {_kvarn.threads()}; expected 1 to 1024")


def name():
    """The processor's name as the system has it."""
    found = platform.processor() or platform.machine()
    listed = pathlib.Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                found = line.partition(":")[2].strip()
                break
    return found


def facts(threads):
    """What a run notes beside the processor's name."""
    return {"cores": os.cpu_count(), "threads": threads, "features": list(_kvarn.cpu_features())}


def describe(run):
    """One line on the processor of a run."""
    features = ", ".join(run["features"]) or "none"
    return (
        f"{run['device']}, {run['cores']} cores, {run['threads']} threads, instruction sets that kvarn uses: "
        f"{features}; torch {run['torch']}, commit {run['commit'][:10]}."
    )
