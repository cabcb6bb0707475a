"""Which requests take part in the next forward pass, with how many tokens."""

from collections.abc import Iterator

from transformers.generation.continuous_batching import RequestState, RequestStatus, Scheduler
from transformers.generation.continuous_batching.requests import FutureRequestState

from kvarn import CapacityError, ShapeError, StateError
from kvarn.integrations.transformers.batching.packed import PackedBatch, reading
from kvarn.integrations.transformers.batching.residents import Residents


def child_name(state: RequestState, number: int) -> str:
    """Return transformers' name for a further answer to a prompt."""
    return f"{state.request_id}__child#{number}"


class PoolScheduler(Scheduler):
    """transformers' scheduler of requests, over a pool.

    Requests that decode come first, then prompts that are begun, then those that wait, in the order in which
    they came (``"prefill_first"``: begun prompts before those that decode). A request waits until its prompt
    fits beside the others. Whoever finds no page later waits too; when nobody can go on, the youngest is
    offloaded to host memory, and comes back before others begin.

    Args:
        residents: the sequences of requests.
        longest: tokens of the longest sequence that the pool can hold.
        vocabulary: number of token ids.
        requests_per_step: most requests of a forward pass.
        prefill_first: whether prompts go before requests that decode.
    """

    def __init__(
        self,
        residents: Residents,
        *,
        longest: int,
        vocabulary: int,
        requests_per_step: int,
        prefill_first: bool,
    ) -> None:
        super().__init__(residents, 0.0, requests_per_step)  # type: ignore[arg-type]
        self.residents = residents
        self.longest = longest
        self.vocabulary = vocabulary
        self.prefill_first = prefill_first

    def reset(self) -> None:
        """Forget all requests; their sequences are the caller's to free."""
        super().reset()
        # Requests that can never go on, with the reason.
        self.failed: list[tuple[RequestState, Exception]] = []
        self.packed: PackedBatch | None = None

    def add_waiting_request(self, state: RequestState) -> None:
        """Take a request, or say why it can never be served.

        Raises:
            ShapeError: the prompt is empty, or holds a token id that the model does not have.
            CapacityError: prompt and new tokens are longer than the pool.
            StateError: a request of this id is being served.
        """
        name, prompt = state.request_id, state.initial_tokens
        if name in self.active_requests or name in self.waiting_requests:
            raise StateError(f"request {name!r}: expected another id, as one of this is being served")
        if not prompt:
            raise ShapeError(f"request {name!r} has 0 tokens: expected a prompt of at least 1")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < self.vocabulary:
                raise ShapeError(
                    f"request {name!r} has token id {token}: expected 0 to {self.vocabulary - 1}; use the "
                    "tokenizer of this model"
                )
        # The last new token is not stored.
        new = max(state.max_new_tokens or 1, 1) - 1
        if len(prompt) + new > self.longest:
            raise CapacityError(
                f"request {name!r} stores up to {len(prompt) + new} tokens ({len(prompt)} of the prompt): "
                f"expected at most {self.longest}, what the pool can hold of one request; make the "
                "KVarNBatching with more tokens, or lower max_new_tokens"
            )
        super().add_waiting_request(state)

    def finish_request(self, request_id: str) -> None:
        """Forget a request and free its sequence."""
        super().finish_request(request_id)
        if self.waiting_requests.pop(request_id, None) is not None:
            self.waiting_requests_order.remove(request_id)

    def schedule_batch(
        self, token_budget: int, cache_budget: int = 0
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        """Choose the requests of the next forward pass and open its steps.

        Args:
            token_budget: most tokens of the pass.
            cache_budget: not read; the pool says what fits.

        Returns:
            The requests in the order of their tokens, none if nobody can go on; False; their tokens; 0. The
            steps are in `packed`, and whoever can never go on in `failed`.
        """
        self._bring_back()
        chosen = self._open(list(self._choose(token_budget)))
        batch = [self._take(state, count) for state, count in chosen]
        return batch, False, sum(count for _, count in chosen), 0

    def _candidates(self) -> list[RequestState]:
        decoding: list[RequestState] = []
        begun: list[RequestState] = []
        for state in self.active_requests.values():
            if not self.residents[state.request_id].offloaded:
                (decoding if state.status == RequestStatus.DECODING else begun).append(state)
        waiting = [self.waiting_requests[name] for name in self.waiting_requests_order]
        return (begun + decoding if self.prefill_first else decoding + begun) + waiting

    def _choose(self, budget: int) -> Iterator[tuple[RequestState, int]]:
        """Yield requests that may take part, the most important first, and how many tokens of each."""
        candidates = self._candidates()
        computed: set[bytes] = set()
        places = self.max_requests_per_batch
        for state in candidates:
            if not budget or not places:
                return
            if state.request_id not in self.residents:
                # What another computes in this pass is there, and shared, for the next.
                keys = self.residents.keys(state)
                found = self.residents.pool.match_prefix(keys)
                if found < len(keys) and keys[found] in computed:
                    continue
                if not self._begin(state, found):
                    return
            tokens = state.tokens_to_process
            if state.status != RequestStatus.DECODING:
                tokens = state.remaining_prefill_tokens
                if state.num_children and len(tokens) == 1:
                    candidates += self._fork(state)
            # Children start with all but the last token.
            count = min(budget, len(tokens) - bool(state.num_children))
            if state.status != RequestStatus.DECODING:
                computed.update(self.residents.keys(state))
            budget -= count
            places -= 1
            yield state, count

    def _begin(self, state: RequestState, found: int) -> bool:
        """Make the sequence of a waiting request, if there is room for its prompt beside the others.

        Args:
            state: the request.
            found: tiles of its prompt that are published.
        """
        residents = self.residents
        if residents.full or residents.away:
            return False
        # Prompts that are begun take their pages first, and every request may soon need one more.
        others = [self.active_requests[name] for name in residents.present]
        wanted = residents.tiles(len(state.initial_tokens)) - found
        wanted += sum(residents.tiles(len(other.remaining_prefill_tokens)) + 1 for other in others)
        if others and wanted > residents.pool.stats().pages_free:
            return False
        tokens = residents.begin(state)
        # Tiles that nobody held counted as free, and are held now.
        if others and wanted > residents.pool.stats().pages_free:
            residents.free_blocks(state.request_id)
            return False
        del state.remaining_prefill_tokens[:tokens]
        state.position_offset = tokens
        del self.waiting_requests[state.request_id]
        self.waiting_requests_order.remove(state.request_id)
        self.active_requests[state.request_id] = state
        return True

    def _fork(self, state: RequestState) -> list[RequestState]:
        """Return the further answers to a prompt whose last token comes next, as requests of their own."""
        children, state.num_children = state.num_children, 0
        forked = []
        for number in range(children):
            name = child_name(state, number)
            if self.residents.full:
                child = state.create_equivalent_initial_request()
                child.request_id = name
                self.waiting_requests[name] = child
                self.waiting_requests_order.append(name)
                continue
            self.residents.fork(state.request_id, name)
            self.active_requests[name] = child = state.fork(name)
            forked.append(child)
        return forked

    def _open(self, chosen: list[tuple[RequestState, int]]) -> list[tuple[RequestState, int]]:
        """Open the steps of the requests that there is room for, the most important first."""
        while chosen:
            kept = list(chosen)
            while kept:
                try:
                    self.packed = self._packed(kept)
                except CapacityError as error:
                    lack = error
                    del kept[self._fitting(kept)]
                else:
                    return sorted(kept, key=self._reading)
            first = chosen[0]
            if not self._make_room(first[0]):
                self.failed.append((first[0], lack))
                break
            chosen = [first]
        self.packed = None
        return []

    def _packed(self, chosen: list[tuple[RequestState, int]]) -> PackedBatch:
        ordered = sorted(chosen, key=self._reading)
        sequences = [self.residents[state.request_id] for state, _ in ordered]
        return PackedBatch(self.residents.pool, sequences, [count for _, count in ordered])

    def _fitting(self, chosen: list[tuple[RequestState, int]]) -> int:
        """Return how many of requests that do not all fit do, from the first on, by halving."""
        fit, too_many = 0, len(chosen)
        while too_many - fit > 1:
            half = (fit + too_many) // 2
            try:
                self._packed(chosen[:half]).abandon()
            except CapacityError:
                too_many = half
            else:
                fit = half
        return fit

    def _reading(self, entry: tuple[RequestState, int]) -> int:
        return reading(self.residents[entry[0].request_id].length, entry[1])

    def _make_room(self, keep: RequestState) -> bool:
        """Move the youngest sequence but that of `keep` out of the pool's memory."""
        others = [name for name in self.residents.present if name != keep.request_id]
        if not others:
            return False
        self.residents.pool.offload(self.residents[others[-1]])
        return True

    def _bring_back(self) -> None:
        """Restore offloaded sequences that there is room for, with a page more for everybody."""
        residents = self.residents
        for name in residents.away:
            present = residents.present
            sequence = residents[name]
            wanted = residents.tiles(sequence.length) + len(present) + 1
            if present and (residents.full or wanted > residents.pool.stats().pages_free):
                return
            try:
                residents.pool.restore(sequence)
            except CapacityError as error:
                if not present:
                    self.failed.append((self.active_requests[name], error))
                return

    def _take(self, state: RequestState, count: int) -> FutureRequestState:
        """Make the next `count` tokens of a request those to process."""
        if state.status != RequestStatus.DECODING:
            state.tokens_to_process = state.remaining_prefill_tokens[:count]
            state.remaining_prefill_tokens = state.remaining_prefill_tokens[count:]
            more = bool(state.remaining_prefill_tokens)
            state.status = RequestStatus.PREFILLING if more else RequestStatus.DECODING
        return FutureRequestState(state, not state.remaining_prefill_tokens, {}, count)
