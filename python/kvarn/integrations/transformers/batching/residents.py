"""The sequences of requests in the pool."""

from transformers.generation.continuous_batching import RequestState

import kvarn
from kvarn import Pool, prefix_keys


class Residents:
    """Which request has which sequence of a pool, and which tiles of it are published.

    Stands where transformers' scheduler has its cache.

    Args:
        pool: the pool.
        most: sequences that the pool has slots for.
        sharing: whether requests that begin alike share what they have in common.
    """

    # What the constructor of transformers' scheduler reads in 5.17.
    num_full_attention_groups = 1
    max_blocks_per_request = 0

    def __init__(self, pool: Pool, most: int, *, sharing: bool) -> None:
        self.pool = pool
        self.most = most
        self.sharing = sharing
        self.block_size = pool.cfg.group
        # In the order in which they began.
        self._sequences: dict[str, kvarn.Sequence] = {}
        self._published: dict[str, list[bytes]] = {}
        self._prompts: dict[str, list[bytes]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def __getitem__(self, request_id: str) -> kvarn.Sequence:
        return self._sequences[request_id]

    @property
    def present(self) -> list[str]:
        """Requests whose sequences are in the pool's memory, the oldest first."""
        return [name for name, sequence in self._sequences.items() if not sequence.offloaded]

    @property
    def away(self) -> list[str]:
        """Requests whose sequences are in host memory for lack of room, the oldest first."""
        return [name for name, sequence in self._sequences.items() if sequence.offloaded]

    @property
    def full(self) -> bool:
        """Whether there are slots for no more sequences."""
        return len(self.present) >= self.most

    def tiles(self, tokens: int) -> int:
        """Return the pages that a sequence of so many tokens has at most."""
        return -(-tokens // self.block_size)

    def keys(self, state: RequestState) -> list[bytes]:
        """Return the keys of the tiles of a prompt that can be shared; its last token has to be computed."""
        keys = self._prompts.get(state.request_id)
        if keys is None:
            keys = prefix_keys(state.initial_tokens[:-1], self.block_size) if self.sharing else []
            self._prompts[state.request_id] = keys
        return keys

    def begin(self, state: RequestState) -> int:
        """Make the sequence of a request; return how many tokens of the prompt others have computed."""
        request_id, keys = state.request_id, self.keys(state)
        sequence = self._sequences[request_id] = self.pool.create(keys)
        self._published[request_id] = keys[: sequence.length // self.block_size]
        return sequence.length

    def fork(self, request_id: str, child: str) -> None:
        """Make the sequence of a request that holds what another holds."""
        self._sequences[child] = self.pool.fork(self._sequences[request_id])
        self._published[child] = list(self._published[request_id])
        self._prompts[child] = self._prompts[request_id]

    def publish(self, state: RequestState) -> None:
        """Offer the tiles that the last step sealed to later requests."""
        sequence, keys = self._sequences[state.request_id], self._published[state.request_id]
        if self.sharing and sequence.sealed > len(keys):
            tokens = (state.initial_tokens + state.generated_tokens)[
                len(keys) * self.block_size : sequence.sealed * self.block_size
            ]
            keys += prefix_keys(tokens, self.block_size, parent=keys[-1] if keys else None)
            self.pool.publish(sequence, keys)

    def free_blocks(self, request_id: str) -> None:
        """Free a request's sequence, if it has one; named as transformers' scheduler calls it."""
        self._prompts.pop(request_id, None)
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            del self._published[request_id]
            self.pool.free(sequence)
