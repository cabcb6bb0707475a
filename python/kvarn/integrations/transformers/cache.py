"""The cache that users pass to a model as ``past_key_values``."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from kvarn import ConfigError, Pool, ShapeError
from kvarn.integrations.transformers import stock
from kvarn.integrations.transformers.kinds import layer_kinds, shares_layers
from kvarn.integrations.transformers.layer import KVarNLayer
from kvarn.integrations.transformers.rows import Rows, Settings


class KVarNCache(Cache):
    """A KV cache that stores the full-attention layers of a model as KVarN records.

    Layers of other types (sliding, chunked, linear) keep transformers' own classes: what those cannot do, as
    `crop` with a linear layer, the whole cache refuses. Address space is reserved for max_rows × max_tokens
    at the first forward pass, and memory taken as tokens arrive.

    Rows can be forked: beams, `batch_repeat_interleave` and ``copy.deepcopy`` share what was stored, and
    nothing is copied but a last, unfinished tile when one of them goes on.

    Give it to `generate` or to the model as ``past_key_values``. It is fast where the model's attention is
    ``"kvarn"`` and gives the same under every other, which builds dense tensors at each step. Under
    ``"kvarn"`` rows store no padding: the mask says what it is. Other attention functions do not show
    their mask to the cache: there padding is stored like other tokens (masked, but part of the statistics
    of its tiles) unless `padding` is given.

    A step keeps its newest tokens uncommitted: they are sealed into records only after the next step, so
    `crop` can take them back exactly; further back it cuts into records. If a forward pass breaks off, the
    KVarN layers are as they were before it.

    Args:
        config: the model's config (``model.config``).
        preset: ``kvarn_k{bits}v{bits}_g{group}``, see `kvarn.presets`.
        hold: how many of the newest tokens of a step stay uncommitted; None: all, up to a group. 0 commits
            at once: rejected drafts may then have been part of a record, which is decoded to drop them.
        padding: left padding of each row in columns, for attention functions other than ``"kvarn"``.
        max_tokens: columns that a row can hold, padding included; None: ``config.max_position_embeddings``.
        max_rows: rows that the cache and its copies can hold together; None: 16, or four times those of the
            first forward pass.
        refit: whether codes and scales are refitted after rounding, as in `kvarn.Config`.
        iterations: rounds of variance normalisation (KVarN, arXiv 2606.03458, Alg. 1).
        sink_tokens: tokens of 16 bit at the start of a row; None: a group.
        recent_tokens: committed tokens that stay in 16 bit.

    Raises:
        UnsupportedError: the model has no full-attention layer, or they do not cache keys and values (latent
            attention).
        ConfigError: the preset, or another argument, is not supported.
    """

    layer_class = KVarNLayer

    def __init__(
        self,
        config: PreTrainedConfig,
        preset: str = "kvarn_k4v2_g128",
        *,
        hold: int | None = None,
        padding: list[int] | None = None,
        max_tokens: int | None = None,
        max_rows: int | None = None,
        refit: bool = True,
        iterations: int = 8,
        sink_tokens: int | None = None,
        recent_tokens: int = 0,
    ) -> None:
        decoder = config.get_text_config(decoder=True)
        self._kinds = layer_kinds(decoder)
        settings = _settings(
            decoder,
            preset,
            hold,
            padding,
            max_tokens,
            max_rows,
            refit,
            iterations,
            sink_tokens,
            recent_tokens,
        )
        settings.codec(_ANY_HEAD_DIM)
        full = [index for index, kind in enumerate(self._kinds) if kind.full]
        self._rows = Rows(
            settings,
            [_shape(decoder, index) for index in full],
            sharing=shares_layers(decoder),
            numbers=full,
        )

        def reads_handles() -> bool:
            return bool(decoder._attn_implementation == "kvarn")

        super().__init__(
            layers=[
                self.layer_class(self._rows, full.index(index), reads_handles) if kind.full else kind.make()
                for index, kind in enumerate(self._kinds)
            ]
        )

    @property
    def pool(self) -> Pool | None:
        """The pool of the KVarN layers; None before the first forward pass."""
        return self._rows.pool

    @property
    def materializations(self) -> int:
        """How often a layer's dense keys and values were built; stays 0 under ``"kvarn"``."""
        return self._rows.materializations

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest columns of every row.

        Exact for columns that are not sealed, at least the `hold` newest of the last step, and for the first
        tile where there are sinks. A cut into another record decodes what is kept of that tile, in 16 bit; it
        is sealed again when it is full. See `kvarn.Pool.truncate`. Sliding layers forget what leaves their
        window: call `activate_past_recording` before the forward pass whose columns are to be removed, as
        `generate` does for its drafts.

        Args:
            tokens_to_remove: 0 or the negative number of columns; all columns if it is more.

        Raises:
            ShapeError: the number is positive.
            CapacityError: there is no memory for a tile that is decoded.
            UnsupportedError: a layer keeps a state from which tokens cannot be removed.
            RuntimeError: a sliding or convolution layer did not record its past.
            In each case nothing is changed.
        """
        # Some versions of transformers count the rejected drafts in a tensor.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ShapeError(
                f"crop({tokens_to_remove}): expected 0, or the number of tokens to remove as a negative "
                "number"
            )
        remove = -tokens_to_remove
        with self._rows.crop(remove):
            if remove and remove >= self._rows.columns:
                self._renew_others()
            else:
                stock.crop(self._others(), remove)

    def reset(self) -> None:
        """Forget all rows and give the pool back; the next forward pass may have another batch and dtype."""
        self._rows.close()
        for layer in self.layers:
            if isinstance(layer, KVarNLayer):
                layer.reset()
        self._renew_others()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row beam_idx[i] was; a row may come several times.

        Raises:
            CapacityError: more rows than max_rows; nothing is changed.
        """
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that indices name (integers, or a bool mask), in that order, and free the others.

        Raises:
            CapacityError: more rows than max_rows; nothing is changed.
        """
        if self.pool is not None:
            self._select(torch.arange(len(self._rows.sequences))[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row.

        Raises:
            ShapeError: repeats is not positive.
            CapacityError: more rows than max_rows; nothing is changed.
        """
        if repeats < 1:
            raise ShapeError(
                f"batch_repeat_interleave({repeats}): expected at least 1; reset() drops all rows"
            )
        self._select(torch.arange(len(self._rows.sequences)).repeat_interleave(repeats))

    def _select(self, indices: Tensor) -> None:
        self._rows.select(indices)
        for layer in self._others().values():
            # Of all stock layers only this takes any number of rows.
            layer.reorder_cache(indices)

    def _others(self) -> dict[int, Any]:
        return {number: self.layers[number] for number, kind in enumerate(self._kinds) if not kind.full}

    def _renew_others(self) -> None:
        """Put empty layers in their place; versions differ in what `reset` of a stock layer leaves behind."""
        for number in self._others():
            self.layers[number] = self._kinds[number].make()

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVarNCache":
        """Return a cache of its own with the same rows, in the same pool.

        Raises:
            CapacityError: more rows than max_rows.
        """
        made: KVarNCache = object.__new__(type(self))
        memo[id(self)] = made
        memo[id(self._rows)] = self._rows.copy()
        made.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return made


# Presets, sinks and iterations are checked before a head dim is known; any valid one serves.
_ANY_HEAD_DIM = 128


def _settings(
    decoder: PreTrainedConfig,
    preset: str,
    hold: int | None,
    padding: list[int] | None,
    max_tokens: int | None,
    max_rows: int | None,
    refit: bool,
    iterations: int,
    sink_tokens: int | None,
    recent_tokens: int,
) -> Settings:
    if max_tokens is None:
        max_tokens = getattr(decoder, "max_position_embeddings", None)
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ConfigError(
            f"max_tokens {max_tokens}: expected at least 1; give max_tokens, the longest row to hold"
        )
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"max_rows {max_rows}: expected at least 1, or None for room to spare")
    if hold is not None and hold < 0:
        raise ConfigError(f"hold {hold}: expected at least 0, or None for all new tokens up to a group")
    if padding is not None and min(padding, default=0) < 0:
        raise ConfigError(f"padding {padding}: expected the left padding of each row, at least 0")
    return Settings(
        preset=preset,
        hold=hold,
        padding=None if padding is None else tuple(padding),
        max_tokens=max_tokens,
        max_rows=max_rows,
        refit=refit,
        iterations=iterations,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
    )


def _shape(decoder: PreTrainedConfig, index: int) -> tuple[int, int]:
    """Return KV heads and head dim of a layer as far as the config tells; only ratios matter."""
    per_layer = getattr(decoder, "per_layer_config", None)
    config = decoder if per_layer is None else per_layer[index]
    return getattr(config, "num_key_value_heads", None) or 1, getattr(config, "head_dim", None) or 1
