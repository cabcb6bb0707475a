"""Small random models whose attention is peaked enough for quantisation to show."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 97
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
# Two right implementations differ in the last bits of a layer's input, and so, now and then, in a code of
# the next layer. One layer has no such layer: it is compared at the default bits. With two, codes are fine
# enough that one of them does not matter, and yet coarse enough for a tile sealed at another moment to show.
CASES = [
    ("llama", 1, "kvarn_k4v2_g64"),
    ("llama", 2, "kvarn_k4v4_g64"),
    ("qwen3", 1, "kvarn_k4v2_g64"),
    ("qwen3", 2, "kvarn_k4v4_g64"),
]
# Of the range of the logits.
TOLERANCE = 1e-3


def tiny(config_class, model_class, **changes):
    torch.manual_seed(0)
    arguments = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "initializer_range": 0.12,
        "eos_token_id": None,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    return model_class(config_class(**arguments | changes)).eval().requires_grad_(False)


def tokens(batch, length, seed=1):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padding(batch, length, padding):
    """Token ids and mask of a batch whose row i starts with padding[i] pads."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row, pad in enumerate(padding):
        ids[row, :pad] = 0
        mask[row, :pad] = 0
    return ids, mask


def run(model, cache, chunks, mask=None):
    """Feed chunks of ids one by one; return the logits where mask shows tokens, [tokens, vocabulary]."""
    parts, past = [], cache.get_seq_length()
    length = past + sum(chunk.shape[1] for chunk in chunks)
    positions = torch.arange(length)[None] if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    first = past
    for chunk in chunks:
        stop = past + chunk.shape[1]
        parts.append(
            model(
                chunk,
                past_key_values=cache,
                attention_mask=None if mask is None else mask[:, :stop],
                position_ids=positions[:, past:stop],
            ).logits
        )
        past = stop
    logits = torch.cat(parts, dim=1)
    return logits.flatten(0, 1) if mask is None else logits[mask[:, first:stop].bool()]


def generate(model, cache, ids, mask=None, new=40, **kwargs):
    """Return tokens and logits of `generate`, greedy unless told otherwise, sampling with a fixed seed."""
    mask = torch.ones_like(ids) if mask is None else mask
    torch.manual_seed(3)
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=new,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False} | kwargs,
    )
    return SimpleNamespace(tokens=out.sequences, logits=torch.stack(out.logits, dim=1))


def assert_close(actual, expected):
    """Logits within the tolerance, and the same best token where the best two are further apart than that."""
    width = (expected.max() - expected.min()).item()
    error = (actual.float() - expected.float()).abs().max().item()
    assert error <= TOLERANCE * width, f"logits differ by {error:.2e}, range {width:.2e}"
    best = expected.float().topk(2).values
    clear = best[..., 0] - best[..., 1] > 2 * TOLERANCE * width
    assert clear.any()
    assert torch.equal(actual.argmax(-1)[clear], expected.argmax(-1)[clear])


def assert_same_generation(actual, expected, tolerance=TOLERANCE):
    """The same tokens and logits; a row may part from the other only where the best two tokens are level."""
    new = expected.logits.shape[1]
    width = (expected.logits.max() - expected.logits.min()).item()
    for row in range(len(expected.tokens)):
        ours, theirs = actual.tokens[row, -new:], expected.tokens[row, -new:]
        differs = (ours != theirs).nonzero()
        same = new if len(differs) == 0 else int(differs[0]) + 1
        error = (actual.logits[row, :same] - expected.logits[row, :same]).abs().max().item()
        assert error <= tolerance * width, f"row {row}: logits differ by {error:.2e}, range {width:.2e}"
        if len(differs):
            at = expected.logits[row, same - 1]
            gap = (at[theirs[same - 1]] - at[ours[same - 1]]).item()
            assert gap <= 2 * tolerance * width, f"row {row} parts at token {same - 1}, gap {gap:.2e}"
