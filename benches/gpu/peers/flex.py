"""torch's flex_attention, compiled for each shape: with few queries it takes its split decode kernel."""

import torch
from torch.nn.attention.flex_attention import flex_attention

from peers.peer import DenseMemory, Peer, Prepared


class FlexPeer(Peer):
    """Compiled with static shapes; `enable_gqa=True`."""

    name = "flex_attention"

    def prepare(self, memory: DenseMemory) -> Prepared:
        s = memory.shape
        # Past a number of shapes dynamo gives up and runs uncompiled: each shape starts anew.
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        first = s.tokens - s.q_len

        def causal(score, _batch, _head, query, key):
            return torch.where(key <= query + first, score, -float("inf"))

        def call(k, v):
            return compiled(memory.q, k, v, score_mod=causal if s.q_len > 1 else None, enable_gqa=True)

        planes = [memory.planes(copy) for copy in range(len(memory.caches))]
        return Prepared(
            calls=[lambda kv=kv: call(*kv) for kv in planes], q=memory.q, dense=lambda: memory.planes(0)
        )
