"""The generation loop's work: a forward pass of many requests over one pool."""

import logging
from types import SimpleNamespace
from typing import Any

import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager, RequestState
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState

import kvarn
from kvarn.integrations.transformers.batching.packed import PackedBatch
from kvarn.integrations.transformers.batching.sampling import next_tokens
from kvarn.integrations.transformers.batching.scheduler import PoolScheduler, child_name

logger = logging.getLogger(__name__)


class PoolProcessor(ContinuousBatchProcessor):
    """Runs the requests of a manager in the sequences of a pool.

    transformers' class allocates its own cache in its constructor, which is not called; of its methods those
    remain that talk to the manager.

    Args:
        manager: the manager, whose queues are read.
        scheduler: chooses the requests.
        tokens_per_step: most tokens of a forward pass.
    """

    use_async_batching = False

    def __init__(
        self, manager: ContinuousBatchingManager, scheduler: PoolScheduler, tokens_per_step: int
    ) -> None:
        self.scheduler: PoolScheduler = scheduler
        self.max_batch_tokens = tokens_per_step
        self.cb_config = manager.continuous_batching_config
        self.logit_processor = manager.logit_processor
        self.input_queue = manager.input_queue
        self.cancel_queue = manager.cancel_queue
        self.output_router = manager.output_router
        self.background_thread_status = manager.background_thread_status
        self.distributed_helper = manager.distributed_helper
        self.model_device = manager.model.device
        self.do_sample = bool(manager.generation_config.do_sample)
        self.return_logprobs = self.cb_config.return_logprobs
        self.distributed_helper.set_tp_seed(self.cb_config.seed, self.model_device)
        # Work goes to the current stream; the manager asks for another.
        self.inputs_and_outputs: Any = SimpleNamespace(compute_stream=None)
        self._batch: list[FutureRequestState] = []
        self._done: list[tuple[list[FutureRequestState], list[int], list[float] | None]] = []
        self._failed: list[tuple[RequestState, Exception]] = []

    def __repr__(self) -> str:
        active, waiting = self.scheduler.active_requests, self.scheduler.waiting_requests
        return f"<PoolProcessor, {len(active)} requests begun, {len(waiting)} waiting>"

    def __del__(self) -> None:
        """Nothing: the pool outlives the processor."""

    def reset(self) -> None:
        """Forget all requests."""
        for name in [*self.scheduler.active_requests, *self.scheduler.waiting_requests]:
            self.scheduler.finish_request(name)
        self.scheduler.reset()

    def warmup(self, model: Any) -> None:
        """Load kvarn's kernels."""
        if model.device.type == "cuda":
            kvarn.warmup(model.device)

    def prepare_next_batch(self) -> bool:
        """Take new requests in, and open the steps of the next forward pass.

        Returns:
            Whether there is one.
        """
        if self._update_tp_group_state():
            return False
        self.scheduler.clear_cancelled_requests()
        while self.scheduler.has_pending_requests():
            batch, *_ = self.scheduler.schedule_batch(self.max_batch_tokens)
            failed, self.scheduler.failed = self.scheduler.failed, []
            for state, error in failed:
                self._fail(state, error)
            if batch:
                self._batch = batch
                return True
            if not failed:
                return False
        return False

    @torch.no_grad()
    def _generation_step(self, model: Any) -> None:
        """Run the forward pass."""
        packed, self.scheduler.packed = self.scheduler.packed, None
        assert packed is not None
        self._run(model, self._batch, packed)

    def _run(self, model: Any, batch: list[FutureRequestState], packed: PackedBatch | None = None) -> None:
        """Run requests together; if that fails, in two halves, so that only who fails alone is lost."""
        try:
            if packed is None:
                packed = self._open(batch)
            tokens, logprobs = self._forward(model, batch, packed)
            packed.finish()
            self._done.append((batch, tokens, logprobs))
            return
        except Exception as error:
            if packed is not None:
                packed.abandon()
            if len(batch) == 1:
                logger.exception("request %r failed", batch[0].state.request_id)
                self._failed.append((batch[0].state, error))
                return
        half = len(batch) // 2
        self._run(model, batch[:half])
        self._run(model, batch[half:])

    def _open(self, batch: list[FutureRequestState]) -> PackedBatch:
        residents = self.scheduler.residents
        sequences = [residents[future.state.request_id] for future in batch]
        return PackedBatch(residents.pool, sequences, [future.query_length for future in batch])

    def _forward(
        self, model: Any, batch: list[FutureRequestState], packed: PackedBatch
    ) -> tuple[list[int], list[float] | None]:
        """Return a new token, and perhaps its log-probability, of each request whose prompt is through."""
        ids: list[int] = []
        positions: list[int] = []
        newest: list[int] = []
        for future in batch:
            first = future.state.position_offset
            ids += future.state.tokens_to_process
            positions += range(first, first + future.query_length)
            if future.has_new_token:
                newest.append(len(ids) - 1)
        # One transfer for all three.
        inputs = torch.tensor([*ids, *positions, *newest], device=self.model_device)
        input_ids, position_ids, last = torch.split(inputs, [len(ids), len(ids), len(newest)])
        options = {"logits_to_keep": last} if model._supports_logits_to_keep() else {}
        logits = model(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            use_cache=False,
            cache=packed,
            **options,
        ).logits[0]
        if not newest:
            return [], None
        return next_tokens(
            logits if options else logits[last],
            input_ids[last],
            batch,
            self.logit_processor,
            sample=self.do_sample,
            with_logprobs=self.return_logprobs,
        )

    def update_batch(self) -> None:
        """Give requests their tokens, deliver those that are through, and free their sequences."""
        outputs = []
        done, self._done = self._done, []
        for batch, tokens, logprobs in done:
            at = 0
            for future in batch:
                state = future.state
                state.position_offset += future.query_length
                finished = False
                if future.has_new_token:
                    logprob = None if logprobs is None else logprobs[at]
                    finished = state.update_and_check_completion(tokens[at], logprob)
                    at += 1
                self.scheduler.residents.publish(state)
                if finished:
                    self.scheduler.finish_request(state.request_id)
                if finished or (future.has_new_token and state.streaming):
                    outputs.append(state.to_generation_output())  # type: ignore[no-untyped-call]
        self.output_router.deliver_batch(outputs)
        failed, self._failed = self._failed, []
        for state, error in failed:
            self._fail(state, error)

    def _handle_request_error(self, error: Exception, state: RequestState) -> None:
        """Deliver a failed request, and with it the answers to its prompt that did not begin."""
        super()._handle_request_error(error, state)
        for number in range(state.num_children):
            child = state.create_equivalent_initial_request()
            child.request_id = child_name(state, number)
            self.output_router.fail_and_deliver(child, error)

    def _fail(self, state: RequestState, error: Exception) -> None:
        self._handle_request_error(error, state)
        self.scheduler.finish_request(state.request_id)

    def fail_all_requests(self, error: Exception) -> None:
        """Fail all requests, begun or waiting, and free their sequences."""
        if self.scheduler.packed is not None:
            self.scheduler.packed.abandon()
        waiting = self.scheduler.waiting_requests.values()
        for state in [*self.scheduler.active_requests.values(), *waiting]:
            self._fail(state, error)
