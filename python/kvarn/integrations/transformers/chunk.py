"""What one `update` of one layer brought, and the two ways to read the layer with it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvarn.integrations.transformers.dense import Scoring, causal_attention, causal_mask, masked_attention
from kvarn.integrations.transformers.forward import ForwardPass
from kvarn.integrations.transformers.raw import chunks_attention, prompts_attention, stored_attention


class Chunk:
    """New keys and values of one layer in one forward pass.

    Either reading appends them. The order is the same in both: without a past, or with more new columns
    than a fused step takes, the past is read as it was and the new tokens raw, then they are appended,
    which seals tiles; otherwise they are appended first.

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

    def attend(self, query: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
        """Attend to the layer without building its dense tensors.

        Args:
            query: [batch, heads, columns, head_dim].
            mask: bool [batch, past and new columns] or [batch, max_tokens], False at padding, or None.
            scoring: how scores become weights; its window counts columns.

        Returns:
            [batch, columns, heads, head_dim] in the query's dtype; 0 at padding.
        """
        forward = self.forward
        mask = forward.visible(mask)
        forward.plan(mask)
        if forward.hides or (scoring.window is not None and self._has_holes()):
            keys, values = self.dense()
            return masked_attention(query, keys, values, self._visible(mask, scoring.window), scoring)
        with forward.reading():
            out = forward.unpack(self._attend(query, forward.pack(query), scoring))
        self._done()
        return out

    def _attend(self, query: Tensor, q: Tensor, scoring: Scoring) -> Tensor:
        """Attend from query, which is q when packed; append on the way."""
        forward, step = self.forward, self.forward.step
        if step is None or not len(q):
            self._append()
            return q
        if not forward.past:
            out = self._prompt(query, q, scoring)
            self._append()
            return out
        if not forward.raw_first or forward.appended(self.layer):
            self._append()
            return stored_attention(step, self.layer, q, scoring)
        out = chunks_attention(step, self.layer, q, self._rows(q), scoring)
        self._append()
        return out

    def _prompt(self, query: Tensor, q: Tensor, scoring: Scoring) -> Tensor:
        if self.forward.kept is None:
            return causal_attention(query, self.k, self.v, scoring).flatten(0, 1)
        return prompts_attention(self._rows(q), scoring)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values, [batch, kv_heads, past and new columns, head_dim].

        Columns of padding that rows do not store are finite and otherwise undefined.
        """
        if self._dense is None:
            forward = self.forward
            if not forward.planned:
                forward.plan(None)
            forward.rows.materializations += 1
            with forward.reading():
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
        for row, part in enumerate(torch.split(q, forward.counts)):
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
            at = self._columns_of(row, len(expanded[0]))
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

    def _columns_of(self, row: int, tokens: int) -> Tensor | slice:
        """Return the columns of a row's first `tokens` tokens."""
        if self._stored is None and self.forward.kept is None:
            return slice(tokens)
        return self._stores()[row].nonzero().squeeze(1)[:tokens]

    def _has_holes(self) -> bool:
        """Whether a row has padding after its first token: distances in columns are not those in tokens."""
        if self._stored is None and self.forward.kept is None:
            return False
        stores = self._stores()
        return bool((~stores & (stores.cumsum(dim=1) > 0)).any())

    def _visible(self, mask: Tensor | None, window: int | None) -> Tensor:
        """Return the dense mask, bool [batch, 1, new columns, past and new columns]."""
        seen = self._stores() if mask is None else mask.bool()
        causal = causal_mask(self.forward.columns, seen.shape[1], window, self.k.device)
        return causal & seen.to(self.k.device)[:, None, None]
