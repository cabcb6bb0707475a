"""A decode kernel in the style of the public low-bit KV kernels, in Triton, on its own simple layout.

It stands for how such kernels are usually written: pages of 128 tokens, every element loads the byte that
holds its code, unpacks it and multiplies its scales in float32; one program for each query head, so that
query heads of a KV head share nothing; a fixed number of splits, and a second kernel that merges them; the
rotations of queries and outputs are matrix products of their own. 4-bit keys and 2-bit values with the same
parameters a tile as a KVarN record, so the bytes are the same; sinks and tail are quantised too.
"""

import torch
import triton
import triton.language as tl
from timing import cold_copies

from peers.peer import DenseMemory, Peer, Prepared, UnsupportedShapeError

PAGE = 128
SPLITS = 32


@triton.jit
def _split_kernel(
    q_pointer,
    k_codes,
    k_channel_scale,
    k_channel_zero,
    k_token_scale,
    v_codes,
    v_channel_scale,
    v_token_scale,
    v_token_zero,
    table,
    lengths,
    partial_out,
    partial_lse,
    scale,
    table_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    pages = tl.cdiv(length, PAGE)
    each = tl.cdiv(pages, SPLITS)
    d = tl.arange(0, D)
    q = tl.load(q_pointer + (sequence * HEADS + head) * D + d).to(tl.float32) * scale
    top = float("-inf")
    total = 0.0
    out = tl.zeros([D], dtype=tl.float32)
    for page in range(split * each, tl.minimum((split + 1) * each, pages)):
        place = tl.load(table + sequence * table_stride + page).to(tl.int64)
        place = place * KV_HEADS + head // (HEADS // KV_HEADS)
        channel_scale = tl.load(k_channel_scale + place * D + d).to(tl.float32)
        channel_zero = tl.load(k_channel_zero + place * D + d).to(tl.float32)
        out_scale = tl.load(v_channel_scale + place * D + d).to(tl.float32)
        for first in range(0, PAGE, BLOCK):
            t = first + tl.arange(0, BLOCK)
            row = place * PAGE + t
            byte = tl.load(k_codes + row[:, None] * (D // 2) + d[None, :] // 2)
            code = ((byte >> (4 * (d % 2)).to(tl.uint8)[None, :]) & 15).to(tl.float32)
            token_scale = tl.load(k_token_scale + row).to(tl.float32)
            k = (code * channel_scale[None, :] + channel_zero[None, :]) * token_scale[:, None]
            score = tl.sum(k * q[None, :], 1)
            score = tl.where(page * PAGE + t < length, score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 0))
            shrink = tl.exp(top - new_top)
            p = tl.exp(score - new_top)
            byte = tl.load(v_codes + row[:, None] * (D // 4) + d[None, :] // 4)
            code = ((byte >> (2 * (d % 4)).to(tl.uint8)[None, :]) & 3).to(tl.float32)
            token_scale = tl.load(v_token_scale + row).to(tl.float32)
            token_zero = tl.load(v_token_zero + row).to(tl.float32)
            v = (code * token_scale[:, None] + token_zero[:, None]) * out_scale[None, :]
            out = out * shrink + tl.sum(p[:, None] * v, 0)
            total = total * shrink + tl.sum(p, 0)
            top = new_top
    at = (sequence * HEADS + head) * SPLITS + split
    # A split without pages has the weight exp(-inf).
    tl.store(partial_lse + at, tl.where(total > 0, top + tl.log(total), float("-inf")))
    tl.store(partial_out + at * D + d, out / tl.where(total > 0, total, 1.0))


@triton.jit
def _merge_kernel(
    partial_out, partial_lse, out_pointer, D: tl.constexpr, SPLITS: tl.constexpr, OUT: tl.constexpr
):
    row = tl.program_id(0)
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    lse = tl.load(partial_lse + row * SPLITS + s)
    weight = tl.exp(lse - tl.max(lse, 0))
    parts = tl.load(partial_out + (row * SPLITS + s)[:, None] * D + d[None, :])
    out = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_pointer + row * D + d, out.to(OUT))


def hadamard(size, device, dtype=torch.float16):
    """The orthonormal Sylvester Hadamard matrix; it is its own inverse."""
    matrix = torch.ones(1, 1, device=device, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix * size**-0.5).to(dtype)


class Tiles:
    """One cache of random codes and parameters."""

    def __init__(self, shape, device):
        self.shape = shape
        self.pages_each = -(-shape.tokens // PAGE)
        pages, heads, d = shape.batch * self.pages_each, shape.kv_heads, shape.head_dim

        def codes(width):
            return torch.randint(0, 256, (pages, heads, PAGE, width), dtype=torch.uint8, device=device)

        def parameters(count, low, high):
            values = torch.empty(pages, heads, count, device=device, dtype=torch.float16)
            return values.uniform_(low, high)

        self.k_codes, self.v_codes = codes(d // 2), codes(d // 4)
        self.k_channel_scale, self.k_channel_zero = parameters(d, 0.1, 0.3), parameters(d, -2.5, -0.5)
        self.k_token_scale, self.v_token_scale = parameters(PAGE, 0.5, 1.5), parameters(PAGE, 0.5, 1.5)
        self.v_token_zero, self.v_channel_scale = parameters(PAGE, -2.0, -1.0), parameters(d, 0.5, 1.5)

    def arguments(self):
        """What the kernel takes between the queries and the table."""
        return (
            self.k_codes,
            self.k_channel_scale,
            self.k_channel_zero,
            self.k_token_scale,
            self.v_codes,
            self.v_channel_scale,
            self.v_token_scale,
            self.v_token_zero,
        )

    def dense(self, table):
        """K and V in the model's frame, float64 [batch, kv_heads, tokens, head_dim]."""
        s = self.shape

        def elements(codes, bits):
            shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
            return ((codes[..., None] >> shifts) & (2**bits - 1)).flatten(-2).double()

        k = elements(self.k_codes, 4) * self.k_channel_scale[:, :, None] + self.k_channel_zero[:, :, None]
        k = k * self.k_token_scale[..., None]
        v = elements(self.v_codes, 2) * self.v_token_scale[..., None] + self.v_token_zero[..., None]
        v = v * self.v_channel_scale[:, :, None]
        turn = hadamard(s.head_dim, k.device, torch.float64)

        def sequences(x):
            x = x[table.long()] @ turn
            return x.transpose(1, 2).reshape(s.batch, s.kv_heads, -1, s.head_dim)[:, :, : s.tokens]

        return sequences(k), sequences(v)


class PublishedPeer(Peer):
    """The kernels above, with both rotations."""

    name = "triton published style"
    holds = "k4v2"

    def prepare(self, memory: DenseMemory) -> Prepared:
        s = memory.shape
        device = memory.q.device
        if s.q_len > 1:
            raise UnsupportedShapeError(f"q_len {s.q_len}: expected 1")
        if s.head_dim & (s.head_dim - 1):
            raise UnsupportedShapeError(f"head dim {s.head_dim}: expected a power of two")
        first = Tiles(s, device)
        bytes_each = sum(tensor.nbytes for tensor in first.arguments())
        copies = cold_copies(bytes_each) if device.type == "cuda" else 1
        caches = [first, *(Tiles(s, device) for _ in range(copies - 1))]
        order = torch.randperm(s.batch * first.pages_each, device=device, dtype=torch.int32)
        table = order.view(s.batch, first.pages_each)
        lengths = torch.full((s.batch,), s.tokens, device=device, dtype=torch.int32)
        turn = hadamard(s.head_dim, device)
        q = memory.q.squeeze(2)
        partial_out = torch.empty(s.batch, s.heads, SPLITS, s.head_dim, device=device)
        partial_lse = torch.empty(s.batch, s.heads, SPLITS, device=device)
        rotated = torch.empty_like(q)
        kind = tl.float16

        def call(cache):
            turned = q @ turn
            _split_kernel[(s.batch, s.heads, SPLITS)](
                turned,
                *cache.arguments(),
                table,
                lengths,
                partial_out,
                partial_lse,
                s.head_dim**-0.5,
                table.stride(0),
                HEADS=s.heads,
                KV_HEADS=s.kv_heads,
                D=s.head_dim,
                PAGE=PAGE,
                SPLITS=SPLITS,
                BLOCK=32,
            )
            _merge_kernel[(s.batch * s.heads,)](
                partial_out, partial_lse, rotated, D=s.head_dim, SPLITS=SPLITS, OUT=kind
            )
            return rotated @ turn

        return Prepared(
            calls=[lambda cache=cache: call(cache) for cache in caches],
            q=memory.q,
            dense=lambda: first.dense(table),
            order=lambda out: out.unsqueeze(2),
        )
