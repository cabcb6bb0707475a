"""What every benchmark here has in common: arguments, rows printed as they come, the JSON file, failures."""

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import time
import traceback

import kvarn
import torch


def parser(description):
    """An argument parser with the options that all scripts share."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", metavar="FILE", help="write the rows as JSON, anew after each row")
    made.add_argument("--commit", help="commit to note; default: asked of git")
    made.add_argument("--small", action="store_true", help="a few small rows, to see that it runs")
    return made


class Report:
    """Rows of one run, with what is needed to repeat it.

    The file is written after every row, so that a run that is cut short leaves what it has. `missing` holds
    what could not be measured, and why; `failed` what should have been measured and broke.

    Args:
        arguments: what the parser found.
        script: the script's path below benches.
        device: its name; by default torch's for the GPU.
        facts: more to note of the run.
    """

    def __init__(self, arguments, script, device=None, **facts):
        self._path = arguments.out
        self._began = time.perf_counter()
        self.rows = []
        self.missing = {}
        self.failed = {}
        self.head = {
            "device": device or (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
            "commit": arguments.commit or _commit(),
            "command": command(script, sys.argv[1:]),
            "kvarn": kvarn.__version__,
            "torch": torch.__version__,
            **facts,
        }
        print(
            f"kvarn {kvarn.__version__} {self.head['commit'][:10]}, torch {torch.__version__}, "
            f"{self.head['device']}",
            flush=True,
        )

    def row(self, text, **values):
        """Print one line and keep its values."""
        print(text, flush=True)
        self.rows.append(values)
        self._write()

    def miss(self, name, reason):
        """Note what could not be measured; said once for each reason."""
        reason = str(reason).strip().split("\n")[0][:300]
        reasons = self.missing.setdefault(name, [])
        if reason not in reasons:
            reasons.append(reason)
            print(f"missing: {name}: {reason}", flush=True)
            self._write()

    @contextlib.contextmanager
    def part(self, name):
        """Run a part; if it breaks, say so and go on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
            self.failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            self._write()

    def close(self):
        """Print the counts; return the exit status, 1 if a part broke or nothing was measured."""
        seconds = time.perf_counter() - self._began
        self._write()
        print(
            f"{len(self.rows)} rows, {len(self.failed)} parts failed, {len(self.missing)} missing, "
            f"{seconds:.0f} s",
            flush=True,
        )
        return int(bool(self.failed) or not self.rows)

    def values(self):
        """What the file holds."""
        return self.head | {"rows": self.rows, "missing": self.missing, "failed": self.failed}

    def _write(self):
        if self._path:
            with open(self._path, "w", encoding="utf-8") as file:
                json.dump(self.values(), file, indent=1)
                file.write("\n")


def command(script, options):
    """The command to note: without --out and --commit, which say where and what, not how."""
    kept, skip = [], False
    for option in options:
        if skip:
            skip = False
        elif option in ("--out", "--commit"):
            skip = True
        elif not option.startswith(("--out=", "--commit=")):
            kept.append(option)
    return shlex.join(["python", f"benches/{script}", *kept])


def _commit():
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"
