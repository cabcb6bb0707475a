"""What the parts of check_host.py share: counts of checks, and models whose steps are compared by bits."""

import kvarn
import torch

DEVICE = "cuda"


class Counts:
    """What was compared, and what failed."""

    def __init__(self):
        self.parts = self.checks = self.failed = 0

    def check(self, right, text):
        self.checks += 1
        if not right:
            self.failed += 1
            print(f"FAILED {text}", flush=True)

    def refused(self, error, text, call):
        """`call` must raise `error` with a text that holds `text`."""
        try:
            call()
        except error as caught:
            self.check(text in str(caught), f"{error.__name__} {str(caught)!r}: expected {text!r} in it")
        except Exception as caught:
            self.check(False, f"{type(caught).__name__} {caught}: expected {error.__name__} with {text!r}")
        else:
            self.check(False, f"no error: expected {error.__name__} with {text!r}")


COUNTS = Counts()


def bits(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def same(a, b):
    return torch.equal(bits(a), bits(b))


class Model:
    """A pool, sequences with prompts, and inputs from a seed: equal models give equal bits."""

    def __init__(
        self,
        *,
        layers=2,
        batch=3,
        kv=2,
        ratio=4,
        d=128,
        name="kvarn_k4v2_g64",
        device=DEVICE,
        seed=0,
        prompts=(61, 3, 130),
        pages=64,
        slots=32,
        **options,
    ):
        self.cfg = kvarn.Config(name, head_dim=d)
        self.layers, self.kv, self.heads, self.d = layers, kv, kv * ratio, d
        self.device = torch.device(device)
        self.pool = kvarn.Pool(
            self.cfg, layers=layers, kv_heads=kv, pages=pages, slots=slots, device=device, **options
        )
        self.random = torch.Generator(device=device).manual_seed(seed)
        self.sequences = [self.pool.create() for _ in range(batch)]
        self.batch = batch
        counts = [prompts[index % len(prompts)] for index in range(batch)]
        with self.pool.step(self.sequences, counts) as step:
            for layer in range(layers):
                step.append(layer, self.normal(sum(counts), kv), self.normal(sum(counts), kv))
        self.inputs = self.new_inputs()

    def normal(self, rows, heads):
        return torch.randn(rows, heads, self.d, generator=self.random, device=self.device).half()

    def new_inputs(self):
        """(q, k, v) of each layer for one token a sequence."""
        b = self.batch
        return [
            (self.normal(b, self.heads), self.normal(b, self.kv), self.normal(b, self.kv))
            for _ in range(self.layers)
        ]

    def refill(self):
        """New values where the inputs are."""
        for old, new in zip(self.inputs, self.new_inputs(), strict=True):
            for a, b in zip(old, new, strict=True):
                a.copy_(b)

    def plan(self, arrays=None):
        return self.pool.step(self.sequences, [1] * self.batch, arrays=arrays)

    def static_arrays(self, tokens):
        return self.pool.static_arrays([1] * self.batch, tokens=tokens)

    def forward(self, step):
        outputs = []
        for layer, (q, k, v) in enumerate(self.inputs):
            before, lse = step.attend(layer, q, return_lse=True)
            step.append(layer, k, v)
            outputs += [before, lse, step.attend(layer, q), step.attend(layer, q, window=40)]
        return outputs

    def run(self, steps):
        """Outputs of all steps."""
        outputs = []
        for _ in range(steps):
            self.refill()
            with self.plan() as step:
                outputs.append(self.forward(step))
        return outputs

    def memory(self):
        pool = self.pool
        return [torch.from_dlpack(memory) for memory in (*pool.pages, *pool.slots)]


def compare(name, found, expected):
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            COUNTS.check(same(x.cpu(), y.cpu()), f"{name}: step {step}, output {index} differs")
