"""What one `update` of one layer brought, and the two ways to read the layer with it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvarn.integrations.transformers.dense import (
    causal_attention,
    causal_mask,
    chunk_attention,
    masked_attention,
    merge,
)
from kvarn.integrations.transformers.forward import ForwardPass


class Chunk:
    """New keys and values of one layer in one forward pass.

    Either reading appends them. The order is the same in both: without a past, or with more new columns than a
    fused step takes, the past is read as it was and the new tokens raw, then they are appended, which seals
    tiles; otherwise they are appended first.

    Args:
        layer: index among the KVarN layers.
        k: new keys, [batch, kv_heads, columns, head_dim].
        v: new values, like k.
        forward: the forward pass they belong to.
    """

    def __init__(self, layer: int, k: Tensor, v: Tensor, forward: ForwardPass) -> None:
        self.layer = layer
        self.k = k
        self.v = v
        self.forward = forward
        self._before = forward.rows.columns
        self._stored = forward.rows.stored
        self._dense: tuple[Tensor, Tensor] | None = None

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attend to the layer without building its dense tensors.

        Args:
            query: [batch, heads, columns, head_dim].
            mask: bool [batch, past and new columns], False at padding, or None.
            scale: factor of the scores.
            window: query column i sees column j if i - j < window.
            softcap: scores become softcap * tanh(scores / softcap).
            sink_logits: [heads], a logit per head that takes part in the softmax and has no value.

        Returns:
            [batch, columns, heads, head_dim] in the query's dtype; 0 at padding.
        """
        forward = self.forward
        if mask is None and self._stored is not None:
            mask = torch.ones(query.shape[0], self._before + forward.columns, dtype=torch.bool)
        forward.plan(mask)
        out = self._attend(query, mask, scale, window, softcap, sink_logits)
        self._done()
        return out

    def _attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        forward = self.forward
        if forward.hides or (window is not None and self._has_holes()):
            seen = self._visible(mask, window)
            return masked_attention(query, *self.dense(), seen, scale=scale, softcap=softcap, sink_logits=sink_logits)
        q, step = forward.pack(query), forward.step
        if step is None or not len(q):
            self._append()
            return forward.unpack(q)
        if forward.past and (not forward.raw_first or forward.appended(self.layer)):
            self._append()
            out = step.attend(self.layer, q, scale=scale, window=window, softcap=softcap, sink_logits=sink_logits)
        elif forward.past:
            past, lse = step.attend(self.layer, q, scale=scale, window=window, softcap=softcap, return_lse=True)
            own = [
                chunk_attention(*row, scale=scale, window=window, softcap=softcap, sink_logits=sink_logits)
                for row in self._rows(q)
            ]
            out = merge(torch.cat([o for o, _ in own]), torch.cat([n for _, n in own]), past, lse).to(q.dtype)
            self._append()
        else:
            options = {"scale": scale, "window": window, "softcap": softcap, "sink_logits": sink_logits}
            if forward.kept is None:
                out = causal_attention(query, self.k, self.v, **options).flatten(0, 1)
            else:
                parts = [causal_attention(*(t[None] for t in row), **options)[0] for row in self._rows(q)]
                out = torch.cat(parts)
            self._append()
        return forward.unpack(out)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values, [batch, kv_heads, past and new columns, head_dim].

        Columns of padding that rows do not store are finite and otherwise undefined.
        """
        if self._dense is None:
            forward = self.forward
            if not forward.planned:
                forward.plan(None)
            forward.rows.materializations += 1
            if forward.raw_first and not forward.appended(self.layer):
                self._dense = self._read(raw=True)
                self._append()
            else:
                self._append()
                self._dense = self._read(raw=False)
            self._done()
        return self._dense

    def _done(self) -> None:
        """Finish the pass with its last layer; layers that share keys and values may still come."""
        if not self.forward.rows.sharing:
            self.forward.rows.settle()

    def _append(self) -> None:
        if not self.forward.received(self.layer):
            self.forward.append(self.layer, self.forward.pack(self.k), self.forward.pack(self.v))

    def _rows(self, q: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield q, k and v [heads, tokens, head_dim] of each row, q packed."""
        forward = self.forward
        for row, part in enumerate(q.split(forward.counts)):
            k, v = self.k[row], self.v[row]
            if forward.kept is not None:
                k, v = k[:, forward.kept[row]], v[:, forward.kept[row]]
            yield part.transpose(0, 1), k, v

    def _read(self, *, raw: bool) -> tuple[Tensor, Tensor]:
        """Expand the past, and the new columns raw or as they are stored now."""
        forward = self.forward
        batch, kv_heads, columns, head_dim = self.k.shape
        shape = (batch, kv_heads, self._before + columns, head_dim)
        out = self.k.new_zeros(shape), self.v.new_zeros(shape)
        for row in range(batch):
            expanded = forward.expand(self.layer, row, self.k)
            # A row's past is all of it as long as the layer has not appended.
            at = self._columns_of(row)[: len(expanded[0])]
            for states, new in zip(out, expanded, strict=True):
                states[row, :, at] = new.transpose(0, 1)
        if raw:
            out[0][:, :, self._before :], out[1][:, :, self._before :] = self.k, self.v
        return out

    def _stores(self) -> Tensor:
        """Return which of the past and new columns the rows store, bool [batch, columns]."""
        batch, columns = self.k.shape[0], self.forward.columns
        past, kept = self._stored, self.forward.kept
        return torch.cat(
            [
                torch.ones(batch, self._before, dtype=torch.bool) if past is None else past,
                torch.ones(batch, columns, dtype=torch.bool) if kept is None else kept,
            ],
            dim=1,
        )

    def _columns_of(self, row: int) -> Tensor:
        return self._stores()[row].nonzero().squeeze(1)

    def _has_holes(self) -> bool:
        """Whether a row has padding after its first token, so that distances in columns and in tokens differ."""
        if self._stored is None and self.forward.kept is None:
            return False
        stores = self._stores()
        return bool((~stores & (stores.cumsum(dim=1) > 0)).any())

    def _visible(self, mask: Tensor | None, window: int | None) -> Tensor:
        """Return the dense mask, bool [batch, 1, new columns, past and new columns]."""
        seen = self._stores() if mask is None else mask.bool()
        return causal_mask(self.forward.columns, seen.shape[1], window) & seen[:, None, None]
