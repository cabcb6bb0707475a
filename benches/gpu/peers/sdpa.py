"""torch's scaled_dot_product_attention: each backend, in two ways to say that query heads share KV heads.

"gqa" is `enable_gqa=True`. "folded" makes the query heads of a KV head more query tokens, so that K and V
are read once in every backend.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from peers.peer import DenseMemory, Peer, Prepared

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class SdpaPeer(Peer):
    """One backend, gqa or folded."""

    def __init__(self, backend: str, *, folded: bool):
        self.name = f"sdpa {backend} {'folded' if folded else 'gqa'}"
        self._backend, self._folded = BACKENDS[backend], folded

    def prepare(self, memory: DenseMemory) -> Prepared:
        s = memory.shape
        q = memory.q
        if self._folded:
            q = q.view(s.batch, s.kv_heads, s.group * s.q_len, s.head_dim)
        mask = self._mask(s, q.device)

        def call(k, v):
            with sdpa_kernel(self._backend):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=not self._folded)

        planes = [memory.planes(copy) for copy in range(len(memory.caches))]
        return Prepared(
            calls=[lambda kv=kv: call(*kv) for kv in planes],
            q=memory.q,
            dense=lambda: memory.planes(0),
            order=lambda out: out.reshape(memory.q.shape),
        )

    def _mask(self, shape, device):
        """What makes several query tokens causal; made before the clock runs."""
        if shape.q_len == 1:
            return None
        if self._backend == SDPBackend.FLASH_ATTENTION and not self._folded:
            return causal_lower_right(shape.q_len, shape.tokens)
        seen = torch.ones(shape.q_len, shape.tokens, dtype=torch.bool, device=device)
        seen = seen.tril(shape.tokens - shape.q_len)
        if self._folded:
            seen = seen.repeat(shape.group, 1)
        bias = torch.zeros(seen.shape, device=device, dtype=torch.float16).masked_fill_(~seen, -torch.inf)
        return bias[None, None].expand(shape.batch, 1, -1, -1)


def sdpa_peers() -> list[Peer]:
    """Every backend, gqa and folded."""
    return [SdpaPeer(backend, folded=folded) for backend in BACKENDS for folded in (False, True)]
