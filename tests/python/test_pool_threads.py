"""One pool under several threads: each call gives what it gives alone, or an error that it documents.

Row p of every sequence is row p of one table. Whatever the threads do to whom, a sequence of n tokens then
holds the table's first n rows, and attends as a sequence of that length does in a pool of its own.
"""

import random
import threading
import time
from collections import Counter
from functools import cache

import numpy as np
import pytest
from kvarn import CapacityError, Config, LayerShape, Pool, ShapeError, StateError

GROUP = 64
LAYERS = (LayerShape(2, 32), LayerShape(1, 16))
LONGEST = 300
CFG = Config("kvarn_k4v2_g64", head_dim=32, sink_tokens=0, iterations=2)

_rng = np.random.default_rng(7)
TABLE = [tuple(_rng.standard_normal((2, LONGEST, *shape)).astype(np.float32)) for shape in LAYERS]
QUERIES = [_rng.standard_normal((LONGEST, 2 * heads, dim)).astype(np.float32) for heads, dim in LAYERS]


def append(step, layer, starts, counts):
    rows = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
    k, v = (np.concatenate([side[row] for row in rows]) for side in TABLE[layer])
    step.append(layer, k, v)
    return step.attend(layer, np.concatenate([QUERIES[layer][row] for row in rows]))


def lone_pool():
    return Pool(CFG, layers=LAYERS, pages=8, slots=8, dtype="float32")


@cache
def attended(start, count):
    """The outputs of each layer of a step from `start` on, by a pool that does nothing else."""
    pool = lone_pool()
    sequence = pool.create()
    for first, end in ((0, start), (start, start + count)):
        with pool.step([sequence], [end - first]) as step:
            outputs = [append(step, layer, [first], [end - first]) for layer in range(len(LAYERS))]
    return outputs


@cache
def sealed(layer):
    """K and V of the tiles, encoded and decoded again."""
    pool = lone_pool()
    sequence = pool.create()
    whole = LONGEST // GROUP * GROUP
    with pool.step([sequence], [whole]) as step:
        for index in range(len(LAYERS)):
            append(step, index, [0], [whole])
    return pool.expand(sequence, layer, rotated=True)


@cache
def unsealed(layer, end):
    """K and V of the tokens of the tile that ends before `end`, as its slot holds them."""
    pool = lone_pool()
    sequence = pool.create()
    first = (end - 1) // GROUP * GROUP
    with pool.step([sequence], [end - first], hold=end - first) as step:
        for index in range(len(LAYERS)):
            append(step, index, [first], [end - first])
    return pool.expand(sequence, layer, rotated=True)


class Worker(threading.Thread):
    """Does random things to random sequences of a list that other workers change too."""

    def __init__(self, pool, shared, seed, operations):
        super().__init__()
        self.pool, self.shared, self.operations = pool, shared, operations
        self.random = random.Random(seed)
        self.outcomes = Counter()
        self.failure = None

    def run(self):
        kinds = ["step"] * 8 + ["expand"] * 2 + ["fork", "truncate", "free", "reorder"] * 2
        try:
            end = time.monotonic() + 60
            done = 0
            while done < self.operations:
                kind = self.random.choice(kinds)
                try:
                    getattr(self, kind)()
                    done += 1
                    self.outcomes[kind, "done"] += 1
                except (CapacityError, StateError, ShapeError) as error:
                    self.outcomes[kind, type(error).__name__] += 1
                    assert time.monotonic() < end, f"{done} operations in a minute: {self.outcomes}"
                    # Others come to close their steps, or to free something.
                    time.sleep(0.001)
        except BaseException as failure:
            self.failure = failure

    def pick(self, most):
        alive = list(self.shared)
        return self.random.sample(alive, min(len(alive), self.random.randint(1, most)))

    def step(self):
        sequences = self.pick(2)
        counts = [self.random.choice([1, 1, 2, 5, 40, 64]) for _ in sequences]
        with self.pool.step(sequences, counts) as step:
            # Nobody else changes the sequences of an open step: their lengths stay.
            starts = [sequence.length for sequence in sequences]
            if any(start + count > LONGEST for start, count in zip(starts, counts, strict=True)):
                step.abandon()
                return
            for layer in range(len(LAYERS)):
                out = append(step, layer, starts, counts)
                row = 0
                for start, count in zip(starts, counts, strict=True):
                    assert np.array_equal(out[row : row + count], attended(start, count)[layer])
                    row += count
            if self.random.random() < 0.1:
                step.abandon()

    def expand(self):
        (sequence,) = self.pick(1)
        layer = self.random.randrange(len(LAYERS))
        k, v = self.pool.expand(sequence, layer, rotated=True)
        whole = len(k) // GROUP * GROUP
        for side, got in enumerate((k, v)):
            assert np.array_equal(got[:whole], sealed(layer)[side][:whole])
            if len(got) > whole:
                # Another thread may have sealed the tile after the length was read.
                as_slot = unsealed(layer, len(got))[side]
                as_page = sealed(layer)[side][whole : len(got)]
                assert np.array_equal(got[whole:], as_slot) or np.array_equal(got[whole:], as_page)

    def fork(self):
        (sequence,) = self.pick(1)
        self.shared.append(self.pool.fork(sequence))
        if len(self.shared) > 8:
            self.free()

    def reorder(self):
        sequences = self.pick(3)
        self.pool.reorder(sequences, [self.random.randrange(len(sequences)) for _ in sequences])

    def truncate(self):
        for sequence in self.pick(1):
            # To the end of a tile: a cut into a tile that another thread has sealed meanwhile is lossy.
            self.pool.truncate(sequence, sequence.length // GROUP * GROUP)

    def free(self):
        (sequence,) = self.pick(1)
        self.pool.free(sequence)
        self.shared.remove(sequence)
        if len(self.shared) < 5:
            self.shared.append(self.pool.create())


@pytest.mark.parametrize(("pages", "slots", "runs_out"), [(40, 40, False), (3, 3, True)])
def test_threads_of_one_pool_get_right_results_or_documented_errors(pages, slots, runs_out):
    pool = Pool(CFG, layers=LAYERS, pages=pages, slots=slots, dtype="float32")
    shared = [pool.create() for _ in range(6)]
    workers = [Worker(pool, shared, seed, 80) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for worker in workers:
        if worker.failure is not None:
            raise worker.failure
    outcomes = sum((worker.outcomes for worker in workers), Counter())
    print(dict(sorted(outcomes.items())))
    # Whoever runs out, frees or shares: something of each kind worked.
    assert {kind for kind, outcome in outcomes if outcome == "done"} == {
        "step",
        "expand",
        "fork",
        "truncate",
        "free",
        "reorder",
    }
    # An expansion, and a truncation, may find the sequence shorter than it was when its length was read.
    for (kind, outcome), count in outcomes.items():
        assert outcome != "ShapeError" or kind in ("expand", "truncate"), (kind, count)
        assert outcome != "CapacityError" or (kind == "step" and runs_out), (kind, count)
    assert (outcomes["step", "CapacityError"] > 0) == runs_out
    for sequence in shared:
        pool.free(sequence)
    stats = pool.stats()
    assert (stats.pages_used, stats.slots_used, stats.sequences, stats.open_steps) == (0, 0, 0, 0)


def test_of_two_appends_to_one_layer_at_a_time_one_is_refused():
    for _ in range(20):
        pool = lone_pool()
        sequence = pool.create()
        step = pool.step([sequence], [128])
        outcomes = []
        barrier = threading.Barrier(2)

        def work(step=step, barrier=barrier, outcomes=outcomes):
            barrier.wait()
            try:
                step.append(0, *(side[:128] for side in TABLE[0]))
                outcomes.append("done")
            except StateError:
                outcomes.append("refused")

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["done", "refused"]
        append(step, 1, [0], [128])
        step.finish()
        for got, want in zip(pool.expand(sequence, 0, rotated=True), sealed(0), strict=True):
            assert np.array_equal(got, want[:128])


def test_attention_beside_finish_is_right_or_refused():
    seen = Counter()
    for _ in range(30):
        pool = lone_pool()
        sequence = pool.create()
        step = pool.step([sequence], [100])
        want, _ = (append(step, layer, [0], [100]) for layer in range(len(LAYERS)))
        barrier = threading.Barrier(2)
        failures = []

        def work(step=step, barrier=barrier, want=want, failures=failures):
            barrier.wait()
            try:
                for _ in range(50):
                    if not np.array_equal(step.attend(0, QUERIES[0][:100]), want):
                        failures.append("another result")
                    seen["done"] += 1
            except StateError:
                seen["refused"] += 1

        thread = threading.Thread(target=work)
        thread.start()
        barrier.wait()
        step.finish()
        # What the step stored may be read again by others while the thread still attends.
        pool.truncate(sequence, 64)
        pool.free(sequence)
        thread.join()
        assert not failures
    assert seen["refused"] > 0
