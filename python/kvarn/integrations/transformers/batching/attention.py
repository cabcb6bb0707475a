"""The attention function of packed batches, registered with transformers as ``"kvarn_paged"``."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from kvarn.integrations.transformers.batching.packed import PackedBatch
from kvarn.integrations.transformers.dense import Scoring
from kvarn.integrations.transformers.errors import UnsupportedError

NAME = "kvarn_paged"


def register() -> None:
    """Register the attention function; ``"paged|kvarn"``, transformers' form of the name, does the same.

    It has no mask function, so transformers makes no mask: which token belongs to which request is the
    batch's to know, and to look for it in the positions would wait for the device.
    """
    AttentionInterface.register(NAME, packed_attention)
    # Versions that strip "paged|" look for "kvarn".
    AttentionInterface.register("paged|kvarn", packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: object = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Append the new tokens of a packed batch to their sequences, and attend to those.

    Args:
        module: the attention module; its `layer_idx` is the layer of the pool.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim].
        value: like key.
        attention_mask: None.
        scaling: factor of the scores; None: 1/sqrt(head_dim).
        dropout: 0.
        softcap: scores become softcap * tanh(scores / softcap).
        sliding_window: query i sees key j if i - j < sliding_window.
        s_aux: [heads], attention-sink logits.
        position_bias: None.
        cache: the `PackedBatch`.
        **kwargs: what models pass for other implementations.

    Returns:
        The output [1, tokens, heads, head_dim], and None: weights are never made.

    Raises:
        UnsupportedError: the call does not come from a `KVarNBatching`, or asks for what it cannot do.
    """
    if not isinstance(cache, PackedBatch):
        raise UnsupportedError(
            f"attention {NAME!r} with cache of type {type(cache).__name__}: expected a packed batch of a "
            "KVarNBatching; call KVarNBatching(model).generate_batch(prompts), or choose attention 'kvarn' "
            "and pass a KVarNCache to generate()"
        )
    if attention_mask is not None or position_bias is not None or dropout:
        raise UnsupportedError(
            f"layer {module.layer_idx} has a mask, a position bias or dropout {dropout}: expected plainly "
            "causal attention; use generate() with a KVarNCache"
        )
    scoring = Scoring(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sink_logits=None if s_aux is None else s_aux.detach().float(),
    )
    assert isinstance(module.layer_idx, int)
    return cache.attend(module.layer_idx, query, key, value, scoring), None
