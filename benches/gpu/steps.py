"""One step of a model over a cache: run by Python, or replayed from a CUDA graph."""

import torch
from kvarn import CapturedDecoder


def eager(model, cache):
    """Steps that run the model's Python. Takes ids [batch, 1], gives logits [batch, 1, vocabulary]."""

    def step(ids):
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    return step


def captured(model, cache):
    """Steps by kvarn's decoder: the second is captured, later ones are replays."""
    return CapturedDecoder(model, cache)


class CapturedStatic:
    """The same over a StaticCache of transformers, whose positions are counted on the device."""

    def __init__(self, model, cache):
        self._step = eager(model, cache)
        self._ids = self._graph = self._logits = None

    def __call__(self, ids):
        if self._ids is None:
            # What the model allocates for good is allocated by a step before the capture.
            self._ids = ids.clone()
            return self._step(self._ids)
        self._ids.copy_(ids)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._step(self._ids)
        self._graph.replay()
        return self._logits
