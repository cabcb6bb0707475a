"""One forward pass through the layers of a model: one step of the pool."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvarn import ShapeError, Step

if TYPE_CHECKING:
    from kvarn.integrations.transformers.rows import Rows

# The longest step that is appended before it attends. A longer one first attends to its own raw keys and
# values.
FUSED_TOKENS = 16


class ForwardPass:
    """The new columns of a batch on their way through the layers.

    The first layer to need it plans the pass: which of the new columns are tokens, and the pool's step.
    The pass is finished when the last layer is done, unless layers share keys and values: then with the
    next use of the cache. Until then the rows are as they were before.

    Attributes:
        columns: new columns.
        began: layers that brought their keys and values.
        step: the pool's step; None before the plan, and if there is nothing to append or commit.
        kept: [batch, columns], the columns that hold tokens; None if all do.
        planned: whether `plan` ran.
        hides: whether the mask of this pass hides tokens that rows store.
        broken: whether reading a layer raised.
    """

    def __init__(self, rows: "Rows", columns: int) -> None:
        self.rows = rows
        self.columns = columns
        self.began: set[int] = set()
        self.step: Step | None = None
        self.kept: Tensor | None = None
        self.hides = False
        self.broken = False
        self.past = any(sequence.length for sequence in rows.sequences)
        self._appended: dict[int, tuple[Tensor, Tensor] | None] = {}
        self.planned = False
        self._mask: Tensor | None = None
        self._wide: tuple[Tensor, Tensor] | None = None

    @property
    def raw_first(self) -> bool:
        """Whether layers attend to raw keys and values, and to the past as it was, before they append."""
        return not self.past or self.columns > FUSED_TOKENS

    @property
    def complete(self) -> bool:
        """Whether every layer has appended, and none raised."""
        return len(self._appended) == self.rows.layers and not self.broken

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """Return mask as it is meant: without columns behind the new ones; if there is none, all are shown.

        Args:
            mask: bool [batch, past and new columns] or [batch, max_tokens], or None.
        """
        rows, total = self.rows, self.rows.columns + self.columns
        if mask is None:
            return None if rows.stored is None else torch.ones(len(rows.sequences), total, dtype=torch.bool)
        if mask.shape[1] != rows.settings.max_tokens or mask.shape[1] == total:
            return mask
        # The same tensor for every layer, which is how `plan` knows that nothing is to be compared.
        if self._wide is None or self._wide[0] is not mask:
            self._wide = mask, mask[:, :total]
        return self._wide[1]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Note if what the block does with a layer raises: the pass then never counts."""
        try:
            yield
        except BaseException:
            self.broken = True
            raise

    def plan(self, mask: Tensor | None) -> None:
        """Open the pool's step for the tokens that mask shows, or check that later layers show the same.

        Args:
            mask: bool [batch, past and new columns], False at padding; None: all new columns are tokens.

        Raises:
            ShapeError: the mask has another shape, shows what was padding before, or differs between layers.
            CapacityError: the pool is too small.
        """
        if self.planned:
            if mask is not self._mask:
                self._check_same(mask)
            return
        kept, self.hides = self._read(mask)
        self.kept = None if kept is None or bool(kept.all()) else kept
        rows, batch = self.rows, len(self.rows.sequences)
        self.counts = [self.columns] * batch if self.kept is None else self.kept.sum(dim=1).tolist()
        hold = [min(count, rows.hold) for count in self.counts]
        self._index = None if self.kept is None else self.kept.flatten().nonzero().squeeze(1)
        # The pool takes no sequence that has nothing to append or commit.
        self._live = [
            row
            for row, sequence in enumerate(rows.sequences)
            if self.counts[row] or sequence.committed < sequence.length
        ]
        if self._live:
            assert rows.pool is not None
            self.step = rows.pool.step(
                [rows.sequences[row] for row in self._live],
                counts=[self.counts[row] for row in self._live],
                hold=[hold[row] for row in self._live],
            )
        self._mask, self.planned = mask, True

    def _read(self, mask: Tensor | None) -> tuple[Tensor | None, bool]:
        """Return the new columns that are tokens, and whether mask hides stored ones."""
        rows, past = self.rows, self.rows.columns
        batch, total = len(rows.sequences), past + self.columns
        tokens = None
        if rows.padding is not None:
            tokens = torch.arange(total) >= torch.tensor(rows.padding)[:, None]
        if mask is None:
            return (None if tokens is None else tokens[:, past:]), False
        if mask.shape != (batch, total):
            raise ShapeError(
                f"attention_mask {list(mask.shape)}: expected [{batch}, {total}], the batch by past and new "
                "columns"
            )
        shown = mask.bool().cpu() if tokens is None else mask.bool().cpu() & tokens
        before = shown[:, :past]
        if rows.stored is None:
            return shown[:, past:], not bool(before.all())
        revealed = (before & ~rows.stored).nonzero()
        if len(revealed):
            row, column = revealed[0].tolist()
            raise ShapeError(
                f"attention_mask shows column {column} of row {row}: expected 0, as it was padding when the "
                "row was stored; keep the mask of earlier calls"
            )
        return shown[:, past:], bool((rows.stored & ~before).any())

    def _check_same(self, mask: Tensor | None) -> None:
        kept, hides = self._read(mask)
        planned = (
            torch.ones(len(self.counts), self.columns, dtype=torch.bool) if self.kept is None else self.kept
        )
        if (kept is None and self.kept is not None) or (kept is not None and not torch.equal(kept, planned)):
            raise ShapeError(
                "attention_mask of this layer shows other new columns than that of the first: expected one "
                "mask for all layers of a forward pass"
            )
        self._mask, self.hides = mask, hides

    def pack(self, states: Tensor) -> Tensor:
        """Return the tokens of states [batch, heads, columns, head_dim] as [tokens, heads, head_dim]."""
        flat = states.transpose(1, 2).flatten(0, 1)
        return flat if self._index is None else flat[self._index]

    def unpack(self, packed: Tensor) -> Tensor:
        """Return packed [tokens, heads, head_dim] as [batch, columns, heads, head_dim], 0 at padding."""
        batch = len(self.counts)
        if self._index is not None:
            flat = packed.new_zeros(batch * self.columns, *packed.shape[1:])
            flat[self._index] = packed
            packed = flat
        return packed.view(batch, self.columns, *packed.shape[1:])

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Append packed k and v [tokens, kv_heads, head_dim] to layer.

        Where layers share keys and values, later ones still need the past as it was: the tensors wait for
        the end.
        """
        if self.rows.sharing and self.raw_first:
            self._appended[layer] = (k, v)
        else:
            if self.step is not None:
                self.step.append(layer, k, v)
            self._appended[layer] = None

    def expand(self, layer: int, row: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a row's keys and values in layer, [tokens, kv_heads, head_dim]; once appended, all."""
        if self.step is not None and row in self._live:
            return self.step.expand(layer, self._live.index(row), like=like)
        assert self.rows.pool is not None
        return self.rows.pool.expand(self.rows.sequences[row], layer, like=like)

    def received(self, layer: int) -> bool:
        """Whether layer's new tokens came to `append`."""
        return layer in self._appended

    def appended(self, layer: int) -> bool:
        """Whether layer's new tokens are in the pool, where its past can no longer be read as it was."""
        return layer in self._appended and self._appended[layer] is None

    def finish(self) -> None:
        """Move the rows' lengths."""
        if self.step is not None:
            for layer, waiting in self._appended.items():
                if waiting is not None:
                    self.step.append(layer, *waiting)
            self.step.finish()
        self.rows.advance(self.columns, self.kept)
