"""Run one arm: generate, stream, and measure time and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from kvarn.eval import Arm, CacheBytes, cache_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvarn.cli.generate import Job


@dataclass(frozen=True)
class Run:
    """What one arm did.

    Attributes:
        name: the arm's name.
        tokens: the new tokens, an end-of-text token included.
        text: the new text.
        prefill_seconds: from the start to the first new token.
        decode_seconds: from the first new token to the last.
        bytes: what the cache held at the end. The last new token was never fed, so it is not in there.
    """

    name: str
    tokens: list[int]
    text: str
    prefill_seconds: float
    decode_seconds: float
    bytes: CacheBytes


class TimedStreamer(BaseStreamer):
    """Receives tokens from `generate`: notes when each came, and passes on text once it is final."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], None] | None,
        on_token: Callable[[int], None] | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.on_token = on_token
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._prompt_seen = False
        self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call) or one new token [1]."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.tokens.append(int(value.reshape(-1)[0]))
        if self.on_token:
            self.on_token(len(self.tokens))
        self._show(self.text())

    def end(self) -> None:
        """Pass on what is left, whole characters or not."""
        self._show(self.text(), final=True)

    def text(self) -> str:
        """The new text so far, without special tokens."""
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _show(self, text: str, *, final: bool = False) -> None:
        # A replacement character at the end is a character whose bytes have not all come yet.
        if self.on_text and (final or not text.endswith("\ufffd")) and len(text) > self._shown:
            self.on_text(text[self._shown :])
            self._shown = len(text)


def warm_up(job: Job) -> None:
    """One short forward pass, so that the first arm's times hold no start-up of torch."""
    with torch.no_grad():
        job.loaded.model(torch.tensor([job.prompt[:16]]), use_cache=False)


def generate(
    job: Job,
    arm: Arm,
    *,
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Run:
    """Answer the prompt through a fresh cache of `arm`.

    Args:
        job: model, prompt and settings.
        arm: the cache to use.
        on_text: called with each new piece of text.
        on_token: called with the number of new tokens so far.
    """
    model: Any = job.loaded.model
    cache = arm.make_cache(model, len(job.prompt) + job.max_new_tokens)
    streamer = TimedStreamer(job.loaded.tokenizer, on_text, on_token)
    ids = torch.tensor([job.prompt])
    sampling = (
        {"do_sample": True, "temperature": job.temperature} if job.temperature else {"do_sample": False}
    )
    model.set_attn_implementation(arm.attention)
    torch.manual_seed(job.seed)
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=job.max_new_tokens,
        streamer=streamer,
        **sampling,
    )
    first, last = streamer.times[0], streamer.times[-1]
    return Run(arm.name, streamer.tokens, streamer.text(), first - start, last - first, cache_bytes(cache))
