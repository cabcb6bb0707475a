"""Attention over dense K and V in torch: three ways, each in float32, bfloat16 and float16.

"sdpa gqa" is `scaled_dot_product_attention` with `enable_gqa=True`. "sdpa folded" and "matmul" make the query
heads of a KV head more query tokens, so that K and V are read once; "matmul" multiplies, takes the softmax in
float32 and multiplies. Each is checked against float64 on a small shape before it is timed.
"""

from dataclasses import replace

import torch
from gpu.reference import distance, reference
from gpu.shapes import SHORT_OF_CONTEXT, Shape
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WAYS = ("sdpa gqa", "sdpa folded", "matmul")
# ‖out − reference‖ / ‖reference‖ that each type may have; bfloat16 has 8 bits of precision.
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}


class Dense:
    """Random K and V of a shape in one type.

    Attributes:
        q: queries, [batch, heads, q_len, head_dim].
        k, v: [batch, kv_heads, tokens, head_dim]; queries are the newest tokens.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype):
        self.shape = shape
        sizes = shape.batch, shape.kv_heads, shape.tokens, shape.head_dim
        self.k, self.v = torch.randn(sizes, dtype=dtype), torch.randn(sizes, dtype=dtype)
        self.q = torch.randn(shape.batch, shape.heads, shape.q_len, shape.head_dim, dtype=dtype)
        # Masks are made before the clock runs.
        self._mask = None if shape.q_len == 1 else causal_bias(shape, dtype)
        self._folded_mask = None if self._mask is None else self._mask.repeat(shape.group, 1)

    def sdpa_gqa(self):
        return scaled_dot_product_attention(
            self.q, self.k, self.v, attn_mask=self._mask, enable_gqa=self.shape.group > 1
        )

    def sdpa_folded(self):
        out = scaled_dot_product_attention(self._folded(), self.k, self.v, attn_mask=self._folded_mask)
        return out.reshape(self.q.shape)

    def matmul(self):
        scores = (self._folded() @ self.k.mT) * self.shape.head_dim**-0.5
        if self._folded_mask is not None:
            scores += self._folded_mask
        return (scores.float().softmax(-1).to(self.v.dtype) @ self.v).reshape(self.q.shape)

    def call(self, way):
        """The call of a name of WAYS."""
        return getattr(self, way.replace(" ", "_"))

    def _folded(self):
        s = self.shape
        return self.q.reshape(s.batch, s.kv_heads, s.group * s.q_len, s.head_dim)


def causal_bias(shape, dtype):
    """What makes the queries of a shape causal, [q_len, tokens]: 0 where they see a token, -inf elsewhere."""
    seen = torch.ones(shape.q_len, shape.tokens, dtype=torch.bool).tril(shape.tokens - shape.q_len)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def small_shape(shape):
    """A small shape of the same heads and query tokens."""
    return replace(shape, batch=2, context=SHORT_OF_CONTEXT + 192 + shape.q_len)


def check(shape, dtype, way):
    """Check a way to compute on a small shape of the same kind; returns its error.

    Raises:
        ArithmeticError: it is wrong.
    """
    dense = Dense(small_shape(shape), DTYPES[dtype])
    error = distance(dense.call(way)(), reference(dense.q, dense.k, dense.v))
    if error > TOLERANCES[dtype]:
        raise ArithmeticError(
            f"{way} {dtype}: error {error:.1e} against float64, expected at most {TOLERANCES[dtype]:.0e}"
        )
    return error
