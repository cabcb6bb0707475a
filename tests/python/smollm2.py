"""SmolLM2-135M-Instruct, loaded once per test run."""

from functools import cache

from kvarn.models import LoadedModel, load


@cache
def smollm2() -> LoadedModel:
    return load(None)
