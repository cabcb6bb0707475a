"""Where commands write: results to standard output, progress and errors to standard error.

rich leaves colours out when `NO_COLOR` is set or the output is no terminal. Consoles are made per use, so
that they follow a redirected `sys.stdout`.
"""

import json
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def results() -> Console:
    """The console for results."""
    return Console(highlight=False)


def errors() -> Console:
    """The console for errors, progress and notes."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Write one JSON document to standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def progress() -> Progress:
    """A progress bar on standard error that leaves nothing behind; none where that is no terminal."""
    console = errors()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def table(title: str, *columns: str) -> Table:
    """An empty table: the first column is text, the others are numbers, right aligned."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=not index)
    return made
