"""The rows of a batch: one pool for all KVarN layers of a model, one sequence per row."""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvarn import CapacityError, Config, ConfigError, KvarnError, LayerShape, Pool, Sequence, ShapeError
from kvarn.integrations.transformers.forward import ForwardPass


@dataclass(frozen=True)
class Settings:
    """What the caller of `KVarNCache` chose; see there."""

    preset: str
    hold: int | None
    padding: tuple[int, ...] | None
    max_tokens: int
    max_rows: int | None
    refit: bool
    iterations: int
    sink_tokens: int | None
    recent_tokens: int

    def codec(self, head_dim: int) -> Config:
        """Return the codec for one head dim."""
        return Config(
            self.preset,
            head_dim=head_dim,
            refit=self.refit,
            iterations=self.iterations,
            sink_tokens=self.sink_tokens,
            recent_tokens=self.recent_tokens,
        )


# Rows that there is room for where nobody says how many: four copies of a small batch, or more.
_ROWS = 16


class Rows:
    """The pool, the sequence of each batch row, and which columns of the batch each row stores.

    A column is a position of the padded batch. Rows store tokens, not padding: `stored` [batch, columns] says
    which columns they have (None: all). Nothing here moves before a forward pass went through every layer.

    Args:
        settings: the caller's choices.
        shapes: KV heads and head dim of every KVarN layer by the model's config. Only their ratios are used:
            the sizes come from the first tensors, because a tensor-parallel rank holds a part of the heads.
        sharing: whether later layers attend to the keys and values of earlier ones.
        numbers: number of every KVarN layer in the model.
    """

    def __init__(
        self, settings: Settings, shapes: list[tuple[int, int]], *, sharing: bool, numbers: list[int]
    ) -> None:
        self.settings = settings
        self.sharing = sharing
        self.numbers = numbers
        self.layers = len(shapes)
        self.materializations = 0
        self._ratios = shapes
        self._give_back: weakref.finalize[..., Rows] | None = None
        self.close()

    def close(self) -> None:
        """Forget everything and give the memory back; the next `open` starts afresh."""
        if self._give_back is not None:
            self.abandon()
            self._give_back()
        self._give_back = None
        self.forward: ForwardPass | None = None
        self.pool: Pool | None = None
        self.config: Config | None = None
        self.sequences: list[Sequence] = []
        self.padding = self.settings.padding
        self.columns = 0
        self.stored: Tensor | None = None

    def open(self, layer: int, k: Tensor) -> None:
        """Make the pool for keys like k [batch, kv_heads, tokens, head_dim], or check layer's shape."""
        batch, kv_heads, _, head_dim = k.shape
        if self.pool is None:
            heads, dim = self._ratios[layer]
            self._shapes = [(kv_heads * h // heads, head_dim * d // dim) for h, d in self._ratios]
            self._make(batch, k.dtype, k.device)
        elif self._shapes[layer] != (kv_heads, head_dim):
            seen, dim = self._shapes[layer]
            raise ShapeError(
                f"layer {self.numbers[layer]} has {kv_heads} kv heads of head_dim {head_dim}: expected "
                f"{seen} of {dim} by the first layer's tensors and the model's config; give the KVarNCache "
                "the config of this model"
            )

    def _make(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        settings = self.settings
        if self.padding is not None and len(self.padding) != batch:
            raise ShapeError(
                f"padding of {len(self.padding)} rows: expected one entry for each of the {batch} rows "
                "of the batch"
            )
        for number, (_, head_dim) in zip(self.numbers, self._shapes, strict=True):
            try:
                settings.codec(head_dim)
            except ConfigError as error:
                raise ConfigError(f"layer {number}: {error}") from None
        self.config = config = settings.codec(self._shapes[0][1])
        group = config.group
        self.hold = group if settings.hold is None else settings.hold
        # Tiles being sealed and the new tail have slots at the same time while a step is open.
        slots = (config.sink_tokens > 0) + 2 * -(-(config.recent_tokens + group + self.hold - 1) // group)
        # Only address space: memory is taken as tokens arrive.
        self.room = max(_ROWS, 4 * batch) if settings.max_rows is None else settings.max_rows
        self._check_room(batch)
        self.pool = Pool(
            config,
            layers=[LayerShape(heads, dim) for heads, dim in self._shapes],
            pages=self.room * -(-settings.max_tokens // group),
            slots=self.room * slots,
            dtype="float32" if dtype == torch.float32 else "float16",
            device=str(device),
        )
        self._hold_on([self.pool.create() for _ in range(batch)])

    def _hold_on(self, sequences: list[Sequence]) -> None:
        """Make these the rows' sequences; they are freed when nobody has the rows any more."""
        if self._give_back is not None:
            self._give_back.detach()
        self.sequences = sequences
        self._give_back = weakref.finalize(self, _free, self.pool, sequences)
        self._give_back.atexit = False

    def _check_room(self, rows: int) -> None:
        if rows > self.room:
            raise CapacityError(
                f"{rows} rows, copies of the cache included: expected at most max_rows={self.room}; make the "
                "KVarNCache with a larger max_rows"
            )

    def copy(self) -> "Rows":
        """Return rows that hold the same, in the same pool; nothing is copied before one of them grows."""
        self.abandon()
        made = Rows(self.settings, self._ratios, sharing=self.sharing, numbers=self.numbers)
        made.materializations, made.columns, made.padding = self.materializations, self.columns, self.padding
        if self.pool is not None:
            self._check_room(self.pool.stats().sequences + len(self.sequences))
            made.pool, made.config, made.hold, made.room = self.pool, self.config, self.hold, self.room
            made._shapes = self._shapes
            made._hold_on([self.pool.fork(sequence) for sequence in self.sequences])
            made.stored = None if self.stored is None else self.stored.clone()
        return made

    def begin(self, layer: int, columns: int) -> ForwardPass:
        """Enter `columns` new columns into layer, opening a forward pass with the first layer.

        A layer that comes twice means that the pass before was broken off by an exception: it is
        abandoned, and the rows are as they were before it.
        """
        self.settle()
        forward = self.forward
        if forward is not None and (forward.broken or layer in forward.began or forward.columns != columns):
            self.abandon()
        if self.forward is None:
            if self.columns + columns > self.settings.max_tokens:
                raise CapacityError(
                    f"{self.columns + columns} tokens: expected at most "
                    f"max_tokens={self.settings.max_tokens}; make the KVarNCache with a larger max_tokens"
                )
            self.forward = ForwardPass(self, columns)
        self.forward.began.add(layer)
        return self.forward

    def settle(self) -> None:
        """Finish the open forward pass if it went through every layer."""
        if self.forward is not None and self.forward.complete:
            self.forward.finish()

    def abandon(self) -> None:
        """Finish the open forward pass, or drop it if it was broken off."""
        self.settle()
        if self.forward is not None and self.forward.step is not None:
            self.forward.step.abandon()
        self.forward = None

    def advance(self, columns: int, kept: Tensor | None) -> None:
        """Take over a finished forward pass.

        Args:
            columns: columns that it added.
            kept: [batch, columns], those of them that are stored; None: all.
        """
        if kept is not None or self.stored is not None:
            batch = len(self.sequences)
            before = torch.ones(batch, self.columns, dtype=torch.bool) if self.stored is None else self.stored
            added = torch.ones(batch, columns, dtype=torch.bool) if kept is None else kept
            self.stored = torch.cat([before, added], dim=1)
        self.columns += columns
        self.forward = None

    @contextlib.contextmanager
    def crop(self, remove: int) -> Iterator[None]:
        """Remove the last `remove` columns of every row when the block is through; nothing if it raises.

        Raises:
            CapacityError: a record cannot be decoded for lack of room; nothing is changed.
        """
        self.abandon()
        if self.pool is None or remove == 0:
            yield
            return
        columns = max(self.columns - remove, 0)
        stored = None if self.stored is None else self.stored[:, :columns]
        lengths = [columns] * len(self.sequences) if stored is None else stored.sum(dim=1).tolist()
        cut: list[Sequence] = []
        try:
            # Of forks: the rows are as they were until all of them are cut.
            for sequence, length in zip(self.sequences, lengths, strict=True):
                cut.append(self.pool.fork(sequence))
                self.pool.truncate(cut[-1], length)
            yield
        except BaseException:
            _free(self.pool, cut)
            raise
        _free(self.pool, self.sequences)
        self._hold_on(cut)
        self.columns, self.stored = columns, stored

    def select(self, indices: Tensor) -> None:
        """Make row i what row indices[i] was, and free the rows that no index names.

        Args:
            indices: [new batch], integer, or a bool mask over the rows. A row may come several times.

        Raises:
            CapacityError: more rows than there is room for; nothing is changed.
        """
        self.abandon()
        if self.pool is None:
            return
        batch = len(self.sequences)
        order: list[int] = torch.arange(batch)[indices.cpu()].tolist()
        self._check_room(self.pool.stats().sequences - batch + len(order))
        sequences, taken = [], set()
        for row in order:
            sequence = self.sequences[row]
            sequences.append(self.pool.fork(sequence) if row in taken else sequence)
            taken.add(row)
        for row in set(range(batch)) - taken:
            self.pool.free(self.sequences[row])
        self._hold_on(sequences)
        if self.padding is not None:
            self.padding = tuple(self.padding[row] for row in order)
        if self.stored is not None:
            self.stored = self.stored[order]


def _free(pool: Pool, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        # One that a broken forward pass left in its step is given back with the pool.
        with contextlib.suppress(KvarnError):
            pool.free(sequence)
