"""Golden records on a GPU, both ways: `python tests/gpu/check_golden.py`.

Records that the CPU made (`tests/golden/records_v1`) are put into pages of a CUDA pool, expanded, attended
to; float64 over what the CPU decodes is the reference. The same inputs are sealed on the GPU; the CPU decodes
these records and judges them by the numeric contract. Ends with counts; the exit status is 1 if anything
failed.
"""

import math
import sys
import tempfile
import traceback
from pathlib import Path

import kvarn
import numpy as np
import torch
from check import attend_f64
from kvarn.reference import contract

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import make_records as golden

DEVICE = "cuda"
# The case's records lie in one KV head, the case's in reverse order in the other: pages hold both.
KV_HEADS, GROUP, QUERIES = 2, 4, 5


class Counts:
    files = expanded = vectors = matrices = equal_bytes = total_bytes = failed = 0

    def fail(self, text):
        self.failed += 1
        print(f"FAILED {text}", flush=True)


COUNTS = Counts()


def both_heads(array):
    """[tiles, …] of a case as [tiles, KV_HEADS, …], the tiles of the second head in reverse order."""
    return np.stack([array, array[::-1]], axis=1)


def rows(array):
    """[tiles, KV_HEADS, group, D] as the rows of a step, [tokens, KV_HEADS, D]."""
    return array.transpose(0, 2, 1, 3).reshape(-1, array.shape[1], array.shape[3])


def filled(case, k, v):
    """A CUDA pool with a sequence of sealed tiles, their pages in no order, and the ids of these pages."""
    tiles, group = case.tiles, case.cfg.group
    pool = kvarn.Pool(case.cfg, layers=1, kv_heads=KV_HEADS, pages=tiles + 3, slots=4, device=DEVICE)
    other, sequence = pool.create(), pool.create()
    k, v = (torch.from_numpy(rows(both_heads(x))).to(DEVICE) for x in (k, v))
    # Another sequence takes a page first, and between the tiles of this one.
    for tile in range(tiles):
        with pool.step([other], [group]) as step:
            step.append(0, k[:group], v[:group], rotated=True)
        with pool.step([sequence], [group]) as step:
            part = slice(tile * group, (tile + 1) * group)
            step.append(0, k[part], v[part], rotated=True)
    pages = torch.from_numpy(np.array(np.from_dlpack(sequence.block_table))).long()
    return pool, sequence, pages.to(DEVICE)


def check_cpu_records(case, records):
    """The GPU expands and attends over the CPU's bytes."""
    cfg = case.cfg
    zeros = np.zeros((case.tiles, cfg.group, cfg.head_dim), np.float16)
    pool, sequence, pages = filled(case, zeros, zeros)
    memory = torch.from_dlpack(pool.pages[0])
    memory.fill_(0xFF)  # NaN wherever a parameter is read that is not of these records
    memory[pages] = torch.from_numpy(both_heads(records)).to(DEVICE)
    for rotated in (True, False):
        decoded = kvarn.decode(records, cfg, rotated=rotated)
        expected = [torch.from_numpy(rows(both_heads(x))).to(DEVICE).double() for x in decoded]
        for name, got, want in zip("kv", pool.expand(sequence, 0, rotated), expected, strict=True):
            COUNTS.expanded += want.numel()
            # Half an ulp of half for the rounding, and tensor cores' sums, which lose bits where zero points
            # and codes nearly cancel: in a tile with one large token.
            tolerance = 2.0**-11 * want.abs() + 2e-4 * want.abs().amax(-1, keepdim=True) + 3e-8
            bad = ~((got.double() - want).abs() <= tolerance)
            if bad.any():
                at = int((bad * ((got.double() - want).abs() - tolerance).nan_to_num(torch.inf)).argmax())
                COUNTS.fail(
                    f"{case.name}: expanded {name}, rotated {rotated}: {int(bad.sum())} values off, "
                    f"{got.flatten()[at]} for {want.flatten()[at]} ± {tolerance.flatten()[at]:.1e}"
                )
        random = torch.Generator(device=DEVICE).manual_seed(7)
        shape = QUERIES, KV_HEADS * GROUP, cfg.head_dim
        # Logits of a few units, as a model has them, whatever the largest key.
        q = torch.randn(shape, generator=random, device=DEVICE).double()
        largest = torch.einsum("nhd,mkd->nhmk", q, expected[0]).abs().max() / math.sqrt(cfg.head_dim)
        q = (q * (6 / largest)).half()
        step = pool.step([sequence], [QUERIES])
        out, lse = step.attend(0, q, return_lse=True, rotated=rotated)  # before append: the records alone
        step.abandon()
        options = {"scale": 1 / math.sqrt(cfg.head_dim), "window": None, "softcap": None, "sinks": None}
        start = len(expected[0])
        want, want_lse, values = attend_f64(q.double(), *expected, start, **options)
        e16 = (attend_f64(q.double(), *expected, start, **options, half=True)[0] - want).norm(dim=-1)
        size = torch.maximum(want.norm(dim=-1), values.pow(2).mean().sqrt() * 1e-3 * math.sqrt(cfg.head_dim))
        error = (out.double() - want).norm(dim=-1) / size
        bad = ~(error <= torch.clamp(3 * e16 / size, min=2e-3)) | ~((lse.double() - want_lse).abs() <= 1e-2)
        COUNTS.vectors += bad.numel()
        if bad.any():
            COUNTS.fail(
                f"{case.name}: attention, rotated {rotated}: {int(bad.sum())} of {bad.numel()} vectors, "
                f"worst {float(error.max()):.1e}, lse {float((lse.double() - want_lse).abs().max()):.1e}"
            )


def check_gpu_records(case, records, k, v):
    """The CPU reads what the GPU seals of the same inputs."""
    cfg = case.cfg
    pool, _, pages = filled(case, k, v)
    made = torch.from_dlpack(pool.pages[0])[pages].cpu().numpy()
    with tempfile.TemporaryDirectory() as folder:
        for head, order in ((0, slice(None)), (1, slice(None, None, -1))):
            ours = np.ascontiguousarray(made[:, head])
            kvarn.save_records(Path(folder) / "gpu.records", ours, cfg)
            loaded, _ = kvarn.load_records(Path(folder) / "gpu.records")
            decoded = kvarn.decode(loaded, cfg, rotated=True)
            stored = kvarn.decode(np.ascontiguousarray(records[order]), cfg, rotated=True)
            COUNTS.equal_bytes += int((loaded == records[order]).sum())
            COUNTS.total_bytes += loaded.size
            for tile in range(case.tiles):
                inputs = (x[order][tile].astype(np.float32) for x in (k, v))
                verdicts = contract.judge(*inputs, loaded[tile], cfg)
                for name, verdict, ours_one, theirs in zip("kv", verdicts, decoded, stored, strict=True):
                    COUNTS.matrices += 1
                    distance = np.linalg.norm(ours_one[tile] - theirs[tile])
                    relative = distance / np.linalg.norm(theirs[tile])
                    # Where several iterates are equally good, the GPU may keep another one than the CPU.
                    alike = relative <= 5e-2 or len(verdict.admissible) > 1
                    if not verdict.passed or not alike:
                        COUNTS.fail(
                            f"{case.name}: sealed {name}, tile {tile}, head {head}: {verdict}, "
                            f"{relative:.1e} from the CPU's"
                        )


def main():
    print(f"kvarn {kvarn.__version__} on {torch.cuda.get_device_name()}", flush=True)
    for case in golden.cases():
        before = COUNTS.failed
        try:
            records, cfg = kvarn.load_records(golden.FOLDER / case.name)
            assert cfg == case.cfg
            check_cpu_records(case, records)
            check_gpu_records(case, records, *golden.inputs(case))
        except Exception:
            COUNTS.fail(f"{case.name}:\n{traceback.format_exc()}")
        COUNTS.files += 1
        print(f"{case.name}: {'ok' if COUNTS.failed == before else 'failed'}", flush=True)
    print(
        f"{COUNTS.files} files: {COUNTS.expanded:,} expanded values, {COUNTS.vectors} output vectors, "
        f"{COUNTS.matrices} matrices sealed and judged "
        f"({COUNTS.equal_bytes / max(COUNTS.total_bytes, 1):.4%} of their bytes are the CPU's), "
        f"{COUNTS.failed} failed"
    )
    sys.exit(COUNTS.failed > 0)


if __name__ == "__main__":
    main()
