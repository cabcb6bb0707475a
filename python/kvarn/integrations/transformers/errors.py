"""Errors of the transformers cache that no tensor check covers."""

from kvarn import KvarnError


class UnsupportedError(KvarnError, NotImplementedError):
    """A model or a cache operation that a `KVarNCache` cannot serve; the text names what to use instead."""
