"""Correctness of the CUDA backend, on a machine with a GPU: `python tests/gpu/check.py [--full | --small]`.

Every case runs the same steps on a CPU pool and on a CUDA pool. Checked are the slots (bit by bit), records
(through the numeric contract), the output of attention before and after append (against float64 over what the
CUDA pool stores), expansion, and that results repeat bit by bit. Ends with counts; the exit status is 1 if
anything failed.
"""

import argparse
import collections
import itertools
import math
import sys
import time

import kvarn
import numpy as np
import torch
from kvarn.reference import contract

DEVICE = "cuda"
# Inputs are made on the host and copied: compute-sanitizer's initcheck, which watches our kernels only, does
# not see what torch's kernels write.
ON_HOST = False
PAIRS = [(4, 2), (4, 4), (3, 3), (2, 2), (8, 4), (8, 8)]


class Counts:
    """What was checked, and what failed."""

    def __init__(self):
        self.cases = self.vectors = self.near = self.matrices = self.failed = 0
        self.errors = []

    def fail(self, text):
        self.failed += 1
        print(f"FAILED {text}", flush=True)

    def finish(self):
        """Exit status.

        Queries enter the tensor cores rounded to half: the error of a logit is as good as normal, and the
        worst of a million vectors may lie a little beyond the contract.
        """
        # One in a million, and three standard deviations of that number.
        expected = 1e-6 * self.vectors
        allowed = max(1, expected + 3 * expected**0.5)
        if self.near > allowed:
            self.fail(
                f"{self.near} of {self.vectors} vectors beyond the contract: expected one in a million, here "
                f"at most {allowed:.1f}"
            )
        return int(self.failed > 0)


COUNTS = Counts()


def attend_f64(q, k, v, start, *, scale, window, softcap, sinks, half=False):
    """q [n, heads, D] at positions start…, k and v [m, kv_heads, D]: outputs and log-sum-exps in float64.

    `half`: as a 16-bit cache of the same values would give it (K, V and probabilities rounded to half).
    """
    n, heads, _ = q.shape
    group = heads // k.shape[1]
    if half:
        k, v = k.half().double(), v.half().double()
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    x = torch.einsum("nhd,hmd->hnm", q, k) * scale
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    position = torch.arange(start, start + n, device=q.device)[:, None]
    key = torch.arange(k.shape[1], device=q.device)[None]
    seen = key <= position
    if window:
        seen &= key > position - window
    x = x.masked_fill(~seen, -math.inf)
    top = x.amax(-1, keepdim=True) if x.shape[-1] else x.new_full((heads, n, 1), -math.inf)
    if sinks is not None:
        top = torch.maximum(top, sinks.double()[:, None, None])
    top = torch.where(torch.isinf(top), 0.0, top)
    p = torch.exp(x - top)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.double()[:, None, None] - top)
    out = (p.half().double() if half else p) @ v / torch.where(total == 0, 1.0, total)
    return out.transpose(0, 1), (top + torch.log(total)).squeeze(-1).transpose(0, 1), v


def one_piece(cfg, *, layers, kv_heads, pages, slots):
    """Tensors for the pages and slots of a pool."""
    heads, slot = layers * kv_heads, 2 * cfg.group * cfg.head_dim
    return (
        torch.empty(heads * pages * cfg.record_bytes, dtype=torch.uint8, device=DEVICE),
        torch.empty(heads * slots * slot, dtype=torch.float16, device=DEVICE),
    )


class Twin:
    """A CPU pool and a CUDA pool that take the same steps."""

    def __init__(
        self, *, d, g, bits, kv, dtype, sinks=None, recent=0, refit=True, seed=0, pages=96, slots=64
    ):
        self.cfg = kvarn.Config(
            key_bits=bits[0],
            value_bits=bits[1],
            group=g,
            head_dim=d,
            sink_tokens=sinks,
            recent_tokens=recent,
            refit=refit,
        )
        shape = {"layers": 2, "kv_heads": kv, "pages": pages, "slots": slots}
        self.cpu = kvarn.Pool(self.cfg, **shape)
        # memcheck takes a bulk copy from two neighbouring mappings for an error: memory of one piece.
        memory = one_piece(self.cfg, **shape) if ON_HOST else None
        self.gpu = kvarn.Pool(self.cfg, **shape, device=DEVICE, memory=memory)
        # Whatever is read without having been written spreads.
        for pool in (self.cpu, self.gpu):
            for pages, slots in zip(pool.pages, pool.slots, strict=True):
                for memory, value in (
                    (torch.from_dlpack(pages), 0xFF),
                    (torch.from_dlpack(slots).view(torch.int16), 0x7FFF),
                ):
                    memory.copy_(torch.full(memory.shape, value, dtype=memory.dtype))
        self.made_on = "cpu" if ON_HOST else DEVICE
        self.kv, self.dtype, self.random = kv, dtype, torch.Generator(device=self.made_on).manual_seed(seed)
        self.sequences = []

    def normal(self, *shape, scale=1.0):
        made = torch.randn(*shape, generator=self.random, device=self.made_on) * scale
        return made.to(self.dtype).to(DEVICE)

    def create(self):
        self.sequences.append((self.cpu.create(), self.gpu.create()))
        return len(self.sequences) - 1

    def fork(self, index):
        cpu, gpu = self.sequences[index]
        self.sequences.append((self.cpu.fork(cpu), self.gpu.fork(gpu)))
        return len(self.sequences) - 1

    def step(
        self,
        which,
        counts,
        hold,
        *,
        group,
        scale=1.0,
        options=None,
        sinks=None,
        compare=True,
        attend=True,
        hostile=None,
    ):
        """One step; returns the outputs of attention after append in layer 0."""
        options = dict(options or {})
        rows, d = sum(counts), self.cfg.head_dim
        starts = [self.sequences[i][0].length for i in which]
        cpu = self.cpu.step([self.sequences[i][0] for i in which], counts, hold)
        gpu = self.gpu.step([self.sequences[i][1] for i in which], counts, hold)
        outputs = None
        for layer in range(2):
            k, v = self.normal(rows, self.kv, d, scale=scale), self.normal(rows, self.kv, d, scale=scale)
            k[:, :, ::17] *= 6
            q = self.normal(rows, self.kv * group, d, scale=1 / scale)
            if hostile:
                hostile(k, v)
            if not attend:
                cpu.append(layer, k.cpu(), v.cpu())
                gpu.append(layer, k, v)
                continue
            before, lse_before = gpu.attend(layer, q, **options, sink_logits=sinks, return_lse=True)
            if compare:
                self.compare(
                    cpu, gpu, layer, which, starts, counts, q, before, lse_before, False, options, sinks
                )
            cpu.append(layer, k.cpu(), v.cpu())
            gpu.append(layer, k, v)
            after, lse = gpu.attend(layer, q, **options, sink_logits=sinks, return_lse=True)
            again, lse_again = gpu.attend(layer, q, **options, sink_logits=sinks, return_lse=True)
            if not (torch.equal(nan0(after), nan0(again)) and torch.equal(nan0(lse), nan0(lse_again))):
                COUNTS.fail(f"{self.cfg} attend is not repeatable")
            if compare:
                self.compare(cpu, gpu, layer, which, starts, counts, q, after, lse, True, options, sinks)
            outputs = after if layer == 0 else outputs
        cpu.finish()
        gpu.finish()
        return outputs

    def compare(self, cpu, gpu, layer, which, starts, counts, q, out, lse, appended, options, sinks):
        torch.cuda.synchronize()
        cfg, row, d = self.cfg, 0, self.cfg.head_dim
        # What is stored on the device, decoded in float32 by the CPU.
        self.copy_to_cpu(layer)
        scale = options.get("scale") or 1 / math.sqrt(d)
        for index in range(len(which)):
            k, v = (x.to(DEVICE).double() for x in cpu.expand(layer, index, like=torch.zeros(1)))
            n = counts[index]
            if n == 0:
                continue
            qs, os, ls = q[row : row + n].double(), out[row : row + n].double(), lse[row : row + n].double()
            keyword = {
                "scale": scale,
                "window": options.get("window"),
                "softcap": options.get("softcap"),
                "sinks": sinks,
            }
            expected, expected_lse, values = attend_f64(qs, k, v, starts[index], **keyword)
            e16 = (attend_f64(qs, k, v, starts[index], **keyword, half=True)[0] - expected).norm(dim=-1)
            size = (
                torch.maximum(expected.norm(dim=-1), values.pow(2).mean().sqrt() * 1e-3 * math.sqrt(d))
                if len(k)
                else 1.0
            )
            error = (os - expected).norm(dim=-1) / size
            # A bfloat16 output is rounded to 8 bits: half an ulp of each element is 2^-9 relative.
            limit = torch.clamp(3 * e16 / size, min=2e-3) + (3e-3 if self.dtype == torch.bfloat16 else 0)
            bad = ~(error <= 1.25 * limit)
            COUNTS.near += int((error > limit).sum() - bad.sum())
            if len(k) == 0 and sinks is None:
                bad |= ~torch.isneginf(ls)
            else:
                bad |= ~((ls == expected_lse) | ((ls - expected_lse).abs() <= 1e-2))
            COUNTS.vectors += error.numel()
            COUNTS.errors.append(float(error.median()))
            if bad.any():
                where = "after" if appended else "before"
                COUNTS.fail(
                    f"{cfg} {self.dtype} {where} append, start {starts[index]}, {n} new, options {options}: "
                    f"{int(bad.sum())} of {bad.numel()} vectors, worst {float(error.max()):.1e}"
                )
            # Expansion on the device, against the same values.
            if appended and layer == 1:
                k2, v2 = gpu.expand(layer, index)
                for name, a, b in (("k", k2, k), ("v", v2, v)):
                    largest = b.abs().amax(-1, keepdim=True)
                    tolerance = 2.0**-10 * b.abs() + 4e-5 * largest + 6e-8
                    if ((a.double() - b).abs() > tolerance).any():
                        worst = float(((a.double() - b).abs() / tolerance).max())
                        COUNTS.fail(f"{cfg} expand of {name}: {worst:.2f} tolerances")
            row += n

    def copy_to_cpu(self, layer):
        """Checks that both pools hold the same slots, then makes the CPU pool hold the CUDA pool's bytes."""
        here, there = (torch.from_dlpack(pool.slots[layer]) for pool in (self.cpu, self.gpu))
        there = there.cpu()
        if not torch.equal(here.view(torch.int16), there.view(torch.int16)):
            COUNTS.fail(f"{self.cfg} layer {layer}: slots differ")
        here.copy_(there)
        here, there = (torch.from_dlpack(pool.pages[layer]) for pool in (self.cpu, self.gpu))
        here.copy_(there.cpu())


def nan0(x):
    return torch.nan_to_num(x, nan=12345.0)


def case(
    name, steps, *, group=4, sequences=1, scale=1.0, options=None, sink_logits=False, hostile=None, **twin
):
    started = time.time()
    made = Twin(**twin)
    which = [made.create() for _ in range(sequences)]
    sinks = torch.linspace(-2, 2, made.kv * group, device=DEVICE) if sink_logits else None
    for counts, hold in steps:
        made.step(
            which, counts, hold, group=group, scale=scale, options=options, sinks=sinks, hostile=hostile
        )
    COUNTS.cases += 1
    print(f"{name}: {time.time() - started:.1f} s", flush=True)


def check_encoders():
    """Records of every bit width, head dim and tile length, through the numeric contract."""
    verdicts = {}
    for bits, d, g, refit in itertools.product(PAIRS, (64, 96, 128, 256), (64, 128), (True, False)):
        cfg = kvarn.Config(
            key_bits=bits[0], value_bits=bits[1], group=g, head_dim=d, sink_tokens=0, refit=refit
        )
        pool = kvarn.Pool(cfg, layers=1, kv_heads=2, pages=8, slots=4, device=DEVICE)
        random = torch.Generator(device=DEVICE).manual_seed(d + g + bits[0])
        k, v = (torch.randn(3 * g, 2, d, generator=random, device=DEVICE) for _ in range(2))
        k *= torch.exp(0.7 * torch.randn(1, 2, d, generator=random, device=DEVICE))
        v *= torch.exp(0.5 * torch.randn(3 * g, 2, 1, generator=random, device=DEVICE))
        k, v = k.half(), v.half()
        sequence = pool.create()
        for first, count in (
            (0, g),
            (g, g // 2 + 3),
            (2 * g - g // 2 + 3, g),
        ):  # whole tiles, and through a slot
            with pool.step([sequence], [count]) as step:
                step.append(0, k[first : first + count], v[first : first + count], rotated=True)
        stored = torch.cat([k[:g], k[g : g + g // 2 + 3], k[2 * g - g // 2 + 3 :][:g]]).float().cpu().numpy()
        values = torch.cat([v[:g], v[g : g + g // 2 + 3], v[2 * g - g // 2 + 3 :][:g]]).float().cpu().numpy()
        pages = torch.from_dlpack(pool.pages[0]).cpu().numpy()
        for tile, page in enumerate(np.from_dlpack(sequence.block_table)):
            if page < 0:
                continue
            for head in range(2):
                rows = slice(tile * g, (tile + 1) * g)
                judged = contract.judge(stored[rows, head], values[rows, head], pages[page, head], cfg)
                for verdict, width in zip(judged, bits, strict=True):
                    verdicts.setdefault(width, []).append(verdict)
                    COUNTS.matrices += 1
                    if not verdict.passed:
                        COUNTS.fail(f"{cfg} tile {tile} head {head}: {verdict}")
    for width, found in sorted(verdicts.items()):
        print(
            f"encoders, {width} bit: {len(found)} matrices, codes off {contract.mismatch_rate(found):.1e}",
            flush=True,
        )
    COUNTS.cases += 1


def check_residues():
    """Every length modulo G, at two shapes."""
    for d, g, bits, group in ((128, 128, (4, 2), 4), (64, 64, (3, 3), 2)):
        started = time.time()
        made = Twin(d=d, g=g, bits=bits, kv=2, dtype=torch.float16, seed=d, pages=4, slots=6)
        i = made.create()
        made.step([i], [2 * g - 3], 0, group=group)
        for _ in range(g + 5):
            made.step([i], [1], 0, group=group)
        COUNTS.cases += 1
        print(f"residues of {g}: {time.time() - started:.1f} s", flush=True)


VARIANTS = ({}, {"window": 100}, {"softcap": 20.0}, {"window": 1}, {"scale": 0.1})
FACTORS = {
    "bits": PAIRS,
    "d": (128, 64, 96, 256),
    "g": (128, 64),
    "group": (1, 2, 3, 4, 5, 7, 8, 12, 16),
    "new": (1, 2, 4, 7, 16, 40),
    "dtype": (torch.float16, torch.bfloat16),
    "options": range(len(VARIANTS)),
    "sinks": (None, 0, 16),
    "recent": (0, 40),
    "sink_logits": (False, True),
    "kv": (1, 2),
}


def exists(row):
    """Whether the backend has this combination, of which some factors may be missing."""
    return not (row.get("d") == 256 and row.get("group", 1) > 8)


def covering(strength):
    """Rows of FACTORS in which any values of `strength` factors meet where they exist; always the same."""
    names = list(FACTORS)
    missing, uses = set(), collections.Counter()
    for chosen in itertools.combinations(names, strength):
        for values in itertools.product(*(range(len(FACTORS[name])) for name in chosen)):
            tuples = tuple(zip(chosen, values, strict=True))
            if exists({name: FACTORS[name][value] for name, value in tuples}):
                missing.add(tuples)
    while missing:
        row = dict(min(missing))
        for name in names:
            if name in row:
                continue

            def gain(value, name=name, row=row):
                made = {**row, name: value}
                if not exists({key: FACTORS[key][at] for key, at in made.items()}):
                    return -1
                others = itertools.combinations([key for key in made if key != name], strength - 1)
                found = (tuple(sorted(((k, made[k]) for k in (*o, name)), key=place)) for o in others)
                return sum(one in missing for one in found)

            row[name] = max(
                range(len(FACTORS[name])),
                key=lambda value, name=name, gain=gain: (gain(value), -uses[name, value]),
            )
            uses[name, row[name]] += 1
        for chosen in itertools.combinations(names, strength):
            missing.discard(tuple((name, row[name]) for name in chosen))
        yield {name: FACTORS[name][row[name]] for name in names}


def place(pair):
    """Where a factor stands among FACTORS."""
    return list(FACTORS).index(pair[0])


def check_pairs(full):
    """Any two values of two factors meet, with --full any three of three: ragged batches, held drafts."""
    for index, row in enumerate(covering(3 if full else 2)):
        g, new = row["g"], row.pop("new")
        name = ", ".join(f"{key} {value}" for key, value in row.items())
        row["options"] = VARIANTS[row["options"]]
        case(
            f"new {new}, {name}",
            [([3 * g + 7, 70, 1], 0), ([new, 1, g], [min(new, 3), 0, 0]), ([1, 1, 1], 0)],
            sequences=3,
            seed=index,
            **row,
        )


def check_scales():
    for scale in (1e-3, 30.0, 300.0, 1000.0):
        case(
            f"scale {scale}",
            [([300], 0), ([2], 0)],
            d=128,
            g=128,
            bits=(4, 2),
            kv=2,
            dtype=torch.float16,
            scale=scale,
        )


def check_long(full):
    for length in (9_000, 40_000, *((140_000,) if full else ())):
        made = Twin(
            d=128, g=128, bits=(4, 2), kv=1, dtype=torch.float16, pages=length // 128 + 4, seed=length
        )
        i = made.create()
        # The prompt's own attention is not compared: float64 scores would not fit.
        made.step([i], [length], 0, group=4, compare=False, attend=False)
        made.step([i], [1], 0, group=4)
        COUNTS.cases += 1
        print(f"length {length}: done", flush=True)


def check_permuted_pages():
    """A sequence whose pages and slots lie in no order, as others were freed and taken again."""
    made = Twin(d=128, g=64, bits=(3, 3), kv=2, dtype=torch.float16, seed=21, pages=24, slots=24)
    first, second, third = (made.create() for _ in range(3))
    made.step([first, third], [64 * 5, 10], 0, group=4)
    made.step([second], [64 * 4], 0, group=4)
    for pool, sequence in zip((made.cpu, made.gpu), made.sequences[first], strict=True):
        pool.free(sequence)
    made.step([second, third], [64 * 2 + 5, 64 * 7], 0, group=4)
    tables = [np.from_dlpack(made.sequences[i][1].block_table) for i in (second, third)]
    if not any((np.diff(table[table >= 0]) < 0).any() for table in tables):
        COUNTS.fail("the pages are in order: expected a permutation")
    made.step([second, third], [1, 3], 0, group=4, options={"window": 200})
    COUNTS.cases += 1
    print("permuted pages: done", flush=True)


def check_forks():
    """Forks grow within a shared tile, complete it, and change places; a replayed graph copies slots too."""
    for d, g, sinks, recent in ((128, 128, None, 0), (64, 64, 16, 40), (96, 64, 0, 0)):
        made = Twin(d=d, g=g, bits=(4, 2), kv=2, dtype=torch.float16, sinks=sinks, recent=recent, seed=41)
        a = made.create()
        made.step([a], [2 * g + 20], 2, group=4)
        b, c = made.fork(a), made.fork(a)
        made.step([a, b, c], [1, g - 20, 2 * g], 0, group=4)
        made.step([b, a], [3, g], 0, group=4)
        order = [c, a, a]
        for pool, which in ((made.cpu, 0), (made.gpu, 1)):
            pool.reorder([made.sequences[i][which] for i in (a, b, c)], [(a, b, c).index(i) for i in order])
        made.step([a, b, c], [1, 1, 5], 0, group=4)
        COUNTS.cases += 1

    made = Twin(d=128, g=64, bits=(4, 2), kv=2, dtype=torch.float16, seed=43)
    first = made.gpu.create()
    k = made.normal(100, 2, 128)
    with made.gpu.step([first], [100]) as step:
        for layer in range(2):
            step.append(layer, k, k)
    arrays, stream = made.gpu.static_arrays([1, 1], tokens=300), torch.cuda.Stream()
    k, q = made.normal(2, 2, 128), made.normal(2, 8, 128)

    def forward(step):
        for layer in range(2):
            step.append(layer, k, k)
        return step.attend(1, q)

    with torch.cuda.stream(stream):
        outputs = []
        for replayed in (False, True):
            pair = [made.gpu.fork(first), made.gpu.fork(first)]
            if replayed:
                warm = made.gpu.step(pair, [1, 1], arrays=arrays)
                forward(warm)
                warm.abandon()
                step = made.gpu.step(pair, [1, 1], arrays=arrays)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    out = forward(step)
                step.replay(graph)
            else:
                step = made.gpu.step(pair, [1, 1])
                out = forward(step)
            step.finish()
            torch.cuda.synchronize()
            outputs.append([out.clone(), *(x for s in pair for x in made.gpu.expand(s, 1))])
            for sequence in pair:
                made.gpu.free(sequence)
    if not all(torch.equal(x, y) for x, y in zip(*outputs, strict=True)):
        COUNTS.fail("forks: a replayed step differs from an eager one")
    COUNTS.cases += 1
    print("forks: done", flush=True)


def check_batch_invariance():
    """The same bits alone and in a batch, wherever in it."""
    for d, g, bits, kv, group, dtype in (
        (128, 128, (4, 2), 2, 4, torch.float16),
        (64, 64, (3, 3), 1, 7, torch.bfloat16),
        (96, 128, (2, 2), 2, 1, torch.float16),
        (256, 64, (8, 4), 1, 8, torch.float16),
    ):
        alone, batch = (Twin(d=d, g=g, bits=bits, kv=kv, dtype=dtype, seed=5) for _ in range(2))
        a = alone.gpu.create()
        before, b, behind = (batch.gpu.create() for _ in range(3))

        def rows(count, alone=alone, kv=kv, group=group, d=d):
            return [alone.normal(count, heads, d) for heads in (kv, kv, kv * group)]

        for count, left, right in ((900, 33, 1), (1, 2, 70), (1, 400, 0), (30, 1, 1), (3, 0, 5)):
            k, v, q = rows(count)
            ks, vs, qs = (torch.cat(parts) for parts in zip(rows(left), (k, v, q), rows(right), strict=True))
            one = alone.gpu.step([a], [count])
            two = batch.gpu.step([before, b, behind], [left, count, right])
            for layer in range(2):
                one.append(layer, k, v)
                two.append(layer, ks, vs)
                for options in ({}, {"window": 150}):
                    x = one.attend(layer, q, **options)
                    y = two.attend(layer, qs, **options)[left : left + count]
                    if not torch.equal(x, y):
                        COUNTS.fail(
                            f"{alone.cfg} {options}: alone and in a batch differ at {count} new tokens"
                        )
            one.finish()
            two.finish()
        COUNTS.cases += 1
    print("batch invariance: done", flush=True)


def check_nan_stays():
    """NaN and infinities in one head of one token change nothing elsewhere, and are counted."""

    def hostile(k, v):
        k[3, 0, 5] = math.nan
        v[4, 0, 7] = math.inf

    clean, bad = (Twin(d=128, g=128, bits=(4, 2), kv=2, dtype=torch.float16, seed=9) for _ in range(2))
    outs = [t.step([t.create()], [200], 0, group=4, hostile=h) for t, h in ((clean, None), (bad, hostile))]
    if not torch.equal(outs[0][:, 4:], outs[1][:, 4:]) or not torch.isfinite(outs[1]).all():
        COUNTS.fail("a NaN spread beyond its head")
    if bad.gpu.stats().non_finite != 4:
        COUNTS.fail(f"{bad.gpu.stats().non_finite} non-finite elements counted: expected 4")
    COUNTS.cases += 1


def check_graph():
    """A captured step gives the bits of the eager one."""
    made = Twin(d=128, g=128, bits=(4, 2), kv=2, dtype=torch.float16, seed=11)
    sequence, stream = made.gpu.create(), torch.cuda.Stream()
    k, v = made.normal(700, 2, 128), made.normal(700, 2, 128)
    with made.gpu.step([sequence], [700]) as step:
        for layer in range(2):
            step.append(layer, k, v)
    arrays = made.gpu.static_arrays([100], tokens=1400)
    q, k, v = made.normal(100, 8, 128), made.normal(100, 2, 128), made.normal(100, 2, 128)

    def forward(step):
        for layer in range(2):
            step.append(layer, k, v)
        return step.attend(0, q)

    with torch.cuda.stream(stream):
        step = made.gpu.step([sequence], [100], arrays=arrays)
        eager = forward(step)
        step.abandon()
        step = made.gpu.step([sequence], [100], arrays=arrays)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = forward(step)
        captured.fill_(math.nan)
        step.replay(graph)
        torch.cuda.synchronize()
        if not torch.equal(eager, captured):
            COUNTS.fail("graph and eager differ")
        step.finish()
    COUNTS.cases += 1
    print("graph: done", flush=True)


def check_large_offsets():
    """Records beyond 2^31 bytes: the last tile of a sequence that fills 2.4 GB of pages."""
    cfg = kvarn.Config("kvarn_k4v2_g128", head_dim=128, sink_tokens=0)
    pages = 2_400_000_000 // (8 * cfg.record_bytes)
    pool = kvarn.Pool(cfg, layers=1, kv_heads=8, pages=pages, slots=4, device=DEVICE)
    first, last = pool.create(), pool.create()
    k = torch.randn(128 * 256, 8, 128, device=DEVICE, dtype=torch.float16)
    left = pages - 256
    while left > 0:
        n = min(left, 256) * 128
        with pool.step([first], [n]) as step:
            step.append(0, k[:n], k[:n])
        left -= 256
    with pool.step([last], [128 * 256]) as step:
        step.append(0, k, k)
    q = torch.randn(1, 32, 128, device=DEVICE, dtype=torch.float16)
    one = torch.randn(1, 8, 128, device=DEVICE, dtype=torch.float16)
    with pool.step([last], [1]) as step:
        step.append(0, one, one)
        out = step.attend(0, q)
    kk, vv = (x.double() for x in pool.expand(last, 0))
    expected, _, _ = attend_f64(
        q.double(), kk, vv, 128 * 256, scale=128**-0.5, window=None, softcap=None, sinks=None
    )
    error = ((out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
    block = int(np.from_dlpack(last.block_table).max())
    if not error < 5e-3 or block * 8 * cfg.record_bytes < 2**31:
        COUNTS.fail(f"beyond 2^31 bytes: error {float(error):.1e} at page {block}")
    COUNTS.cases += 1
    print(f"large offsets: page {block}, error {float(error):.1e}", flush=True)


def poison_outputs():
    """What `attend` and `expand` return was NaN before: an element that they do not write is seen."""
    import kvarn.pool
    import kvarn.step

    def poisoned(make):
        def filled(*arguments, **options):
            return make(*arguments, **options).fill_(math.nan)

        return filled

    kvarn.step.empty_like = poisoned(kvarn.step.empty_like)
    for module in (kvarn.step, kvarn.pool):
        module.empty = poisoned(module.empty)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="any three values of three factors together, 140 K tokens"
    )
    parser.add_argument(
        "--small", action="store_true", help="few steps of every kernel, for compute-sanitizer"
    )
    arguments = parser.parse_args()
    global ON_HOST
    ON_HOST = arguments.small
    print(f"kvarn {kvarn.__version__} on {torch.cuda.get_device_name()}", flush=True)
    poison_outputs()
    check_permuted_pages()
    check_nan_stays()
    check_graph()
    if not arguments.small:
        check_encoders()
        check_pairs(arguments.full)
        check_scales()
        check_batch_invariance()
        check_forks()
        check_residues()
        check_long(arguments.full)
        check_large_offsets()
    status = COUNTS.finish()
    print(
        f"{COUNTS.cases} cases, {COUNTS.vectors} output vectors "
        f"(median of medians {np.median(COUNTS.errors):.1e}, {COUNTS.near} up to a quarter beyond the "
        f"contract), "
        f"{COUNTS.matrices} matrices judged, {COUNTS.failed} failed"
    )
    sys.exit(status)


if __name__ == "__main__":
    main()
