"""What a KVarNCache must equal: a DynamicCache whose tiles pass through the codec at the same moments."""

import kvarn
import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    get_layer_types_and_kwargs,
)

FUSED_TOKENS = 16


class FakeQuantLayer(DynamicLayer):
    """Stores dense tensors; a tile is replaced by its decoded record when it is sealed."""

    def __init__(self, codec, hold, padding):
        super().__init__()
        self.codec, self.hold, self.padding = codec, hold, padding

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.sealed = [0] * key_states.shape[0]
            self.sinks = [None] * key_states.shape[0]
        past, new = self.keys.shape[2], key_states.shape[2]
        keys, values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        raw_first = new > FUSED_TOKENS or not any(past > pad for pad in self._padding())
        self.keys, self.values = self._seal(keys, values, past, new)
        return (keys, values) if raw_first else (self.keys, self.values)

    def _padding(self):
        return self.padding or [0] * len(self.sealed)

    def _seal(self, keys, values, past, new):
        keys, values, codec = keys.clone(), values.clone(), self.codec
        group = codec.group
        for row, pad in enumerate(self._padding()):
            added = max(past + new - max(past, pad), 0)
            committed = past + new - pad - min(added, self.hold)
            while (self.sealed[row] + 1) * group + codec.recent_tokens <= committed:
                tile = self.sealed[row]
                self.sealed[row] += 1
                first = max(tile * group, codec.sink_tokens)
                if first >= (tile + 1) * group:
                    continue
                at = slice(pad + tile * group, pad + (tile + 1) * group)
                if tile * group < codec.sink_tokens:
                    self.sinks[row] = keys[row, :, at].clone(), values[row, :, at].clone()
                decoded = kvarn.decode(
                    kvarn.encode(*(x[row, :, at].cpu().contiguous() for x in (keys, values)), codec), codec
                )
                read = slice(pad + first, at.stop)
                for states, tensor in zip((keys, values), decoded, strict=True):
                    states[row, :, read] = torch.as_tensor(tensor)[:, first - tile * group :].to(states)
        return keys, values

    def crop(self, tokens_to_remove):
        """Keep what was read of a tile that is cut, but of a first tile with sinks what came in."""
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        super().crop(tokens_to_remove)
        self.keys, self.values = self.keys.clone(), self.values.clone()
        for row, pad in enumerate(self._padding()):
            kept = max(self.keys.shape[2] - pad, 0)
            tiles = kept // self.codec.group
            if tiles == 0 and self.sinks[row] is not None:
                for states, raw in zip((self.keys, self.values), self.sinks[row], strict=True):
                    states[row, :, pad : pad + kept] = raw[:, :kept]
                self.sinks[row] = None
            self.sealed[row] = min(self.sealed[row], tiles)

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        rows = beam_idx.tolist()
        self.sealed = [self.sealed[row] for row in rows]
        self.sinks = [self.sinks[row] for row in rows]
        if self.padding is not None:
            self.padding = [self.padding[row] for row in rows]


class FakeQuantCache(Cache):
    """Takes the arguments of a KVarNCache that change results."""

    def __init__(self, config, preset, *, hold=None, padding=None, **codec):
        config = config.get_text_config(decoder=True)
        codec = kvarn.Config(preset, head_dim=config.head_dim, **codec)
        hold = codec.group if hold is None else hold
        types, options = get_layer_types_and_kwargs(config)
        if isinstance(options, dict):
            options = [options] * len(types)
        layers = [
            FakeQuantLayer(codec, hold, padding)
            if kind == "full_attention"
            else DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
            for kind, arguments in zip(types, options, strict=True)
        ]
        super().__init__(layers=layers)

    def batch_select_indices(self, indices):
        # Linear layers of transformers can be reordered, and nothing else.
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats):
        rows = next(len(layer.sealed) for layer in self.layers if isinstance(layer, FakeQuantLayer))
        self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))
