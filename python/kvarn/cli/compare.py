"""`kvarn generate --compare`: one prompt through a 16-bit cache, KVarN as published and KVarN with refit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import Progress
from rich.text import Text

from kvarn.cli.console import print_json, progress, results, table
from kvarn.cli.generation import Run, generate, warm_up
from kvarn.cli.report import run_rows, run_table
from kvarn.eval import Arm, Divergence, dense_arm, divergence, kvarn_arm

if TYPE_CHECKING:
    from kvarn.cli.generate import Job

SEGMENTS = 8
"""The answer is cut into about this many parts for the divergence along the way."""

BLOCK = 16
"""Tokens per pass while scoring: still the decode path of the KVarN attention function, fewer passes."""


def compare(job: Job, preset: str, *, as_json: bool) -> None:
    """Run the arms, then score both KVarN arms on the 16-bit answer, and print."""
    reference, published, refit = dense_arm("fp16"), kvarn_arm(preset, refit=False), kvarn_arm(preset)
    arms = [reference, published, refit]
    if job.loaded.model.dtype.itemsize > 2:
        # A 16-bit cache of a float32 model pays for widening at each step; this one does not.
        arms = [dense_arm("fp32"), *arms]
    with progress() as bars:
        runs = [_generate(job, arm, bars) for arm in _warmed(job, arms)]
        base = runs[arms.index(reference)]
        scores = _score(job, base, reference, [published, refit], bars)
    departures = [first_difference(base.tokens, run.tokens) for run in runs]
    named = dict(zip([published.name, refit.name], scores, strict=True))
    if as_json:
        print_json(_document(job, runs, base, departures, named))
        return
    out = results()
    for run, departure in zip(runs, departures, strict=True):
        out.print(_answer(job, run, base, departure))
    out.print(run_table(runs, job))
    out.print(_divergence_table(named))


def first_difference(reference: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token where two answers part; None if they are the same."""
    for index, (a, b) in enumerate(zip(reference, other, strict=False)):
        if a != b:
            return index
    return None if len(reference) == len(other) else min(len(reference), len(other))


def segment_length(tokens: int) -> int:
    """Tokens per part when an answer of `tokens` tokens is cut into about `SEGMENTS` parts."""
    return max(1, -(-tokens // SEGMENTS))


def _warmed(job: Job, arms: list[Arm]) -> list[Arm]:
    warm_up(job)
    return arms


def _generate(job: Job, arm: Arm, bars: Progress) -> Run:
    bar = bars.add_task(f"generate, {arm.name}", total=job.max_new_tokens)
    run = generate(job, arm, on_token=lambda done: bars.update(bar, completed=done))
    bars.update(bar, total=len(run.tokens), completed=len(run.tokens))
    return run


def _score(job: Job, base: Run, reference: Arm, arms: list[Arm], bars: Progress) -> list[Divergence]:
    ids = [*job.prompt, *base.tokens]
    bar = bars.add_task("divergence on the 16-bit answer", total=len(ids) - 1)
    return divergence(
        job.loaded.model,
        ids,
        reference,
        arms,
        block=BLOCK,
        prefill=len(job.prompt),
        progress=lambda done: bars.advance(bar, done),
    )


def _document(
    job: Job, runs: list[Run], base: Run, departures: list[int | None], scores: dict[str, Divergence]
) -> dict[str, Any]:
    rows = run_rows(runs, job)
    for row, departure in zip(rows, departures, strict=True):
        row["departs_at"] = departure
        score = scores.get(row["kv_cache_dtype"])
        if score is not None:
            row["kl"] = {
                "mean": float(score.kl.mean()),
                "top1": float(score.agree.mean()),
                "per_token": [float(value) for value in score.kl],
                "segments": [
                    {"first": first, "end": end, "mean": mean, "top1": top1}
                    for first, end, mean, top1 in score.segments(segment_length(len(score.kl)))
                ],
            }
    return {"reference": base.name, "arms": rows}


def _answer(job: Job, run: Run, base: Run, departure: int | None) -> Text:
    """One answer; what departs from the 16-bit answer is marked."""
    shown = Text()
    shown.append(run.name, style="bold")
    if run is base:
        shown.append("  the reference\n", style="dim")
    elif departure is None:
        shown.append(f"  same {len(run.tokens)} tokens as 16 bit\n", style="green")
    else:
        shown.append(f"  departs from 16 bit at token {departure}\n", style="yellow")
    common = str(job.loaded.tokenizer.decode(run.tokens[:departure], skip_special_tokens=True))
    if departure is None or not run.text.startswith(common):
        return shown.append(run.text + "\n")
    return shown.append(common).append(run.text[len(common) :] + "\n", style="reverse")


def _divergence_table(scores: dict[str, Divergence]) -> Any:
    made = table("KL from 16 bit on its own answer, nats per token", "answer tokens", *scores)
    length = segment_length(len(next(iter(scores.values())).kl))
    for parts in zip(*(score.segments(length) for score in scores.values()), strict=True):
        first, end = parts[0][:2]
        made.add_row(f"{first}–{end - 1}", *(f"{mean:.5f}" for _, _, mean, _ in parts))
    made.add_section()
    made.add_row("mean", *(f"{score.kl.mean():.5f}" for score in scores.values()))
    made.add_row("same top token", *(f"{score.agree.mean():.1%}" for score in scores.values()))
    return made
