"""What the CPU is meant to reach: a bar, and a goal beyond it."""

from dataclasses import dataclass, replace

from gpu.goals import Goal, short


@dataclass(frozen=True)
class Bar:
    """A bar for some rows of one file.

    Attributes:
        least: the bar; every row that it is about must reach it.
        goal: the value beyond it to aim at, None where there is none.
    """

    least: Goal
    goal: float | None = None

    def cells(self, runs):
        """What, bar, reached, rows, bar met, goal, goal met."""
        values = self.least.values(runs)
        cells = [
            self.least.text,
            self.least.wanted(),
            self.least.reached(values),
            len(values),
            self.least.verdict(values),
        ]
        if self.goal is None:
            return [*cells, "–", "–"]
        beyond = replace(self.least, bar=self.goal)
        return [*cells, beyond.wanted(), beyond.verdict(values)]


HEADER = ["what", "bar", "reached", "rows", "bar met", "goal", "goal met"]
LONG = (16384, 65536)  # contexts that have bars
HISTORY = 16384  # packed tokens before the chunk that has one


def bars(instruction_set):
    """The bars for a processor with these instruction sets."""
    return [*_attention(), *_encode(instruction_set.startswith("avx512")), *_generate()]


def _attention():
    for preset, bar, goal in (("k4v2", 3.0, 6.0), ("k4v4", 2.5, 5.0)):
        yield Bar(
            Goal(
                f"decode {preset} at 16 K and 64 K tokens, × the fastest dense peer",
                "cpu_attention",
                _decode("times_peer", preset),
                bar,
                every=True,
                unit=" ×",
            ),
            goal,
        )
    for preset in ("k4v2", "k4v4"):
        yield Bar(
            Goal(
                f"decode {preset} at 16 K and 64 K tokens, fraction of a plain read",
                "cpu_attention",
                _decode("of_plain_read", preset),
                0.2,
                every=True,
            ),
            0.4,
        )
    yield Bar(
        Goal(
            "time for each token at 64 K tokens, × that at 16 K",
            "cpu_attention",
            lambda row: (
                row["ratio"] if row["kind"] == "growth" and (row["shorter"], row["longest"]) == LONG else None
            ),
            1.1,
            at_most=True,
            every=True,
            unit=" ×",
        )
    )
    yield Bar(
        Goal(
            "512 tokens behind 16 K packed ones, × SDPA in 16 bit",
            "cpu_attention",
            lambda row: (
                row["times_peer"]
                if row["kind"] == "prefill" and row["tokens"] - row["q_len"] == HISTORY
                else None
            ),
            1.0,
            every=True,
            unit=" ×",
        )
    )
    yield Bar(
        Goal(
            "attend, × decoding the records and calling SDPA",
            "cpu_attention",
            lambda row: row["times"] if row["kind"] == "expand" else None,
            1.0,
            every=True,
            unit=" ×",
        )
    )


def _decode(field, preset):
    """The field of a preset's decode rows at the contexts that have bars."""
    return lambda row: (
        row[field]
        if row["kind"] == "decode" and short(row["preset"]) == preset and row["context"] in LONG
        else None
    )


def _encode(avx512):
    for kind in ("encode", "seal"):
        for refit, bar in ((False, 8000.0), (True, 4000.0)):
            yield Bar(
                Goal(
                    f"{kind} at D 128, refit {'on' if refit else 'off'}, tile pairs a second and thread",
                    "cpu_encode",
                    _encoded(kind, refit),
                    bar if avx512 else bar / 2,
                    every=True,
                    digits=0,
                )
            )
    yield Bar(
        Goal(
            "append of a token to 64 sequences, a layer",
            "cpu_encode",
            lambda row: row["us"] if (row["kind"], row.get("sequences")) == ("append", 64) else None,
            20.0,
            at_most=True,
            digits=1,
            unit=" µs",
        )
    )


def _encoded(kind, refit):
    return lambda row: (
        row["pairs_per_s_and_thread"] if row["kind"] == kind and row["refit"] == refit else None
    )


def _generate():
    for model, text, bar in (
        ("smollm2", "SmolLM2-135M at 4,000 tokens", 1.0),
        ("llama-1b", "Llama of 1B at 16 K tokens", 1.5),
    ):
        yield Bar(
            Goal(
                f"tokens a second, {text}, × DynamicCache",
                "cpu_generate",
                lambda row, model=model: (
                    row["times"] if (row["kind"], row["model"]) == ("compare", model) else None
                ),
                bar,
                every=True,
                unit=" ×",
            )
        )
