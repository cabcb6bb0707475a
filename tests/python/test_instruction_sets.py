"""The codec's and the pool's tests on every instruction set that this processor has, below the one in use."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from kvarn import _kvarn

HERE = pathlib.Path(__file__).parent
FILES = ("test_golden_records.py", "test_codec_against_reference.py", "test_pool_against_reference.py")
USED, NAMES = _kvarn.instruction_set()


def run(name, *arguments):
    """A Python process with this instruction set at most."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"KVARN_CPU": name},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_codec_and_pool(name):
    if NAMES.index(name) > NAMES.index(USED):
        pytest.skip(f"{name}: {USED} is the most that this processor has, or that KVARN_CPU allows")
    found = json.loads(run(name, "-m", "kvarn", "doctor", "--json"))
    assert found["instruction_set"] == name
    if name != USED:  # which the suite itself runs on
        printed = run(
            name, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / file) for file in FILES)
        )
        assert "passed" in printed.splitlines()[-1]
        assert "failed" not in printed
