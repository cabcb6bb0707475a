"""Load a language model and its tokenizer from a folder, a GGUF file, a hub id or the default package.

Importing this package needs neither torch nor transformers; `load` does.
"""

from kvarn.models.load import DTYPES, LoadedModel, load
from kvarn.models.requirements import MissingExtraError, require
from kvarn.models.source import DEFAULT_PACKAGE, ModelError, Source, resolve

__all__ = [
    "DEFAULT_PACKAGE",
    "DTYPES",
    "LoadedModel",
    "MissingExtraError",
    "ModelError",
    "Source",
    "load",
    "require",
    "resolve",
]
