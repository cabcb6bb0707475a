"""The ways in which transformers generates: each a function of an arm, the model with one kind of cache."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from matrix_models import assistant_of, padded
from tiny_models import generate
from transformers import LogitsProcessor

# Two tiles of 64 and a part: one is sealed with the first new token, another while generating.
PROMPT, NEW = 150, 48
PADS = 37


class Follow(LogitsProcessor):
    """Makes every next token that of a text: [rows, tokens]."""

    def __init__(self, text):
        self.text = text

    def __call__(self, input_ids, scores):
        # Behind a draft that reaches the end comes a token that is not kept.
        chosen = self.text[:, min(input_ids.shape[1], self.text.shape[1] - 1), None]
        # Not -inf, at which prompt look-up would not draft it.
        return torch.full_like(scores, -1e9).scatter(1, chosen, 0.0)


@dataclass
class Arm:
    """A model, and how to make the cache that it generates with.

    Attributes:
        model: the model, with its attention function set.
        make: makes a cache for rows with this left padding.
        pads: whether prompts are left-padded.
        follow: texts that are generated, one for each call; None: whatever comes.
        removed: what `crop` took back in each call.
    """

    model: Any
    make: Callable[[list[int]], Any]
    pads: bool
    follow: list[torch.Tensor] | None = None
    removed: list[int] = field(default_factory=list)

    def generate(self, cache, ids, mask, new=NEW, **options):
        if self.follow is not None:
            options["logits_processor"] = [Follow(self.follow.pop(0))]
        return generate(self.model, cache, ids, mask, new, **options)

    def assistant(self):
        """A model that drafts, as it likes."""
        made = assistant_of(self.model)
        drafts = made.generate
        made.generate = lambda *args, **kwargs: drafts(*args, **kwargs | {"logits_processor": []})
        return made

    def padding(self, rows):
        """Left padding of each row; one of several has none."""
        return [PADS * self.pads if row or rows == 1 else 0 for row in range(rows)]

    def prompt(self, rows, length=PROMPT, seed=1):
        return padded(rows, length, self.padding(rows), self.model.device, seed)

    def counted(self, padding):
        """A cache that notes what is cropped."""
        cache = self.make(padding)
        crop = cache.crop

        def noting(count):
            self.removed.append(-int(count))
            crop(count)

        cache.crop = noting
        return cache


def extend(mask, columns):
    return torch.cat([mask, mask.new_ones(len(mask), columns)], 1)


def forward(model, cache, ids, mask):
    """Feed the last columns of mask, which are ids, outside `generate`."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    model(ids, past_key_values=cache, attention_mask=mask, position_ids=positions)


def greedy(arm):
    ids, mask = arm.prompt(2)
    return [arm.generate(arm.make(arm.padding(2)), ids, mask)]


def sampling(arm):
    """Several returned sequences of each prompt."""
    ids, mask = arm.prompt(2)
    cache = arm.make([pad for pad in arm.padding(2) for _ in range(2)])
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 2}
    return [arm.generate(cache, ids, mask, **options)]


def beams(arm):
    ids, mask = arm.prompt(2)
    found = arm.model.generate(
        ids,
        attention_mask=mask,
        past_key_values=arm.make([pad for pad in arm.padding(2) for _ in range(3)]),
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=3,
        num_return_sequences=3,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return [SimpleNamespace(tokens=found.sequences, scores=found.sequences_scores)]


def prompt_lookup(arm):
    ids, mask = arm.prompt(1)
    ids[:, PADS:] = ids[:, PADS : PADS + 19].repeat(1, 6)[:, : PROMPT - PADS]
    return [arm.generate(arm.counted(arm.padding(1)), ids, mask, prompt_lookup_num_tokens=5)]


def assistant(arm):
    """Speculation: a smaller model drafts."""
    ids, mask = arm.prompt(1)
    cache = arm.counted(arm.padding(1))
    return [arm.generate(cache, ids, mask, assistant_model=arm.assistant())]


def chunked_prefill(arm):
    ids, mask = arm.prompt(2)
    return [arm.generate(arm.make(arm.padding(2)), ids, mask, prefill_chunk_size=50)]


def turns(arm):
    """Two turns: the second prompt follows the first answer."""
    ids, mask = arm.prompt(2)
    cache = arm.make(arm.padding(2))
    first = arm.generate(cache, ids, mask, NEW // 2)
    question, _ = padded(2, 25, [0, 0], ids.device, seed=2)
    ids = torch.cat([first.tokens, question], 1)
    return [first, arm.generate(cache, ids, extend(mask, ids.shape[1] - mask.shape[1]), NEW // 2)]


def crop(arm):
    """A turn, then two drafts of which all but the first tokens are taken back, then a turn.

    The first draft lies in slots, the second reaches into a record.
    """
    ids, mask = arm.prompt(2)
    cache = arm.counted(arm.padding(2))
    first = arm.generate(cache, ids, mask, NEW // 2)
    ids = first.tokens
    for seed, length, removed in ((2, 7, 5), (4, 90, 85)):
        draft, _ = padded(2, length, [0, 0], ids.device, seed)
        ids = torch.cat([ids, draft], 1)
        mask = extend(mask, ids.shape[1] - mask.shape[1])
        cache.activate_past_recording()
        # The last token that was generated is not in the cache yet.
        forward(arm.model, cache, ids[:, cache.get_seq_length() :], mask)
        cache.crop(-removed)
        for layer in cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
        ids, mask = ids[:, :-removed], mask[:, :-removed]
    question, _ = padded(2, 25, [0, 0], ids.device, seed=3)
    ids = torch.cat([ids, question], 1)
    return [first, arm.generate(cache, ids, extend(mask, 25), NEW // 2)]


def copied_prefix(arm):
    """A prefix that is stored once and copied for each of two prompts."""
    ids, mask = arm.prompt(2, length=PROMPT + 50)
    prefix = arm.make(arm.padding(2))
    forward(arm.model, prefix, ids, mask)
    found = []
    for seed, length in ((2, 20), (3, 45)):
        question, _ = padded(2, length, [0, 0], ids.device, seed)
        whole = torch.cat([ids, question], 1), extend(mask, length)
        found.append(arm.generate(copy.deepcopy(prefix), *whole, NEW // 2))
    return found


def repeated_prefix(arm):
    """A prefix that is stored once and repeated for a batch of three prompts."""
    ids, mask = arm.prompt(1)
    cache = arm.make(arm.padding(1))
    forward(arm.model, cache, ids, mask)
    cache.batch_repeat_interleave(3)
    question, _ = padded(3, 30, [0, 0, 0], ids.device, seed=2)
    whole = torch.cat([ids.repeat_interleave(3, 0), question], 1)
    return [arm.generate(cache, whole, extend(mask, 30).repeat_interleave(3, 0))]


MODES = {
    "greedy": greedy,
    "sampling": sampling,
    "beams": beams,
    "prompt look-up": prompt_lookup,
    "assistant": assistant,
    "chunked prefill": chunked_prefill,
    "turns": turns,
    "crop": crop,
    "copied prefix": copied_prefix,
    "repeated prefix": repeated_prefix,
}
# One row: transformers drafts for one.
DRAFTING = ("prompt look-up", "assistant")
