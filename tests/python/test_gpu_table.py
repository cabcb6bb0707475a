"""benches/gpu/table.py and what it says of the files in the repository."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benches" / "gpu"))

import table
from goals import GOALS, Goal, bounds

FOLDER = table.HERE


def attend_row(context, batch, **values):
    return {
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "q_len": 1,
        "context": context,
        "batch": batch,
        "fp16_bytes": 2 * 10**9,
        "preset": "kvarn_k4v2_g128",
        "us": 20.0,
        "plain_read_us": 18.0,
        "of_plain_read": 0.9,
        "times_peer": 5.0,
        "peer": "sdpa cudnn gqa",
        "peers": {"sdpa flash gqa": 120.0, "sdpa cudnn gqa": 100.0, "flashinfer fp8": 60.0},
    } | values


def run_of(rows, **values):
    head = {"device": "a device", "commit": "a" * 40, "command": "python it.py", "torch": "2", "rows": rows}
    return head | values


def cells(text, first):
    """The cells of the only line of a table whose first cell is `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def goal(text):
    (found,) = [goal for goal in GOALS if goal.text == text]
    return found


def test_the_document_is_what_the_files_say():
    document = table.document(table.read(FOLDER, "h200"), "h200")
    assert (FOLDER / "RESULTS.md").read_text(encoding="utf-8") == document


def test_every_goal_is_about_rows_of_the_files():
    runs = table.read(FOLDER, "h200")
    assert list(runs) == list(table.SECTIONS)
    assert [goal.text for goal in GOALS if not goal.values(runs)] == []


def test_a_row_of_attention_shows_every_preset_and_the_fastest_backend():
    rows = [attend_row(4096, 8), attend_row(4096, 8, preset="kvarn_k2v2_g128", us=10.04, times_peer=None)]
    text = "\n".join(table.attend(run_of(rows)))
    assert cells(text, "heads, context × batch")[2:] == [
        "k4v2",
        "k2v2",
        "sdpa, fastest backend",
        "flashinfer fp8",
    ]
    assert cells(text, "32/8 D 128 q 1: 4096 × 8")[1:] == [
        "2.00",
        "20.0 · 0.90 · 5.00 ×",
        "10.0 · 0.90 · –",
        "**100.0**",
        "60.0",
    ]


def test_goals_take_rows_of_their_preset_and_size():
    rows = [
        attend_row(4096, 64, of_plain_read=0.80),
        attend_row(4096, 65, of_plain_read=0.88),
        attend_row(131072, 64, of_plain_read=0.95, fp16_bytes=4 * 10**9),
        attend_row(1024, 1, of_plain_read=0.10, fp16_bytes=10**9 - 1),
        attend_row(4096, 64, of_plain_read=0.20, preset="kvarn_k2v2_g128"),
    ]
    runs = {"attend-main": run_of(rows)}
    large = goal("attention k4v2, fraction of a plain read, fp16 cache of 1 GB or more")
    assert (large.wanted(), large.reached(large.values(runs))) == ("≥ 0.87", "0.88 (0.80 to 0.95)")
    assert large.verdict(large.values(runs)) == "at the median"
    largest = goal("attention k4v2, fraction of a plain read, fp16 cache of 4 GB or more")
    assert (largest.values(runs), largest.verdict([0.95])) == ([0.95], "yes")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "counts"),
    [(32, 8, 4, True), (64, 8, 2, True), (24, 8, 3, True), (8, 8, 8, False), (32, 4, 4, False)],
)
def test_the_goal_of_16_columns_takes_9_to_16(heads, kv_heads, q_len, counts):
    columns = goal(
        "attention k4v2, fraction of a plain read, 9 to 16 query columns, fp16 cache of 1 GB or more"
    )
    row = attend_row(32768, 8, heads=heads, kv_heads=kv_heads, q_len=q_len)
    assert columns.values({"attend-qlen": run_of([row])}) == ([0.9] if counts else [])


def test_verdicts():
    least = Goal("", "", None, 1.0)
    assert [least.verdict(values) for values in ([1.0, 2.0], [0.9, 1.0, 1.1], [0.9, 0.9, 1.1], [])] == [
        "yes",
        "at the median",
        "no",
        "not measured",
    ]
    # One slower shape is enough.
    assert Goal("", "", None, 1.0, every=True).verdict([0.9, 1.0, 1.1]) == "no"
    most = Goal("", "", None, 10.0, at_most=True, digits=1, unit=" µs")
    assert (most.wanted(), most.verdict([9.9, 10.0]), most.verdict([10.1])) == ("≤ 10.0 µs", "yes", "no")


def test_another_commit_and_what_is_missing_are_said():
    missing = {
        "sdpa cudnn gqa": ["32/8 D 128 q 1: 1 × 1024: no such kernel. Aborting."],
        "flashinfer fp16": ["32/8 D 64 q 1: 1 × 4096: no module", "32/8 D 96 q 1: 1 × 4096: no module"],
    }
    runs = {
        "attend-main": run_of([attend_row(4096, 8)], missing=missing, failed={"a part": "it broke"}),
        "attend-heads": run_of([attend_row(4096, 8)], commit="b" * 40),
    }
    text = table.document(runs, "h100")
    first, second = text.split("## attend-heads")
    assert "commit aaaaaaaaaa." in first
    assert "commit bbbbbbbbbb, another than attend-main's aaaaaaaaaa." in second
    assert "- sdpa cudnn gqa, not measured at some shapes: no such kernel.\n" in first
    assert "- flashinfer fp16, not measured at any shape: no module.\n" in first
    assert "- a part failed: it broke" in first
    assert "## Goals" not in text  # set for an H200
    assert "| attend-main | aaaaaaaaaa |" in table.document(runs, "h200")


def test_rows_that_measure_python_are_named():
    rows = [
        {"cache": "kvarn", "context": 4096, "batch": 1, "step_ms": 20.0, "host_ms": 19.5},
        {"cache": "static", "context": 4096, "batch": 1, "step_ms": 20.0, "host_ms": 19.5},
        {"cache": "static", "context": 131072, "batch": 4, "step_ms": 100.0, "host_ms": 20.0},
    ]
    text = " ".join(bounds({"generate": run_of(rows)}))
    assert "Such rows are, of kvarn, all; of static, all but 131072 × 4." in text


def test_a_check_without_an_end_is_no_pass():
    found = {"command": "python a.py", "seconds": 3, "printed": "1 | 2", "notes": [], "failures": []}
    parts = table.check({"runs": [found | {"status": 0}, found | {"status": "not done after 3 s"}]})
    assert parts[0] == "1 of 2 ended with status 0."
    assert "1 \\| 2" in parts[1]


def test_a_device_without_files_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["table.py", "--device", "abacus"])
    with pytest.raises(SystemExit, match="'abacus': expected a file like attend-main-abacus"):
        table.main()
