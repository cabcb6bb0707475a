"""Prompts of every length around tile boundaries, then a long chunk and single tokens behind them."""

import pytest
from fake_quant import FakeQuantCache
from kvarn import KVarNCache
from tiny_models import assert_close, run, tokens

G = 64
BOUNDARIES = sorted({n for edge in (0, G, 2 * G, 3 * G) for n in range(edge - 2, edge + 3) if n > 0})


def check(model, expected, preset, chunks, **options):
    reference = expected(lambda: run(model, FakeQuantCache(model.config, preset, **options), chunks))
    cache = KVarNCache(model.config, preset, **options)
    assert_close(run(model, cache, chunks), reference)
    assert cache.materializations == 0 or model.config._attn_implementation != "kvarn"


def test_every_length_modulo_the_group(model, expected, preset):
    ids = tokens(1, 2 * G + 6)
    for length in range(G, 2 * G):
        check(model, expected, preset, [ids[:, :length], *ids[:, length : length + 3].split(1, 1)])


def test_boundaries(model, expected, preset, implementation):
    model.set_attn_implementation(implementation)
    ids = tokens(1, 4 * G)
    for length in BOUNDARIES:
        rest = ids[:, length : length + 24].split([17, 1, 1, 5], 1)
        check(model, expected, preset, [ids[:, :length], *rest])


@pytest.mark.parametrize(
    "options",
    [
        {"hold": 0},
        {"hold": 3},
        {"sink_tokens": 0},
        {"sink_tokens": 16, "hold": 0},
        {"recent_tokens": 50},
        {"refit": False, "iterations": 3},
    ],
)
def test_options(model, expected, preset, implementation, options):
    model.set_attn_implementation(implementation)
    ids = tokens(2, 4 * G)
    for length in (G - 1, 2 * G, 2 * G + 1):
        rest = ids[:, length : length + G + 28].split([G - 3, 16, 1, 1, 1, 12], 1)
        check(model, expected, preset, [ids[:, :length], *rest], **options)
