"""The worked example of docs/format.md, byte by byte."""

import re
from pathlib import Path

import kvarn
import numpy as np

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"


def _record() -> np.ndarray:
    """1,280 zeros, with the bytes of the document's table."""
    rows = re.findall(r"^\| (\d+) \| `((?:[0-9A-F]{2} ?)+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.M)
    assert len(rows) == 8
    record = np.zeros((1, 1280), np.uint8)
    for start, text in rows:
        data = bytes.fromhex(text)
        record[0, int(start) : int(start) + len(data)] = list(data)
    return record


def test_the_example_decodes_to_the_two_values_it_names() -> None:
    cfg = kvarn.Config("kvarn_k4v2_g64", head_dim=16)
    assert cfg.record_bytes == 1280
    k, v = kvarn.decode(_record(), cfg, rotated=True)
    expected = np.zeros((1, 64, 16), np.float32)
    expected[0, 45, 11] = 1.125
    np.testing.assert_array_equal(k, expected)
    expected[0, 45, 11] = 1
    np.testing.assert_array_equal(v, expected)


def test_out_of_the_rotated_frame_it_is_row_11_of_the_hadamard_matrix() -> None:
    k, _ = kvarn.decode(_record(), kvarn.Config("kvarn_k4v2_g64", head_dim=16))
    signs = [(-1) ** bin(11 & channel).count("1") for channel in range(16)]
    np.testing.assert_allclose(k[0, 45], 1.125 / 4 * np.array(signs), rtol=1e-6)
    assert not k[0, :45].any()
    assert not k[0, 46:].any()
