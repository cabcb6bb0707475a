"""Models of the matrix: small, random, of every kind of layer that caches differently."""

import copy
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
            # With larger weights the linear layers make much of a rounding of half precision.
            "initializer_range": 0.03,
        },
    ),
    "Qwen3-MoE": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS | {"num_hidden_layers": 2}),
    "gpt-oss": (
        GptOssConfig,
        GptOssForCausalLM,
        ALTERNATING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
# An assistant is wrong where the text's length is a multiple of this.
WRONG = 4


@cache
def model(name, dtype, device, every_expert=False):
    """The model, in evaluation.

    Args:
        name: of `MODELS`.
        dtype: of its weights.
        device: where it is.
        every_expert: whether all experts take part. Else a rounding that decides between level experts is no
            longer a rounding.
    """
    *classes, changes = MODELS[name]
    if every_expert and "num_experts_per_tok" in changes:
        changes = changes | {"num_experts_per_tok": 4}
    made = tiny(*classes, **{"head_dim": HEAD_DIM, "initializer_range": 0.08} | changes)
    generator = torch.Generator().manual_seed(11)
    for key, parameter in made.named_parameters():
        if key.endswith("sinks"):
            # Weights of sinks are drawn too small to be seen beside a hundred tokens.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 3)
    # The grouped products of a GPU take bfloat16 alone.
    made.set_experts_implementation("eager")
    return made.to(device, dtype)


def assistant_of(made):
    """A copy of a model that is right about most tokens, and sometimes surely wrong."""
    other = copy.deepcopy(made)
    other.set_attn_implementation("eager")
    if hasattr(other.config, "sliding_window"):
        # Drafting step by step, transformers' sliding layers lose count up to 5.17.
        other.config.sliding_window = 1024
    # As many drafts each time, however sure of them it is.
    drafting = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant"}
    other.generation_config.update(**drafting, assistant_confidence_threshold=0.0)

    def sometimes_wrong(module, args, kwargs, output):
        if kwargs["past_key_values"].get_seq_length() % WRONG == 0:
            output.logits = output.logits.roll(1, -1)
        return output

    other.register_forward_hook(sometimes_wrong, with_kwargs=True)
    return other


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
