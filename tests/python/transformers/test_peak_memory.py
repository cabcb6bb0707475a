"""Peak memory while generating stays within what `kvarn.capacity` says."""

import json
import pathlib
import subprocess
import sys

import peak_memory
import pytest


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(),
    reason="the high-water mark of a process is read from /proc",
)
def test_peak_memory(capsys):
    # A process of its own: what others left to the allocator would be used first.
    line = [sys.executable, peak_memory.__file__]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    with capsys.disabled():
        print("\npeak memory in MB:", {name: round(count / 1e6, 1) for name, count in found.items()})
    assert peak_memory.within(found)
    # Else the limit would hold for a dense cache too.
    assert found["dense"] > 1.5 * peak_memory.limit(found)
