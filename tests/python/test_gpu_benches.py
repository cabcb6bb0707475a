"""The parts of benches/gpu that need no GPU: what is counted, drawn, and given to caches."""

import pathlib
import sys
import xml.etree.ElementTree as ElementTree

import kvarn
import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benches" / "gpu"))

import caches
import generate
import plot
import shapes
import steps
from filled import FilledPool
from report import command


@pytest.mark.parametrize("sinks", [0, 128])
def test_bytes_to_read_are_those_that_the_pool_holds(sinks):
    lengths = [700, 64, 128, 383, 129, 1000]
    cfg = kvarn.Config("kvarn_k4v2_g128", head_dim=64, sink_tokens=sinks)
    filled = FilledPool(cfg, lengths, kv_heads=2, layers=2, device="cpu")
    stats = filled.pool.stats()
    assert [sequence.length for sequence in filled.sequences] == lengths
    in_slots = sum(lengths) - stats.pages_used * cfg.group
    assert shapes.bytes_to_read(
        lengths,
        group=cfg.group,
        sink_tokens=sinks,
        record_bytes=cfg.record_bytes,
        kv_heads=2,
        head_dim=64,
    ) == 2 * (stats.pages_used * cfg.record_bytes + in_slots * 64 * 4)


def test_a_zipf_batch_is_split_evenly_without_loss():
    ragged = shapes.zipf_lengths(64, 32768)
    even = shapes.even_lengths(64, sum(ragged))
    assert (max(ragged), min(ragged)) == (32768, 512)
    assert sum(even) == sum(ragged)
    assert max(even) - min(even) == 1


def test_the_noted_command_has_no_paths():
    options = ["--set", "main", "--out", "/tmp/a", "--commit=abc", "--out=b", "--small"]
    assert command("gpu/attend.py", options) == "python benches/gpu/attend.py --set main --small"


@pytest.mark.parametrize("kind", ["static", "kvarn", "kvarn-static"])
def test_caches_of_the_generation_bench_hold_the_same_tokens(kind, monkeypatch):
    monkeypatch.setattr(caches, "CHUNK", 150)
    torch.manual_seed(0)
    model = caches.make_model(caches.TINY, 512, torch.float32, "cpu")
    states = caches.States(model, 2, 400)
    tokens = torch.randint(1, 199, (3, 2))
    # Everything recent: nothing is quantised, and the logits are those of a dense cache.
    options = {"recent_tokens": 512} if kind.startswith("kvarn") else {}
    preset = "kvarn_k4v2_g128"
    plain = caches.make_cache("dynamic", model, states, 3, preset)
    expected = generate.decode(steps.eager(model, plain), tokens)[2]
    cache = caches.make_cache(kind, model, states, 3, preset, **options)
    logits = generate.decode(steps.eager(model, cache), tokens)[2]
    assert float((logits - expected).norm() / expected.norm()) < 1e-4


def test_plot_draws_every_line_with_the_bytes_of_its_own_cache():
    shape = shapes.Shape(32, 8, 128, 8, 4096)
    row = vars(shape) | {
        "preset": "kvarn_k4v2_g128",
        "us": 10.0,
        "bytes": 1000,
        "fp16_bytes": 8000,
        "plain_read_us": 5.0,
        "peers": {"sdpa flash gqa": 40.0, "sdpa cudnn gqa": 20.0, "flashinfer fp8": 10.0},
        "peers_hold": {"sdpa flash gqa": "fp16", "sdpa cudnn gqa": "fp16", "flashinfer fp8": "fp8"},
    }
    found = plot.points([row])
    assert found == {
        (8, "kvarn k4v2"): {4096: (10.0, 0.1)},
        (8, "plain read"): {4096: (5.0, 0.2)},
        (8, "sdpa, fastest backend"): {4096: (20.0, 0.4)},
        (8, "flashinfer fp8"): {4096: (10.0, 0.4)},
    }
    drawn = ElementTree.fromstring(plot.document("title", plot.panels(found), columns=2))
    circles = drawn.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2 * len(found)
