"""Times on the CPU: medians of alternating runs over cold memory."""

import statistics
import time

import torch

# Several times the last-level cache that two threads have of a present CPU.
COLD_BYTES = 256 << 20
# Longer than threads of torch's OpenMP look for more work before they sleep.
PAUSE_S = 0.008
# How long the threads of a call are given other work before it: what a layer before would have done. Woken
# from a pause, two of them may share one core of a virtual machine for a whole call.
WAKE_S = 0.008
# A call that would take longer in all its timed runs gets fewer of them, but LEAST_RUNS.
BUDGET_S, LEAST_RUNS = 2.0, 2


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Alternation:
    """Calls that take turns, so that all of them meet the same clock and neighbours.

    Before each timed call a plain read of `cold_bytes` bytes, torch's sum of a float32 tensor by torch's
    threads, displaces what the last-level cache holds: a call finds cold memory, as a layer of a model does.
    These reads are timed too; they are what "plain read" means in tables. A pause follows: torch's threads,
    which look for more work for some milliseconds, would take cores from a call that brings its own threads.
    Those are woken by other work of theirs.

    Args:
        runs: timed runs of each call, behind one that is not; fewer of a call that takes long.
        cold_bytes: bytes of a plain read.

    Attributes:
        seconds: the times of each call by name; more are added by each `run`.
        reads: the times of the plain reads.
    """

    def __init__(self, runs, cold_bytes=COLD_BYTES):
        self.runs, self.seconds, self.reads = runs, {}, []
        self._cold = torch.ones(cold_bytes // 4)

    def run(self, calls, wakes=None):
        """Run calls in turns.

        Args:
            calls: functions without arguments, by name.
            wakes: work for the threads of a call, on other memory, by the call's name; torch's need none.
        """
        runs = {name: self._runs(seconds_of(call)) for name, call in calls.items()}
        for turn in range(self.runs):
            for name, call in calls.items():
                if turn >= runs[name]:
                    continue
                self.reads.append(seconds_of(self._cold.sum))
                time.sleep(PAUSE_S)
                wake = (wakes or {}).get(name)
                awake = time.perf_counter() + WAKE_S
                while wake and time.perf_counter() < awake:
                    wake()
                self.seconds.setdefault(name, []).append(seconds_of(call))

    def _runs(self, seconds):
        return min(self.runs, max(LEAST_RUNS, int(BUDGET_S / seconds)))

    def us(self, name):
        """Median µs of a call."""
        return statistics.median(self.seconds[name]) * 1e6

    @property
    def read_bytes_per_s(self):
        """Bytes per second of the plain reads, from their median."""
        return self._cold.nbytes / statistics.median(self.reads)
