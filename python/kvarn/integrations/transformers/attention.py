"""The attention function and the mask function registered with transformers as ``"kvarn"``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, flash_attention_mask, sdpa_mask

from kvarn.integrations.transformers.dense import Scoring, causal_mask, masked_attention
from kvarn.integrations.transformers.errors import UnsupportedError
from kvarn.integrations.transformers.handle import Handle
from kvarn.integrations.transformers.static_layer import TracedChunk


def register() -> None:
    """Register ``"kvarn"`` as an attention implementation of every model."""
    AttentionInterface.register("kvarn", attention)
    # Without a mask function of the same name, transformers makes no mask at all.
    AttentionMaskInterface.register("kvarn", mask)


def mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    local_size: int | None = None,
    mask_function: Callable[..., Any] = causal_mask_function,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Return the 2D padding mask [batch, key columns] where attention is plainly causal, else a 4D mask.

    None means plainly causal without padding.
    """
    plain = local_size is None and mask_function is causal_mask_function
    # Of a KVarNStaticCache: kv_length is the most columns that it takes.
    static = kwargs.get("kv_offset", 0) is None
    if static and torch.compiler.is_compiling():
        return _traced_mask(kwargs.get("attention_mask"), plain=plain)
    if static:
        kwargs["kv_offset"], most_columns, kv_length = 0, kv_length, q_offset + q_length
        given = kwargs.get("attention_mask")
        if given is not None and given.shape[1] == most_columns:
            kwargs["attention_mask"] = given[:, :kv_length]
    # A StaticCache has more key columns than tokens: its masks are not causal from the last column.
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_length + kwargs.get("kv_offset", 0)
    if aligned and plain:
        padding: Tensor | None = flash_attention_mask(q_length=q_length, kv_length=kv_length, **kwargs)
        if static and padding is not None and padding.shape[1] == kv_length:
            # One width for all steps: compiled steps that `generate` makes masks for are of one shape.
            padding = torch.nn.functional.pad(padding, (0, most_columns - kv_length))
        return padding
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        local_size=local_size,
        mask_function=mask_function,
        allow_is_causal_skip=allow_is_causal_skip and aligned,
        **kwargs,
    )


def _traced_mask(padding: Tensor | None, *, plain: bool) -> Tensor | None:
    """Return the padding mask as it is: how many columns there are is known when the graph runs."""
    if not plain:
        raise UnsupportedError(
            "a mask that is not plainly causal with a KVarNStaticCache in a compiled model: expected causal "
            "attention, with padding at most; call the model without torch.compile"
        )
    return padding


def attention(
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
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache: object = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to a `KVarNCache` through its handles, or to dense keys and values.

    Args:
        module: the attention module; its `is_causal` counts where the argument is None.
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, keys, head_dim]: a handle of a `KVarNCache`, or any tensor.
        value: like key.
        attention_mask: None, the padding mask [batch, keys], or a mask [batch, 1, queries, keys].
        scaling: factor of the scores; None: 1/sqrt(head_dim).
        dropout: probability of dropping a weight, in training.
        softcap: scores become softcap * tanh(scores / softcap).
        sliding_window: query i sees key j if i - j < sliding_window, where no 4D mask says it.
        s_aux: [heads], attention-sink logits.
        is_causal: whether queries see only keys up to their own.
        position_bias: added to the scores.
        cache: None; a paged cache of transformers' continuous batching is refused.
        **kwargs: what models pass for other implementations.

    Returns:
        The output [batch, queries, heads, head_dim], and None: weights are never made.

    Raises:
        UnsupportedError: a paged cache, or dropout or a position bias beside a softcap or sinks.
    """
    if cache is not None:
        raise UnsupportedError(
            f"attention 'kvarn' with a paged cache of type {type(cache).__name__}: expected the cache of "
            "generate(); for continuous batching call KVarNBatching(model).generate_batch(prompts)"
        )
    scoring = Scoring(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sink_logits=None if s_aux is None else s_aux.detach().float(),
    )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain_mask = attention_mask is None or attention_mask.ndim == 2
    fused = plain_mask and causal and position_bias is None and not dropout
    if isinstance(key, TracedChunk):
        if not fused:
            raise UnsupportedError(
                "attention with a 4D mask, a position bias, dropout or without causality, over a "
                "KVarNStaticCache in a compiled model: expected causal attention, with padding at most; call "
                "the model without torch.compile"
            )
        return key.attend(query, attention_mask, scoring), None
    if isinstance(key, Handle) and fused:
        return key.source.attend(query, attention_mask, scoring).contiguous(), None
    if isinstance(key, Handle):
        key, value = key.source.dense()
    seen = _dense_mask(
        attention_mask,
        query.shape[2],
        key.shape[2],
        causal=causal,
        window=sliding_window,
        device=query.device,
    )
    if softcap is None and s_aux is None:
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            seen,
            dropout=dropout,
            scaling=scoring.scale,
            is_causal=causal,
            position_bias=position_bias,
            **kwargs,
        )
        return out, None
    if dropout or position_bias is not None:
        raise UnsupportedError(
            f"dropout {dropout} with softcap {softcap}: expected no dropout and no position bias beside a "
            "softcap or attention sinks; use attn_implementation='eager'"
        )
    if seen is None:
        seen = _all_seen(query.shape[2], key.shape[2], None, causal=causal, device=query.device)[None, None]
    return masked_attention(query, key, value, seen, scoring), None


def _dense_mask(
    given: Tensor | None,
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Return a 4D mask, or None where sdpa's own causality says the same."""
    if given is not None and given.ndim == 4:
        return given[..., :keys]
    windowed = window is not None and window < keys
    if given is None and not windowed and (not causal or queries == 1 or queries == keys):
        return None
    seen = _all_seen(queries, keys, window, causal=causal, device=device)
    return seen[None, None] if given is None else seen & given.bool()[:, None, None]


def _all_seen(queries: int, keys: int, window: int | None, *, causal: bool, device: torch.device) -> Tensor:
    if causal:
        return causal_mask(queries, keys, window, device)
    return torch.ones(queries, keys, dtype=torch.bool, device=device)
