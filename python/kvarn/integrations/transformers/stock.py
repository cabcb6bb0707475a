"""The layers of a `KVarNCache` that are transformers' own: cropped together, or not at all."""

from typing import Any

from kvarn.integrations.transformers.errors import UnsupportedError


def crop(layers: dict[int, Any], remove: int) -> None:
    """Remove the last `remove` columns of every row, or raise and change nothing.

    With 0, layers that record their past for a later removal forget it.

    Args:
        layers: cache layers of transformers by their number in the model.
        remove: number of columns, fewer than there are.

    Raises:
        UnsupportedError: a layer keeps a state from which tokens cannot be removed.
        RuntimeError: of transformers: a layer did not record its past.
    """
    held = {number: layer for number, layer in layers.items() if not _empty(layer)}
    if remove == 0:
        # The others have nothing to forget, and some refuse.
        held = {number: layer for number, layer in held.items() if getattr(layer, "record_past", False)}
    else:
        for number, layer in held.items():
            if not layer.is_croppable:
                raise UnsupportedError(
                    f"crop(-{remove}): layer {number} ({type(layer).__name__}) keeps a state of all tokens, "
                    "from which the newest cannot be removed: expected 0; copy the cache before the tokens "
                    "that may have to go"
                )
    before = {number: _attributes(layer) for number, layer in held.items()}
    try:
        for layer in held.values():
            layer.crop(-remove)
    except BaseException:
        for number, layer in held.items():
            layer.__dict__.clear()
            layer.__dict__.update(before[number])
        raise


def _empty(layer: Any) -> bool:
    """Whether nothing was stored yet."""
    states = (
        getattr(layer, name, {}) for name in ("is_conv_states_initialized", "is_recurrent_states_initialized")
    )
    return not getattr(layer, "is_initialized", False) and not any(any(flags.values()) for flags in states)


def _attributes(layer: Any) -> dict[str, Any]:
    """Return what `crop` replaces; it writes to no tensor, but into dicts of tensors."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}
