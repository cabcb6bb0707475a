"""Tables and JSON rows of `kvarn generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kvarn.cli.console import table
from kvarn.eval import sixteen_bit_bytes

if TYPE_CHECKING:
    from kvarn.cli.generate import Job
    from kvarn.cli.generation import Run

MIB = 1 << 20


def run_rows(runs: Sequence[Run], job: Job) -> list[dict[str, Any]]:
    """One row per run, ready for JSON. Times in seconds, speeds in tokens per second, sizes in bytes."""
    return [_row(run, job) for run in runs]


def _row(run: Run, job: Job) -> dict[str, Any]:
    sixteen = sixteen_bit_bytes(job.loaded.model, run.bytes.tokens)
    steps = len(run.tokens) - 1
    return {
        "model": job.loaded.source.label,
        "kv_cache_dtype": run.name,
        "prompt_tokens": len(job.prompt),
        "new_tokens": len(run.tokens),
        "text": run.text,
        "prefill_seconds": run.prefill_seconds,
        "decode_seconds": run.decode_seconds,
        "prefill_tokens_per_second": len(job.prompt) / run.prefill_seconds,
        "decode_tokens_per_second": steps / run.decode_seconds if steps else None,
        "cache": {
            "tokens": run.bytes.tokens,
            "pages": run.bytes.pages,
            "slots": run.bytes.slots,
            "tables": run.bytes.tables,
            "dense": run.bytes.dense,
            "total": run.bytes.total,
            "per_token": run.bytes.per_token,
            "sixteen_bit": sixteen,
            "ratio_to_16_bit": sixteen / run.bytes.total,
        },
    }


def run_table(runs: Sequence[Run], job: Job) -> Table:
    """Speed and memory, one line per run."""
    rows = run_rows(runs, job)
    made = table(
        f"{rows[0]['model']}, {rows[0]['prompt_tokens']:,} prompt tokens; speeds in tokens/s",
        "cache",
        "new",
        "prefill",
        "decode",
        "MiB",
        "B/token",
        "× smaller",
    )
    for row in rows:
        cache, decode = row["cache"], row["decode_tokens_per_second"]
        made.add_row(
            row["kv_cache_dtype"],
            str(row["new_tokens"]),
            f"{row['prefill_tokens_per_second']:.0f}",
            "–" if decode is None else f"{decode:.1f}",
            f"{cache['total'] / MIB:.2f}",
            f"{cache['per_token']:,.0f}",
            f"{cache['ratio_to_16_bit']:.2f}",
        )
    held = [_held(row) for row in rows if row["cache"]["slots"]]
    made.caption = "\n".join(["× smaller: than 16 bit, everything counted", *held])
    made.caption_justify = "left"
    return made


def _held(row: dict[str, Any]) -> str:
    cache = row["cache"]
    parts = [
        ("records", "pages"),
        ("sinks and tail", "slots"),
        ("tables", "tables"),
        ("stock layers", "dense"),
    ]
    shown = ", ".join(f"{label} {cache[key] / MIB:.2f}" for label, key in parts if cache[key])
    return f"{row['kv_cache_dtype']}, MiB: {shown}"
