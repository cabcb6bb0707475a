"""No call of a CPU pool holds a second copy of what is stored."""

import json
import pathlib
import subprocess
import sys

import pool_memory
import pytest

# Rows, outputs and what threads work with; a layer's K and V in half precision would be 33.6 MB.
MOST = 6e6


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(),
    reason="the high-water mark of a process is read from /proc",
)
def test_no_call_copies_what_is_stored(capsys):
    # A process of its own: what others left to the allocator would be used first.
    line = [sys.executable, pool_memory.__file__]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    peaks, image = found["peaks"], found["image"]
    with capsys.disabled():
        print("\npeaks in MB:", {name: round(count / 1e6, 1) for name, count in peaks.items()})
        print(f"image of the sequence: {image / 1e6:.1f} MB")
    assert image > 50e6
    # Saving makes the sequence's image, once.
    assert peaks.pop("save") <= image + MOST
    assert max(peaks.values()) <= MOST
