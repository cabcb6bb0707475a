"""Load the model and tokenizer that a `Source` names, through transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarn.models.requirements import require
from kvarn.models.source import ModelError, Source, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")
"""Weight and activation types that `load` offers. float32 is the default: on a CPU it is the most accurate
and seldom slower, since few CPUs multiply 16-bit numbers natively."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on the CPU, its tokenizer, and where both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source


def load(model: str | Path | None = None, *, dtype: str = "float32") -> LoadedModel:
    """Load a causal language model for the CPU.

    Args:
        model: a transformers folder, a GGUF file (weights are widened to `dtype`), a hub id, or None for the
            default package. The hub is not asked when `HF_HUB_OFFLINE` is set.
        dtype: one of `DTYPES`.

    Raises:
        MissingExtraError: torch, transformers or gguf is not installed.
        ModelError: the model cannot be found or read.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    source = resolve(model)
    require("torch", "transformers", *(["gguf"] if source.kind == "gguf" else []))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.location, **where)
            weights = AutoModelForCausalLM.from_pretrained(
                source.location, dtype=getattr(torch, dtype), **where
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_explain(source, error)) from error
    weights.train(False)
    return LoadedModel(weights, tokenizer, source)


def _explain(source: Source, error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    text = f"model {source.label!r}: transformers cannot load it: {first}"
    if source.kind == "hub" and os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        text += "; HF_HUB_OFFLINE is set, so only models already in the local cache can be used"
    return text


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the progress bars of transformers; its warnings stay."""
    import transformers.modeling_gguf_pytorch_utils
    from transformers.utils import logging

    # The reader of GGUF files calls tqdm itself, past transformers' own switch.
    gguf_reader: Any = transformers.modeling_gguf_pytorch_utils
    plain = gguf_reader.tqdm
    enabled = logging.is_progress_bar_enabled()
    gguf_reader.tqdm = partial(plain, disable=True)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        gguf_reader.tqdm = plain
        if enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
