"""The matrix of models and ways to generate: its cells, what one must show, and the table of all.

A cell generates through a `KVarNCache`, and with a reference: the same model over a cache of dense tensors
whose tiles pass through the codec at the same moments; at 8 bits, over transformers' unquantised cache. In
float32 the same text must come of itself; where arms differ by more, one follows the other's text, and all of
its logits are compared.
"""

import itertools
from dataclasses import astuple, dataclass, replace
from functools import cache

import torch
from fake_quant import FakeQuantCache
from kvarn import KVarNCache
from kvarn.integrations.transformers import UnsupportedError
from matrix_models import MODELS, model, reference_attention
from matrix_modes import DRAFTING, MODES, NEW, Arm
from tiny_models import assert_same_generation
from transformers import DynamicCache

ATTENTION = ("kvarn", "sdpa", "eager")
# Compared with the codec at the same moments, and with no codec at all.
PRESETS = ("kvarn_k4v4_g64", "kvarn_k8v8_g64")
UNQUANTISED = "kvarn_k8v8_g64"
DTYPES = {"cpu": ("float32", "float16", "bfloat16"), "cuda": ("float16", "bfloat16")}
# Largest difference of logits, of their range.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}
# On a GPU the arms encode by different programs, whose codes differ where a last bit decides.
DEVICE_TOLERANCE = {"float16": 2e-2, "bfloat16": 3e-2}
# Of 8 bits, in two layers.
UNQUANTISED_TOLERANCE = {"float32": 2e-2, "float16": 2e-2, "bfloat16": 3e-2}
# What cannot be, and the error that says so.
REFUSED = {
    ("Qwen3-Next", "prompt look-up"): (ValueError, "not supported with stateful models"),
    ("Qwen3-Next", "assistant"): (ValueError, "not supported with stateful models"),
    ("Qwen3-Next", "crop"): (UnsupportedError, r"layer 0 \(LinearAttentionLayer\) keeps a state"),
}


@dataclass(frozen=True)
class Cell:
    """One combination of the matrix."""

    model: str
    mode: str
    attention: str
    dtype: str
    pads: bool
    preset: str

    def __str__(self):
        parts = self.model, self.mode, self.attention, self.dtype, self.preset.removeprefix("kvarn_")
        return "-".join(part.replace(" ", "_") for part in parts) + ("-padded" if self.pads else "")


def every_cell(device="cpu"):
    """The full cross product, less what the model or transformers refuses."""
    cells = itertools.product(MODELS, MODES, ATTENTION, DTYPES[device], (False, True), PRESETS)
    return [
        cell
        for cell in itertools.starmap(Cell, cells)
        if (cell.model, cell.mode) not in REFUSED
        and not (cell.attention == "sdpa" and reference_attention(cell.model) != "sdpa")
    ]


def covering_cells(device="cpu"):
    """A choice of cells in which every pair of values of two axes occurs that occurs at all; greedy."""
    rest = {cell: pairs(cell) for cell in every_cell(device)}
    missing = set().union(*rest.values())
    chosen = []
    while missing:
        best = max(rest, key=lambda cell: len(rest[cell] & missing))
        missing -= rest.pop(best)
        chosen.append(best)
    return sorted(chosen, key=lambda cell: (list(MODELS).index(cell.model), list(MODES).index(cell.mode)))


def pairs(cell):
    """Every two values that a cell brings together, with their axes."""
    return set(itertools.combinations(enumerate(astuple(cell)), 2))


def _exact(cell):
    """Whether both arms differ by so little that the same text comes of itself."""
    return cell.dtype == "float32" and cell.preset != UNQUANTISED


def _model(cell, device, attention):
    made = model(cell.model, getattr(torch, cell.dtype), device, every_expert=not _exact(cell))
    made.set_attn_implementation(attention)
    return made


@cache
def _reference(cell, device):
    """What a cell, its attention set aside, is compared with, and what `crop` took back."""
    made = _model(cell, device, reference_attention(cell.model))

    def make(padding):
        if cell.preset == UNQUANTISED:
            return Unquantised(config=made.config)
        return FakeQuantCache(made.config, cell.preset, padding=padding)

    arm = Arm(made, make, cell.pads)
    return MODES[cell.mode](arm), arm.removed


class Unquantised(DynamicCache):
    def batch_repeat_interleave(self, repeats):
        # Linear layers of transformers can be reordered, and nothing else.
        rows = next(layer.keys.shape[0] for layer in self.layers if getattr(layer, "keys", None) is not None)
        self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))


def check(cell, device="cpu"):
    """Generate as the cell says, on a device, and compare; raises AssertionError."""
    with torch.no_grad():
        expected, removed = _reference(replace(cell, attention=""), device)
        made, caches = _model(cell, device, cell.attention), []

        def make(padding):
            # Only the attention function "kvarn" shows the mask to the cache.
            told = None if cell.attention == "kvarn" else padding
            caches.append(KVarNCache(made.config, cell.preset, padding=told))
            return caches[-1]

        # Else two right texts part where two tokens are level, and the rest of them cannot be compared.
        follow = None if _exact(cell) or cell.mode == "beams" else [one.tokens for one in expected]
        arm = Arm(made, make, cell.pads, follow)
        found = MODES[cell.mode](arm)
    codec_tolerance = TOLERANCE if device == "cpu" else DEVICE_TOLERANCE
    tolerance = (UNQUANTISED_TOLERANCE if cell.preset == UNQUANTISED else codec_tolerance)[cell.dtype]
    if cell.mode == "crop":
        # A tile passes through the codec twice: more codes lie where a last bit decides.
        tolerance *= 3
    for ours, theirs in zip(found, expected, strict=True):
        if cell.mode == "beams":
            _assert_same_beams(ours, theirs, tolerance, exact=_exact(cell))
        else:
            assert_same_generation(ours, theirs, tolerance)
    assert all((cache.materializations == 0) == (cell.attention == "kvarn") for cache in caches)
    assert caches[0].pool.stats().pages_used > 0, "nothing was sealed"
    if cell.mode in DRAFTING:
        for drafts in (arm.removed, removed):
            assert any(drafts), "no draft was rejected"
            assert len(drafts) < NEW, "no draft was accepted"


def _assert_same_beams(ours, theirs, tolerance, *, exact):
    """Scores are means of log probabilities; where they differ at all, level beams may change places."""
    error = (ours.scores - theirs.scores).abs().max().item()
    assert error <= 10 * tolerance, f"scores differ by {error:.2e}"
    assert not exact or torch.equal(ours.tokens, theirs.tokens)


def table(counts):
    """The Markdown table of models and modes.

    Args:
        counts: (passed, run) of (model, mode).
    """
    rows = ["| | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    for name in MODELS:
        shown = [_shown(name, mode, *counts.get((name, mode), (0, 0))) for mode in MODES]
        rows.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def _shown(name, mode, passed, run):
    if (name, mode) in REFUSED:
        return "refused"
    if run == 0:
        return ""
    return str(run) if passed == run else f"{passed} of {run}"
