"""Models with random weights, and caches that all hold the same random keys and values."""

import torch
from kvarn import KVarNCache, KVarNStaticCache
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

TINY = {
    "vocab_size": 199,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
# Tokens that a cache takes at once.
CHUNK = 4096


def make_model(shape, longest, dtype, device):
    """A Llama with random weights, made where it runs."""
    config = LlamaConfig(**shape, max_position_embeddings=longest, eos_token_id=None, pad_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


class States:
    """Random keys and values, the same for every cache.

    Args:
        model: gives shapes, type and device.
        batch: sequences.
        context: tokens of each.
    """

    def __init__(self, model, batch, context):
        config = model.config
        self.layers, self.context = config.num_hidden_layers, context
        self._shape = batch, config.num_key_value_heads, config.head_dim
        self._dtype, self._device = model.dtype, model.device

    def chunk(self, layer, first):
        """K and V [batch, kv_heads, tokens, head_dim] of a layer from token `first`, up to CHUNK tokens."""
        batch, heads, head_dim = self._shape
        count = min(CHUNK, self.context - first)
        generator = torch.Generator(self._device).manual_seed(1000003 * layer + first)
        return torch.randn(
            2, batch, heads, count, head_dim, generator=generator, dtype=self._dtype, device=self._device
        )

    def whole(self, layer):
        """K and V of a layer, all tokens."""
        batch, heads, head_dim = self._shape
        out = torch.empty(2, batch, heads, self.context, head_dim, dtype=self._dtype, device=self._device)
        for first in range(0, self.context, CHUNK):
            out[:, :, :, first : first + CHUNK] = self.chunk(layer, first)
        return out


def fill_dense(cache, states):
    """Give a DynamicCache or a StaticCache its tokens."""
    for layer in range(states.layers):
        cache.update(*states.whole(layer), layer)


def fill_kvarn(cache, states):
    """Give a KVarNCache its tokens, as forward passes of a chunk would.

    The model must use "kvarn": then `update` returns handles, whose forward pass takes the tokens without
    attention.
    """
    for first in range(0, states.context, CHUNK):
        for layer in range(states.layers):
            keys, _ = cache.update(*states.chunk(layer, first), layer)
            forward = keys.source.forward
            forward.plan(None)
            forward.append(layer, *(forward.pack(x) for x in (keys.source.k, keys.source.v)))
        # Asking for the length finishes the pass.
        held, expected = cache.get_seq_length(), min(first + CHUNK, states.context)
        if held != expected:
            raise RuntimeError(f"cache of {held} tokens: expected {expected} after the chunk")


def make_cache(kind, model, states, steps, preset, **options):
    """A filled cache; sets the model's attention to what goes with it.

    Args:
        kind: dynamic, static, kvarn or kvarn-static.
        model: its model.
        states: what the cache is filled with.
        steps: tokens that it must have room for behind them.
        preset: of kvarn.
        **options: of kvarn's caches.
    """
    longest = states.context + steps
    kvarn = {"kvarn": KVarNCache, "kvarn-static": KVarNStaticCache}.get(kind)
    model.set_attn_implementation("kvarn" if kvarn else "sdpa")
    if kvarn:
        cache = kvarn(model.config, preset, max_tokens=longest, **options)
        fill_kvarn(cache, states)
    else:
        static = kind == "static"
        cache = StaticCache(config=model.config, max_cache_len=longest) if static else None
        cache = cache or DynamicCache(config=model.config)
        fill_dense(cache, states)
    return cache
