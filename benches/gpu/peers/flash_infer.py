"""FlashInfer's attention over a paged cache, fp16 and fp8 (e4m3), fa2 kernels on tensor cores.

One query token takes the decode wrapper, several the prefill wrapper with a causal mask, as FlashInfer's own
documentation says. Its kernels are compiled by nvcc at the first use of each head dim. Written for version
0.5.3.
"""

import os
import sys

import torch

from peers.peer import DenseMemory, Peer, Prepared, UnsupportedShapeError

PAGE = 16
# Its decode kernels run with other head dims, but what merges their parts does not, and reads past the end.
HEAD_DIMS = 64, 128, 256
WORKSPACE_BYTES = 512 << 20


class FlashInferPeer(Peer):
    """BatchDecodeWithPagedKVCacheWrapper, layout NHD, pages of 16 tokens.

    Args:
        holds: "fp16" or "fp8".
    """

    def __init__(self, holds: str):
        self.name = f"flashinfer {holds}"
        self.holds = holds
        self._workspace = None

    def prepare(self, memory: DenseMemory) -> Prepared:
        flashinfer = _import()
        s = memory.shape
        if s.head_dim not in HEAD_DIMS:
            raise UnsupportedShapeError(f"head dim {s.head_dim}: expected one of {HEAD_DIMS}")
        pages_each = -(-s.tokens // PAGE)
        # Caches are cut into pages as they lie; all of them are full.
        assert s.tokens % PAGE == 0
        paged = memory.caches.view(len(memory.caches), -1, 2, PAGE, s.kv_heads, s.head_dim)
        if self.holds == "fp8":
            halves, paged = paged, torch.empty(paged.shape, device=paged.device, dtype=torch.float8_e4m3fn)
            for cache, half in zip(paged, halves, strict=True):
                cache.copy_(half)
        if self._workspace is None:
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        tables = {
            "indptr": torch.arange(s.batch + 1, dtype=torch.int32, device="cuda") * pages_each,
            "indices": torch.arange(s.batch * pages_each, dtype=torch.int32, device="cuda"),
            "last": torch.full((s.batch,), PAGE, dtype=torch.int32, device="cuda"),
        }
        types = {"q_data_type": torch.float16, "kv_data_type": paged.dtype}
        sizes = s.heads, s.kv_heads, s.head_dim, PAGE
        if s.q_len == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=tables["indptr"].clone(),
                paged_kv_indices_buffer=tables["indices"].clone(),
                paged_kv_last_page_len_buffer=tables["last"].clone(),
            )
            wrapper.plan(tables["indptr"], tables["indices"], tables["last"], *sizes, **types)
        else:
            rows = torch.arange(s.batch + 1, dtype=torch.int32, device="cuda") * s.q_len
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                qo_indptr_buf=rows.clone(),
                paged_kv_indptr_buf=tables["indptr"].clone(),
                paged_kv_indices_buf=tables["indices"].clone(),
                paged_kv_last_page_len_buf=tables["last"].clone(),
                backend="fa2",
            )
            wrapper.plan(
                rows, tables["indptr"], tables["indices"], tables["last"], *sizes, causal=True, **types
            )
        q = memory.q.transpose(1, 2).reshape(s.batch * s.q_len, s.heads, s.head_dim).contiguous()
        out = torch.empty_like(q)

        def dense():
            tokens = paged[0].view(s.batch, pages_each, 2, PAGE, s.kv_heads, s.head_dim)
            planes = tokens.permute(2, 0, 4, 1, 3, 5).reshape(2, s.batch, s.kv_heads, -1, s.head_dim)
            return planes.to(torch.float16)

        return Prepared(
            calls=[lambda cache=cache: wrapper.run(q, cache, out=out) for cache in paged],
            q=memory.q,
            dense=dense,
            order=lambda out: out.view(s.batch, s.q_len, s.heads, s.head_dim).transpose(1, 2),
        )


def _import():
    """The module, with the ninja that is installed beside it on the path: its compiler calls need it."""
    import flashinfer

    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(flashinfer.__file__))), "bin")
    for folder in (beside, os.path.dirname(sys.executable)):
        if os.path.exists(os.path.join(folder, "ninja")) and folder not in os.environ["PATH"].split(":"):
            os.environ["PATH"] = folder + ":" + os.environ["PATH"]
    return flashinfer
