"""The benchmarks of a CPU: each runs, prints and writes; the document is what the files say."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import kvarn
import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benches"))

import cpu_table
from cpu import bars, packed, peers, tables, timing
from gpu.shapes import Shape

BENCHES = cpu_table.HERE
KINDS = {
    "cpu_attention": {"decode", "growth", "prefill", "expand"},
    "cpu_encode": {"encode", "seal", "append", "append cold", "fill"},
    "cpu_generate": {"decode", "compare"},
}


@functools.cache
def small_run(name):
    """What a script's small run prints, and the values that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "run.json"
        command = [sys.executable, str(BENCHES / f"{name}.py"), "--small", "--out", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", KINDS)
def test_a_script_measures_every_kind_of_row(name):
    _, run = small_run(name)
    assert {row["kind"] for row in run["rows"]} == KINDS[name]
    assert (run["failed"], run["missing"]) == ({}, {})
    assert run["command"] == f"python benches/{name}.py --small"


@pytest.mark.parametrize("name", KINDS)
def test_a_script_prints_the_tables_that_the_document_has(name):
    printed, run = small_run(name)
    for part in [*tables.SECTIONS[name][1](run), tables.judged({name: run}, run["instruction_set"])]:
        assert part in printed


@pytest.mark.parametrize("name", KINDS)
def test_a_run_notes_processor_threads_and_instruction_sets(name):
    printed, run = small_run(name)
    assert run["instruction_set"] == kvarn._kvarn.instruction_set()[0]
    assert (run["threads"], run["cores"], run["torch"]) == (2, os.cpu_count(), torch.__version__)
    assert run["others_cores"] is None or 0 <= run["others_cores"] <= os.cpu_count()
    assert tables.describe(run) in printed
    assert run["device"] in printed


def test_attention_is_compared_with_the_fastest_peer():
    _, run = small_run("cpu_attention")
    for row in run["rows"]:
        if row["kind"] == "decode":
            assert row["peers"].keys() == {f"{way} {dtype}" for way in peers.WAYS for dtype in peers.DTYPES}
            assert row["peers"][row["peer"]] == min(row["peers"].values())
        if row["kind"] == "prefill":
            sixteen = {name: us for name, us in row["peers"].items() if not name.endswith("fp32")}
            assert row["peers"][row["peer"]] == min(sixteen.values())


@pytest.mark.parametrize("q_len", [1, 5])
def test_a_wrong_peer_is_found(q_len, monkeypatch):
    shape = Shape(8, 2, 64, 1, 256, q_len)
    for way in peers.WAYS:
        assert peers.check(shape, "fp32", way) < 1e-5
    monkeypatch.setattr(peers.Dense, "matmul", lambda dense: 1.001 * dense.sdpa_gqa())
    with pytest.raises(ArithmeticError, match=r"matmul fp32: error 1\.0e-03 against float64"):
        peers.check(shape, "fp32", "matmul")


def test_wrong_attention_of_kvarn_is_found(monkeypatch):
    assert packed.check("kvarn_k4v2_g128", 32, 3) < packed.TOLERANCE
    plain = packed.reference
    monkeypatch.setattr(packed, "reference", lambda q, k, v: plain(q, k, 1.01 * v))
    with pytest.raises(ArithmeticError, match=r"kvarn kvarn_k4v2_g128: error 9\.9e-03"):
        packed.check("kvarn_k4v2_g128", 32, 3)


def test_a_batch_has_copies_in_memory_of_their_own():
    filled = packed.Packed("kvarn_k2v2_g128", 500, 3)
    sequences = filled._filled.sequences
    pages = [set(torch.from_dlpack(sequence.block_table).tolist()) - {-1} for sequence in sequences]
    assert [len(found) for found in pages] == [2, 2, 2]
    assert len(set.union(*pages)) == 6
    filled.truncate(300)
    assert [sequence.length for sequence in sequences] == [300, 300, 300]


def test_slow_calls_get_fewer_turns(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET_S", 0.0)
    turns = timing.Alternation(5, cold_bytes=4096)
    called = []
    turns.run({"a": lambda: called.append("a"), "b": lambda: called.append("b")})
    assert called == ["a", "b"] * (1 + timing.LEAST_RUNS)
    turns.run({"a": lambda: None})
    assert (len(turns.seconds["a"]), len(turns.seconds["b"])) == (4, 2)
    assert len(turns.reads) == 6


def run_of(name, rows, **values):
    head = {"device": "a processor", "instruction_set": "avx2", "cores": 2, "threads": 2, "commit": "a" * 40}
    head |= {"command": f"python benches/{name}.py", "torch": "2", "rows": rows, "failed": {}, "missing": {}}
    return head | values


def cells(text, first):
    """The cells of the only line of a table whose first cell is `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_bars_are_half_without_avx512_and_every_row_must_reach_them():
    rows = [{"kind": "encode", "refit": True, "pairs_per_s_and_thread": speed} for speed in (1999.0, 3000.0)]
    judged = tables.judged({"cpu_encode": run_of("cpu_encode", rows)}, "avx2")
    text = "encode at D 128, refit on, tile pairs a second and thread"
    assert cells(judged, text)[1:5] == ["≥ 2000", "2500 (1999 to 3000)", "2", "no"]
    rows[0]["pairs_per_s_and_thread"] = 2000.0
    assert cells(tables.judged({"cpu_encode": run_of("cpu_encode", rows)}, "avx2"), text)[4] == "yes"
    assert cells(tables.judged({"cpu_encode": run_of("cpu_encode", rows)}, "avx512"), text)[4] == "no"


def test_a_bar_may_be_met_and_the_goal_beyond_it_not():
    rows = [
        {"kind": "decode", "preset": "kvarn_k4v2_g128", "context": context, "times_peer": times}
        | {"of_plain_read": 0.4}
        for context, times in ((4096, 1.0), (16384, 3.5), (65536, 6.5))
    ]
    judged = tables.judged({"cpu_attention": run_of("cpu_attention", rows)}, "avx2")
    times = cells(judged, "decode k4v2 at 16 K and 64 K tokens, × the fastest dense peer")
    assert times[1:] == ["≥ 3.00 ×", "5.00 (3.50 to 6.50)", "2", "yes", "≥ 6.00 ×", "no"]
    read = cells(judged, "decode k4v2 at 16 K and 64 K tokens, fraction of a plain read")
    assert read[4:] == ["yes", "≥ 0.40", "yes"]


def test_the_document_is_what_the_files_say():
    document = (BENCHES.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert document == tables.document(cpu_table.read(BENCHES))


def test_every_bar_is_about_rows_of_the_files():
    runs = cpu_table.read(BENCHES)
    instruction_set = runs["cpu_attention"]["instruction_set"]
    assert [bar.least.text for bar in bars.bars(instruction_set) if not bar.least.values(runs)] == []


def test_files_of_different_processors_are_refused():
    runs = {"cpu_encode": run_of("cpu_encode", []), "cpu_generate": run_of("cpu_generate", [], device="b")}
    with pytest.raises(ValueError, match="runs of 2 processors: expected one"):
        tables.document(runs)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"cpu_attention\.json: not there, expected in .*; run make bench"):
        cpu_table.read(tmp_path)


def test_what_failed_is_said():
    run = run_of("cpu_encode", [], failed={"append": "it broke"})
    assert "- append failed: it broke" in tables.document({"cpu_encode": run})
