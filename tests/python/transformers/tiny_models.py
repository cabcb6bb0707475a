"""Small random models whose attention is peaked enough for quantisation to show."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 97
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def tiny(config_class, model_class, **changes):
    torch.manual_seed(0)
    arguments = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "initializer_range": 0.25,
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
    """Feed chunks of ids one after the other; return the logits of the columns that mask shows, [tokens, vocab]."""
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


def assert_close(actual, expected):
    """Logits within 1e-3 of their range, and the same best token wherever the best two are further apart."""
    width = (expected.max() - expected.min()).item()
    error = (actual.float() - expected.float()).abs().max().item()
    assert error <= 1e-3 * width, f"logits differ by {error:.2e}, range {width:.2e}"
    best = expected.float().topk(2).values
    clear = best[:, 0] - best[:, 1] > 2e-3 * width
    assert torch.equal(actual.argmax(-1)[clear], expected.argmax(-1)[clear])
