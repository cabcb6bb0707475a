"""All checks on a GPU, and compute-sanitizer on a small one: `python tests/gpu/run.py [--out FILE]`.

Runs each script of this folder, prints what it printed last and what failed, and with `--out` writes JSON
with device and commit. The exit status is 1 if anything failed. `--again FILE` repeats what failed in such a
JSON; each run has the commit that it was of. Scripts run side by side, but those that measure what others
would disturb alone, afterwards.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import torch

HERE = pathlib.Path(__file__).resolve().parent
# Those that take longest first.
SCRIPTS = (
    "check_transformers.py",
    "check_static.py",
    "check_truncations.py",
    "check.py",
    "check_continuous.py",
    "check_long.py --no-times",
    "check_parts.py",
    "check_saved.py",
    "check_golden.py",
    "check_prefixes.py",
)
# Small runs, under each tool of compute-sanitizer.
SMALL = ("check.py --small", "check_parts.py --small")
# These measure times, or what the whole device has given out.
ALONE = ("check_host.py", "check_memory.py")
# Kernels of torch may read what nobody wrote: only ours are watched for that. What copies read is not watched
# either, as torch's kernels may have written it unseen.
TOOLS = {
    "memcheck": [],
    "racecheck": [],
    "initcheck": ["--kernel-name", "kns=kvarn", "--check-api-memory-access", "no"],
}
SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: .*")


def label(command, tool):
    """What a run is called."""
    return " ".join([*wrapper_of(tool), f"python tests/gpu/{command}"])


def wrapper_of(tool):
    """What comes before the command of a run under a tool of compute-sanitizer."""
    if tool is None:
        return []
    return ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", *TOOLS[tool]]


def run(command, limit, tool=None):
    """Runs a command of this folder; what to report of it."""
    # Processes side by side would each start a thread for every core.
    alone = command.split()[0] in ALONE
    limits = {} if alone else {"OMP_NUM_THREADS": "2", "KVARN_NUM_THREADS": "2"}
    started = time.time()
    script, *options = command.split()
    line = [*wrapper_of(tool), sys.executable, str(HERE / script), *options]
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=limit, check=False, env=os.environ | limits
        )
        text, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        text, status = (error.stdout or b"").decode(), f"not done after {limit} s"
    # Tracebacks name files from the root of the project on, wherever that lies.
    lines = [line.replace(f"{HERE.parents[1]}/", "") for line in text.splitlines() if line.strip()]
    counted = [line for line in lines if re.search(r"\d+ failed", line)]
    return {
        "command": label(command, tool),
        "printed": counted[-1] if counted else " / ".join(lines[-3:]),
        "failures": [line for line in lines if line.startswith("FAILED")],
        "notes": [line.strip() for line in lines if line.startswith("  ")] if script in ALONE else [],
        "status": status,
        "seconds": round(time.time() - started),
        "text": text,
        # Behind a failure lies its traceback; compute-sanitizer begins with what it found.
        "end": [] if status == 0 else (lines if len(lines) <= 60 else [*lines[:20], "…", *lines[-40:]]),
    }


def sanitize(tool, command, limit):
    """compute-sanitizer on a small run."""
    found = run(command, limit, tool)
    summary = SUMMARY.search(found["text"])
    clean = summary is not None and re.search(r": 0 (errors|hazards)", summary[0]) is not None
    return {
        **found,
        "printed": (summary[0] if summary else "no summary") + "; " + found["printed"],
        "status": 0 if clean and found["status"] == 0 else found["status"] or 1,
    }


def report(found):
    """Prints one result."""
    word = "FAILED" if found["status"] else "ok"
    print(f"{word} {found['command']}: {found['printed']} ({found['seconds']} s)")
    for line in found["failures"][:8] + found["notes"] + found["end"]:
        print(f"    {line[:300]}")
    sys.stdout.flush()


def wanted(again):
    """(command, tool or None, alone) of every run, or of those that failed in the JSON `again`."""
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer:
        print("compute-sanitizer is not installed: its runs are missing")
    # racecheck takes longest.
    runs = [(command, tool, False) for tool in reversed(TOOLS) for command in SMALL if sanitizer]
    runs += [(command, None, False) for command in SCRIPTS]
    runs += [(command, None, True) for command in ALONE]
    if again is None:
        return runs
    failed = {found["command"] for found in again["runs"] if found["status"]}
    return [(command, tool, alone) for command, tool, alone in runs if label(command, tool) in failed]


def measure(runs, limit):
    """The results of runs, as they come."""
    with concurrent.futures.ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 2)) as pool:
        jobs = [
            pool.submit(run, command, limit) if tool is None else pool.submit(sanitize, tool, command, limit)
            for command, tool, alone in runs
            if not alone
        ]
        for job in concurrent.futures.as_completed(jobs):
            yield job.result()
    for command, _, alone in runs:
        if alone:
            yield run(command, limit)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="file for the JSON")
    parser.add_argument("--commit", help="commit to note")
    parser.add_argument("--limit", type=int, default=1200, help="seconds that a script may take")
    parser.add_argument("--again", type=pathlib.Path, help="JSON: repeat what failed there, keep the rest")
    arguments = parser.parse_args()
    before = json.loads(arguments.again.read_text()) if arguments.again else None
    results = []
    for found in measure(wanted(before), arguments.limit):
        report(found)
        results.append({"commit": arguments.commit, **found})
    failed = sum(found["status"] != 0 for found in results)
    print(f"{len(results)} runs, {failed} failed")
    if arguments.out:
        new = {found["command"] for found in results}
        kept = [{key: found[key] for key in found if key != "text"} for found in results]
        kept += [found for found in before["runs"] if found["command"] not in new] if before else []
        kept.sort(key=lambda found: found["command"])
        head = {
            "device": torch.cuda.get_device_name(),
            "commit": arguments.commit,
            "torch": torch.__version__,
        }
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump({**head, "command": "python tests/gpu/run.py", "runs": kept}, file, indent=1)
            file.write("\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
