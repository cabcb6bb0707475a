"""Peak memory of generation on a GPU: `python tests/gpu/check_memory.py`.

Against the figure of `kvarn.capacity`. Counts what the whole device has given out, so nothing else may run on
it. The exit status is 1 if a figure is beyond its limit.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "python" / "transformers"))

import peak_memory

CASES = ((1, 65536, 2048), (8, 8192, 512))  # rows, tokens, tokens of a prefill chunk


def main():
    failed = 0
    for rows, tokens, chunk in CASES:
        found = peak_memory.measure_all("cuda", layers=16, rows=rows, tokens=tokens, chunk=chunk)
        bad = not peak_memory.within(found)
        failed += bad
        figures = {name: round(count / 1e6, 1) for name, count in found.items()}
        print(
            f"{'FAILED' if bad else ' '} peak memory in MB, {rows} × {tokens} tokens in chunks of {chunk}: "
            f"{figures}, limit {peak_memory.limit(found) / 1e6:.1f}",
            flush=True,
        )
    print(f"{len(CASES)} cases, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
