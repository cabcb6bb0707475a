"""Sequences in many parts on a GPU: `python tests/gpu/check_parts.py [--small]`.

Long sequences in layers of few KV heads are attended in many parts; beyond 32 of them, groups are merged
first, by whichever thread block comes last. Checked against float64 over what the pool stores around that
number and far beyond it, with one query column to sixteen, and bit by bit: alone and in a batch, and
replayed by a graph that was captured when there were few parts. Ends with counts; the exit status is 1 if
anything failed.
"""

import argparse
import sys

import check
import torch
from check import COUNTS, Twin, poison_outputs

# Tokens in 31 to 34 parts of 1,024, in a whole number of groups of parts, and in about a hundred.
LENGTHS = (30_500, 31_500, 32_500, 33_500, 47_900, 98_000)
SHAPES = (
    # head dim, group, bits, KV heads, query heads per KV head, new tokens, options
    (128, 128, (4, 2), 1, 16, 1, {}),
    (128, 128, (4, 4), 1, 4, 1, {"softcap": 20.0}),
    (64, 64, (3, 3), 1, 1, 1, {}),
    (96, 128, (2, 2), 1, 8, 2, {}),
    (256, 64, (8, 4), 1, 8, 1, {}),
    (128, 64, (4, 2), 2, 5, 3, {"window": 60_000}),
)


def prompt(made, length):
    index = made.create()
    made.step([index], [length], 0, group=1, compare=False, attend=False)
    return index


def check_lengths(shapes, lengths):
    """Outputs of a step, before and after append, with sequences of several lengths side by side."""
    for d, g, bits, kv, group, new, options in shapes:
        pages = sum(lengths) // g + 8
        made = Twin(d=d, g=g, bits=bits, kv=kv, dtype=torch.float16, pages=pages, slots=40, seed=d + g)
        sequences = [prompt(made, length) for length in lengths]
        made.step(sequences, [new] * len(sequences), 0, group=group, options=options)
        COUNTS.cases += 1
        print(f"D {d}, G {g}, {kv} KV heads of {group} queries, {new} new, {options}: done", flush=True)


def check_alone(lengths):
    """The same bits alone and in a batch, where shares begin and end elsewhere."""
    made = Twin(
        d=128, g=128, bits=(4, 2), kv=1, dtype=torch.float16, pages=sum(lengths) // 128 + 8, slots=40, seed=3
    )
    pool, which = made.gpu, [made.sequences[prompt(made, length)][1] for length in lengths]
    k, q = made.normal(len(which), 1, 128), made.normal(len(which), 16, 128)
    with pool.step(which, [1] * len(which)) as step:
        for layer in range(2):
            step.append(layer, k, k)
        together = step.attend(1, q)
        step.abandon()
    for index, sequence in enumerate(which):
        row = slice(index, index + 1)
        with pool.step([sequence], [1]) as step:
            for layer in range(2):
                step.append(layer, k[row], k[row])
            alone = step.attend(1, q[row])
            step.abandon()
        COUNTS.vectors += 16
        if not torch.equal(alone, together[row]):
            COUNTS.fail(f"{lengths[index]} tokens: alone and in a batch differ")
    COUNTS.cases += 1
    print("alone and in a batch: done", flush=True)


def check_graph():
    """A graph that was captured over few parts runs a step over many."""
    made = Twin(d=128, g=64, bits=(4, 2), kv=1, dtype=torch.float16, pages=900, slots=40, seed=4)
    pool, stream = made.gpu, torch.cuda.Stream()
    sequence = made.sequences[prompt(made, 500)][1]
    arrays = pool.static_arrays([1], tokens=60_000)
    k, q = made.normal(1, 1, 128), made.normal(1, 16, 128)
    more = made.normal(45_000, 1, 128)

    def forward(step):
        for layer in range(2):
            step.append(layer, k, k)
        return step.attend(1, q)

    with torch.cuda.stream(stream):
        warm = pool.step([sequence], [1], arrays=arrays)
        forward(warm)
        warm.abandon()
        step = pool.step([sequence], [1], arrays=arrays)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = forward(step)
        step.abandon()
        with pool.step([sequence], [len(more)]) as step:
            for layer in range(2):
                step.append(layer, more, more)
        eager = pool.step([sequence], [1])
        expected = forward(eager)
        eager.abandon()
        for _ in range(3):
            step = pool.step([sequence], [1], arrays=arrays)
            out.fill_(float("nan"))
            step.replay(graph)
            torch.cuda.synchronize()
            COUNTS.vectors += 16
            if not torch.equal(out, expected):
                COUNTS.fail("a replay over many parts differs from the eager step")
            step.abandon()
    COUNTS.cases += 1
    print("graph: done", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="one shape, for compute-sanitizer")
    arguments = parser.parse_args()
    check.ON_HOST = arguments.small
    poison_outputs()
    if arguments.small:
        check_lengths(SHAPES[2:3], (33_500,))
    else:
        check_lengths(SHAPES, LENGTHS)
        check_alone(LENGTHS)
        check_graph()
    status = COUNTS.finish()
    print(f"{COUNTS.cases} cases, {COUNTS.vectors} output vectors, {COUNTS.failed} failed")
    sys.exit(status)


if __name__ == "__main__":
    main()
