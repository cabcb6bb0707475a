"""Models of the matrix: small, random, of every kind of layer that caches differently."""

from functools import cache

import torch
from tiny_models import VOCABULARY, tiny
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

# The kernels have no smaller head dim.
HEAD_DIM = 64
WINDOW = 40
ALTERNATING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MODELS = {
    "Llama": (LlamaConfig, LlamaForCausalLM, {"num_hidden_layers": 2}),
    "Qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_hidden_layers": 2}),
    "Gemma 3": (Gemma3TextConfig, Gemma3ForCausalLM, ALTERNATING | {"query_pre_attn_scalar": 40}),
    "Qwen3-Next": (
        Qwen3NextConfig,
        Qwen3NextForCausalLM,
        EXPERTS
        | {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "Qwen3-MoE": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS | {"num_hidden_layers": 2}),
    "gpt-oss": (
        GptOssConfig,
        GptOssForCausalLM,
        ALTERNATING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
# Standard deviation of an assistant's weights around the model's, in standard deviations of those.
NOISE = 0.4


def _draw(name, dtype):
    *classes, changes = MODELS[name]
    if dtype != torch.float32 and "num_experts_per_tok" in changes:
        # Roundings decide between level experts: only where all take part do they stay roundings.
        changes = changes | {"num_experts_per_tok": 4}
    return tiny(*classes, head_dim=HEAD_DIM, initializer_range=0.08, **changes)


@cache
def model(name, dtype, device):
    """The model, in evaluation."""
    made = _draw(name, dtype)
    generator = torch.Generator().manual_seed(11)
    for key, parameter in made.named_parameters():
        if key.endswith("sinks"):
            # Weights of sinks are drawn too small to be seen beside a hundred tokens.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 3)
    return made.to(device, dtype)


@cache
def assistant(name, dtype, device):
    """A model that is often, not always, right about what `model` says next."""
    made = model(name, dtype, device)
    other = _draw(name, dtype)
    generator = torch.Generator().manual_seed(12)
    for theirs, ours in zip(other.parameters(), made.parameters(), strict=True):
        noise = (
            torch.randn(ours.shape, generator=generator) * ours.float().std().cpu() if ours.ndim > 1 else 0
        )
        theirs.copy_(ours.float().cpu() + NOISE * noise)
    # As many drafts each time, however sure of them it is.
    drafting = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant"}
    other.generation_config.update(**drafting, assistant_confidence_threshold=0.0)
    return other.to(device, dtype)


def reference_attention(name):
    """The attention function of the reference arm."""
    return "sdpa" if MODELS[name][1]._supports_sdpa else "eager"


def padded(batch, length, padding, device, seed=1):
    """Token ids and mask [batch, length] whose row i starts with padding[i] pads."""
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding):
        ids[row, :pad] = 0
        mask[row, :pad] = 0
    return ids.to(device), mask.to(device)
