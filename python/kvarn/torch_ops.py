"""Operators of torch over steps, so that models with kvarn compile into one graph.

Importing this module defines three operators of the namespace ``torch.ops.kvarn``. They do what the methods
of `kvarn.Step` do, on the CPU and on CUDA::

    append(Tensor(a!) step, int layer, Tensor k, Tensor v, bool rotated=False) -> ()
    attend(Tensor(a!) step, int layer, Tensor q, float? scale=None, int? window=None, float? softcap=None,
           Tensor? sink_logits=None, bool rotated=False) -> Tensor
    attend_lse(…as attend…) -> (Tensor, Tensor)

A graph holds no Python objects, so a step is named by its handle: `Step.handle`, int64 [1] on the CPU. Take
it outside of what is compiled and pass it in: one compiled graph then serves every step. Every operator
counts as writing to the handle, though its value stays, so that compilers leave all calls, and leave them in
order.

None of the operators has a derivative.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from kvarn.errors import StateError

if TYPE_CHECKING:
    from kvarn.step import Step

__all__ = ["handle_of"]

_ATTEND = (
    "(Tensor(a!) step, int layer, Tensor q, float? scale=None, int? window=None, float? softcap=None, "
    "Tensor? sink_logits=None, bool rotated=False)"
)

# Steps that have a handle, as long as somebody else refers to them.
_steps: WeakValueDictionary[int, Step] = WeakValueDictionary()
_serials = itertools.count(1)


def handle_of(step: Step) -> torch.Tensor:
    """A handle of a step, int64 [1] on the CPU: never used again for another step of this process."""
    serial = next(_serials)
    _steps[serial] = step
    return torch.tensor([serial])


def _step(handle: torch.Tensor) -> Step:
    serial = int(handle.item())
    step = _steps.get(serial)
    if step is None:
        raise StateError(
            f"step handle {serial}: expected the handle of a step that exists; keep the step while it is used"
        )
    return step


def _append(step: torch.Tensor, layer: int, k: torch.Tensor, v: torch.Tensor, rotated: bool = False) -> None:
    _step(step).append(layer, k, v, rotated)


def _attend(
    step: torch.Tensor,
    layer: int,
    q: torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    rotated: bool = False,
) -> torch.Tensor:
    return _step(step).attend(layer, q, scale, window, softcap, sink_logits, rotated=rotated)


def _attend_lse(
    step: torch.Tensor,
    layer: int,
    q: torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    rotated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _step(step).attend(layer, q, scale, window, softcap, sink_logits, return_lse=True, rotated=rotated)


def _fake_append(
    step: torch.Tensor, layer: int, k: torch.Tensor, v: torch.Tensor, rotated: bool = False
) -> None:
    pass


def _fake_attend(step: torch.Tensor, layer: int, q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _fake_attend_lse(
    step: torch.Tensor, layer: int, q: torch.Tensor, *_: object, **__: object
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)


# The operators exist as long as this does.
_torch_library: Any = torch.library
_library = _torch_library.Library("kvarn", "DEF")
_library.define("append(Tensor(a!) step, int layer, Tensor k, Tensor v, bool rotated=False) -> ()")
_library.define(f"attend{_ATTEND} -> Tensor")
_library.define(f"attend_lse{_ATTEND} -> (Tensor, Tensor)")
# One implementation for every device: the pool of the step says where the work is done.
_library.impl("append", _append, "CompositeExplicitAutograd")
_library.impl("attend", _attend, "CompositeExplicitAutograd")
_library.impl("attend_lse", _attend_lse, "CompositeExplicitAutograd")
torch.library.register_fake("kvarn::append", _fake_append, lib=_library)
torch.library.register_fake("kvarn::attend", _fake_attend, lib=_library)
torch.library.register_fake("kvarn::attend_lse", _fake_attend_lse, lib=_library)
