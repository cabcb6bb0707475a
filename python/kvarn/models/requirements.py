"""Optional dependencies, asked for at the moment a feature needs them."""

from importlib.util import find_spec

from kvarn import KvarnError


class MissingExtraError(KvarnError, ImportError):
    """A feature needs a package that is not installed; the text names the extra that brings it."""


def require(*modules: str, extra: str = "transformers") -> None:
    """Raise `MissingExtraError` unless every top-level module named is importable; imports none of them."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{', '.join(missing)}: not installed, but this needs it; run: pip install 'kvarn[{extra}]'"
        )
