"""transformers' manager of requests, over a pool."""

from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from kvarn.integrations.transformers.batching.attention import NAME
from kvarn.integrations.transformers.batching.processor import PoolProcessor


class PoolManager(ContinuousBatchingManager):
    """Takes requests and runs them in a thread; made by ``KVarNBatching.init_continuous_batching``.

    While the thread runs, the model's attention implementation is that of packed batches.

    Args:
        model: the model.
        generation_config: how to generate.
        config: what transformers is to be told of the batches.
        make: makes the processor of this manager.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        config: ContinuousBatchingConfig,
        make: Callable[["PoolManager"], PoolProcessor],
    ) -> None:
        self._make = make
        super().__init__(model, generation_config, config)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Nothing: `start` switches."""

    def start(self) -> None:
        """Switch the model to the attention of packed batches, and start the thread."""
        if not self.is_running():
            self._original_attn_impl = self.model.config._attn_implementation
            self.model.set_attn_implementation(NAME)
        super().start()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Stop the thread and give the model its attention implementation back.

        Args:
            block: whether to wait for the thread.
            timeout: most seconds to wait; None: until it has ended.
            keep_for_next_session: not read; pool and published prefixes stay with the `KVarNBatching`.
            hard_stop: whether requests that are not through fail, instead of being served first.
        """
        super().stop(block=block, timeout=timeout, hard_stop=hard_stop)

    def _create_batch_processor(self) -> Any:
        if self.batch_processor is None:
            return self._make(self)
        self.batch_processor.reset()
        return self.batch_processor
