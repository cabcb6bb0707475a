"""kvarn: a quantised KV cache for LLM inference."""

from importlib import import_module
from typing import Any

# Names that need an optional dependency: imported on first use, so that `import kvarn` works without it.
_LAZY = {"KVarNCache": "kvarn.integrations.transformers"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
