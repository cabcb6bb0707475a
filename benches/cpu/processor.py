"""The processor that is measured, and how many of its threads."""

import os
import pathlib
import platform
import time

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
    return {"cores": os.cpu_count(), "threads": threads, "instruction_set": _kvarn.instruction_set()[0]}


class Neighbours:
    """How busy others keep the processor from now on: figures of a busy one are not to be relied on."""

    def __init__(self):
        self._began, self._others = time.perf_counter(), self._seconds()

    def cores(self):
        """Cores that other processes kept busy on average; None where the system does not say."""
        others = self._seconds()
        if others is None or self._others is None:
            return None
        return max(0.0, others - self._others) / (time.perf_counter() - self._began)

    @staticmethod
    def _seconds():
        """Processor seconds of all processes but this one and its children that have ended."""
        listed = pathlib.Path("/proc/stat")
        if not listed.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, listed.read_text().split()[1:9])
        spent = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return spent - sum(os.times()[:4])


def describe(run):
    """One line on the processor of a run."""
    others = run.get("others_cores")
    busy = "an unknown number of" if others is None else f"{others:.1f}"
    return (
        f"{run['device']}, {run['cores']} cores, {run['threads']} threads, kvarn with "
        f"{run['instruction_set']}; torch {run['torch']}, commit {run['commit'][:10]}. "
        f"Others kept {busy} cores busy."
    )
