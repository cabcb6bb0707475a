"""The figures of this folder's cpu_*.json as Markdown: `python benches/cpu_table.py [--out FILE]`."""

import argparse
import json
import pathlib
import sys

from cpu.tables import SECTIONS, document

HERE = pathlib.Path(__file__).parent


def read(folder):
    """What the scripts have written to a folder, by script, in the document's order.

    Raises:
        SystemExit: one has not run.
    """
    missing = [name for name in SECTIONS if not (folder / f"{name}.json").exists()]
    if missing:
        sys.exit(f"{missing[0]}.json: not there, expected in {folder}; run make bench")
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in SECTIONS}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", metavar="FILE", type=pathlib.Path, help="write it there instead of printing")
    arguments = parser.parse_args()
    text = document(read(HERE))
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
