"""Models × ways to generate: `--matrix full` runs every combination, else a choice that holds every pair."""

import pathlib

import matrix
import pytest
import torch
from fake_quant import FakeQuantCache
from matrix_models import MODELS, model, reference_attention
from tiny_models import TOLERANCE, run, tokens
from transformers import DynamicCache

README = pathlib.Path(__file__).parents[3] / "README.md"


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        full = metafunc.config.getoption("--matrix", default="pairs") == "full"
        metafunc.parametrize("cell", matrix.every_cell() if full else matrix.covering_cells(), ids=str)


def test_cell(cell, record_property):
    record_property("cell", (cell.model, cell.mode))
    matrix.check(cell)


def test_the_choice_holds_every_pair():
    every, chosen = (
        {pair for cell in cells for pair in matrix.pairs(cell)}
        for cells in (matrix.every_cell(), matrix.covering_cells())
    )
    assert chosen == every


@pytest.mark.parametrize("name", MODELS)
def test_the_codec_is_visible(name):
    # Else every comparison here would pass with a cache that never quantises.
    made = model(name, torch.float32, "cpu")
    made.set_attn_implementation(reference_attention(name))
    chunks = [tokens(1, 192), *tokens(1, 8, seed=2).split(1, 1)]
    raw = run(made, DynamicCache(config=made.config), chunks)
    quantised = run(made, FakeQuantCache(made.config, "kvarn_k4v4_g64"), chunks)
    width = (raw.max() - raw.min()).item()
    assert (raw - quantised).abs().max() > 2 * TOLERANCE * width


@pytest.mark.parametrize(("name", "mode"), matrix.REFUSED)
def test_what_is_refused_says_why(name, mode):
    kind, message = matrix.REFUSED[name, mode]
    with pytest.raises(kind, match=message):
        matrix.check(matrix.Cell(name, mode, "kvarn", "float32", False, "kvarn_k4v4_g64"))


def test_gpt_oss_has_no_sdpa():
    with pytest.raises(ValueError, match="does not support an attention implementation through torch"):
        model("gpt-oss", torch.float32, "cpu").set_attn_implementation("sdpa")


def test_the_readme_shows_the_full_matrix():
    counts = {}
    for cell in matrix.every_cell():
        passed, run = counts.get((cell.model, cell.mode), (0, 0))
        counts[cell.model, cell.mode] = passed + 1, run + 1
    assert matrix.table(counts) in README.read_text()
