"""The command `kvarn`: generate, estimate, inspect, convert, presets, doctor.

torch and transformers are imported only by the commands that run a model. Every error of kvarn ends a command
with one line on standard error and exit status 2; `KVARN_TRACEBACK=1` shows the traceback instead.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import kvarn
from kvarn.cli import convert, doctor, estimate, generate, inspect, presets
from kvarn.cli.console import errors

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT."""


def parser() -> argparse.ArgumentParser:
    """The argument parser of the whole command."""
    root = argparse.ArgumentParser(prog="kvarn", description="KVarN: a quantised KV cache for LLM inference.")
    root.add_argument("--version", action="version", version=f"kvarn {kvarn.__version__}")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    for command in (generate, estimate, inspect, convert, presets, doctor):
        command.add_parser(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        0, 2 after an error of kvarn, 130 after Ctrl-C. A wrong option raises SystemExit(2), as argparse does.
    """
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except kvarn.KvarnError as error:
        if os.environ.get("KVARN_TRACEBACK") == "1":
            raise
        errors().print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors().print("interrupted", style="yellow")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has closed; what Python would still flush has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
