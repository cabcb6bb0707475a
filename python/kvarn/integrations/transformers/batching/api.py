"""The class that users make: a model that serves many prompts from one pool."""

import copy
import operator
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousMixin
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils.logging import tqdm

from kvarn import Config, ConfigError, DTypeError, KvarnError, LayerShape, Pool, StateError, capacity
from kvarn.integrations.transformers.batching.manager import PoolManager
from kvarn.integrations.transformers.batching.model import check_model, layer_shapes
from kvarn.integrations.transformers.batching.packed import HOLD
from kvarn.integrations.transformers.batching.processor import PoolProcessor
from kvarn.integrations.transformers.batching.residents import Residents
from kvarn.integrations.transformers.batching.scheduler import PoolScheduler
from kvarn.integrations.transformers.errors import UnsupportedError

# Tokens of a forward pass, where transformers is not told how many.
_STEP_TOKENS = 4096
# Of the memory that is free on a GPU; the rest is for activations and logits.
_SHARE = 0.8


class KVarNBatching(ContinuousMixin):
    """Serves many prompts at once by transformers' continuous batching, from one pool of KVarN records.

    It has the methods that models have for this, with the same arguments and results in every version of
    transformers: `generate_batch`, `continuous_batching_context_manager`, `init_continuous_batching`. Each
    request is a sequence of `pool`; nothing of transformers' own cache is allocated. Requests begin when
    there is room for their prompt, in the order in which they came, and leave when they are through; prompts
    that are longer than a forward pass are computed in several. Requests that begin with the same tiles share
    them, also with those that are through, until their pages are needed.

    A request gets the tokens that it gets alone from a `KVarNCache`, up to roundings; what is chunked or
    shared is read as records, as after a `prefill_chunk_size`. One that fails, or can never fit, has the
    reason in its ``error``, and the others go on. If they outgrow the pool, the youngest are offloaded to
    host memory and come back.

    Of a ContinuousBatchingConfig these fields count: max_batch_tokens (None: 4096), max_requests_per_batch,
    scheduler_type, allow_block_sharing, return_logprobs, seed, max_queue_size, per_request_processors and
    drop_unsupported_processors.

    Args:
        model: a causal language model of transformers on one device, in float16, bfloat16 or (on the CPU)
            float32, all of whose layers have full attention.
        preset: ``kvarn_k{bits}v{bits}_g{group}``, see `kvarn.presets`.
        tokens: tokens that the pool can hold, over all requests; None: what 80 % of the GPU's free memory
            can, on the CPU as many requests as there may be of the model's longest context (address space;
            memory is taken as tokens arrive).
        requests: most requests that are in the pool at the same time.
        refit: whether codes and scales are refitted after rounding, as in `kvarn.Config`.
        iterations: rounds of variance normalisation (KVarN, arXiv 2606.03458, Alg. 1).
        sink_tokens: tokens of 16 bit at the start of a sequence; None: a group.
        recent_tokens: committed tokens that stay in 16 bit.

    Attributes:
        model: the model.
        pool: the pool. After a change of the model's weights, or of its adapter, call ``pool.unpublish()``:
            what is shared was computed with the old ones.

    Raises:
        UnsupportedError: the model has layers of another kind, or is spread over several devices.
        ConfigError: the preset, or another argument, is not supported.
        CapacityError: not enough memory, or address space.
    """

    def __init__(
        self,
        model: Any,
        preset: str = "kvarn_k4v2_g128",
        *,
        tokens: int | None = None,
        requests: int = 64,
        refit: bool = True,
        iterations: int = 8,
        sink_tokens: int | None = None,
        recent_tokens: int = 0,
    ) -> None:
        for name, number in (("tokens", tokens), ("requests", requests)):
            if number is not None and number < 1:
                raise ConfigError(
                    f"{name} {number}: expected at least 1; pass how many the pool has room for"
                )
        check_model(model)
        shapes = layer_shapes(model)
        cfg = Config(
            preset,
            head_dim=shapes[0].head_dim,
            refit=refit,
            iterations=iterations,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
        )
        self.model = model
        self.requests = requests
        # Tiles being sealed and the new tail have slots at the same time while a step is open.
        tail = -(-(recent_tokens + cfg.group + HOLD - 1) // cfg.group)
        self.pool = Pool(
            cfg,
            layers=shapes,
            pages=_pages(model, cfg, shapes, tokens, requests),
            slots=requests * ((cfg.sink_tokens > 0) + 2 * tail),
            dtype=model.dtype,
            device=str(model.device),
        )
        self._manager: weakref.ref[PoolManager] | None = None

    @property
    def generation_config(self) -> GenerationConfig:  # type: ignore[override]
        """The model's, which counts where a call gives none."""
        config: GenerationConfig = self.model.generation_config
        return config

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the pool can hold: prompt and all but the last new token."""
        cfg, pages = self.pool.cfg, self.pool.stats().pages
        # A tile that is a sink as a whole has no page, nor has the tail.
        return (pages + (cfg.sink_tokens == cfg.group) + 1) * cfg.group + cfg.recent_tokens - 1

    @torch.no_grad()
    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: object = None,
    ) -> PoolManager:
        """Make a manager: `start` it, `add_request`, iterate over it or `get_result`, `stop` it.

        Args:
            generation_config: how to generate; None: the model's.
            continuous_batching_config: how to batch; None: the default.
            workload_hints: not read, as the pool has its size.

        Raises:
            StateError: a manager of this object is running.
            UnsupportedError: beams, or a way to batch that this class does not have.
        """
        manager = None if self._manager is None else self._manager()
        if manager is not None and manager.is_running():
            raise StateError("a manager of this KVarNBatching is running: expected one at a time; stop() it")
        generation = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        if (generation.num_beams or 1) > 1:
            raise UnsupportedError(
                f"num_beams {generation.num_beams}: expected 1; use generate() with a KVarNCache for beams"
            )
        config = (
            ContinuousBatchingConfig() if continuous_batching_config is None else continuous_batching_config
        )
        manager = PoolManager(self.model, generation, _checked(config), self._processor)
        self._manager = weakref.ref(manager)
        return manager

    def generate_batch(  # type: ignore[override]
        self,
        inputs: Iterable[Any],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *,
        max_new_tokens: int | None = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        **options: Any,
    ) -> dict[str, GenerationOutput]:
        """Serve prompts and wait for all of them.

        Args:
            inputs: token ids of each prompt: a list of integers, or a one-dimensional array or tensor.
            generation_config: how to generate; None: the model's.
            continuous_batching_config: how to batch; None: the default.
            max_new_tokens: most new tokens of each; None: as generation_config says, where None is no limit.
            record_timestamps: whether outputs have the time of each token.
            progress_bar: whether to show one.
            **options: of `continuous_batching_context_manager`.

        Returns:
            The outputs by request id, in the order of the prompts, further answers to a prompt
            (num_return_sequences) behind its first. Those that failed have the reason in ``error``, and what
            they had generated.

        Raises:
            DTypeError: a prompt is not token ids.
            StateError, UnsupportedError, ConfigError: as in `init_continuous_batching`.
        """
        prompts = [_token_ids(number, prompt) for number, prompt in enumerate(inputs)]
        results: dict[str, GenerationOutput] = {}
        running = self.continuous_batching_context_manager(
            generation_config=generation_config,
            continuous_batching_config=continuous_batching_config,
            **options,
        )
        with running as manager:
            answers = manager.num_return_sequences
            bar = tqdm(total=len(prompts) * answers, disable=not progress_bar, unit="request")
            try:
                names = manager.add_requests(
                    prompts, max_new_tokens=max_new_tokens, record_timestamps=record_timestamps
                )
                while len(results) < len(prompts) * answers:
                    output = manager.get_result(timeout=1)
                    if output is not None and output.is_finished():
                        results[output.request_id] = output
                        bar.update()
                    elif output is None and not manager.is_running():
                        raise KvarnError(f"{len(results)} requests came back: expected all; see the log")
            except BaseException:
                manager.stop(hard_stop=True)
                raise
            finally:
                bar.close()
        families = [[name, *(f"{name}__child#{number}" for number in range(answers - 1))] for name in names]
        return {name: results[name] for family in families for name in family}

    def _processor(self, manager: PoolManager) -> PoolProcessor:
        config = manager.continuous_batching_config
        assert config.max_requests_per_batch is not None
        assert config.max_batch_tokens is not None
        scheduler = PoolScheduler(
            Residents(self.pool, self.requests, sharing=config.allow_block_sharing),
            longest=self.longest,
            vocabulary=self.model.get_input_embeddings().weight.shape[0],
            requests_per_step=config.max_requests_per_batch,
            prefill_first=config.scheduler_type == "prefill_first",
        )
        return PoolProcessor(manager, scheduler, config.max_batch_tokens)


def _token_ids(number: int, prompt: Any) -> list[int]:
    """Return a prompt as a list of integers."""
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise DTypeError(
            f"prompt {number} of type {type(prompt).__name__}: expected token ids, integers in one "
            "dimension; tokenize it first"
        ) from None


def _checked(given: ContinuousBatchingConfig) -> ContinuousBatchingConfig:
    """Return a copy in which transformers decides nothing about its own cache.

    Raises:
        UnsupportedError: it asks for what this class does not have.
        ConfigError: a number is out of range, or the scheduler is not known.
    """
    config = copy.deepcopy(given)
    for name in ("use_async_batching", "use_cuda_graph", "varlen_compile_config", "decode_compile_config"):
        value = getattr(config, name)
        if value not in (None, False, (False, False)):
            raise UnsupportedError(
                f"{name} {value}: expected None; KVarNBatching plans each step on the host, leave it out"
            )
    if config.cpu_offload_space:
        raise UnsupportedError(
            f"cpu_offload_space {config.cpu_offload_space}: expected 0; the pool offloads by itself, leave "
            "it out"
        )
    if config.scheduler_type not in ("fifo", "prefill_first"):
        raise ConfigError(f"scheduler_type {config.scheduler_type!r}: expected 'fifo' or 'prefill_first'")
    if config.max_batch_tokens is None:
        config.max_batch_tokens = _STEP_TOKENS
    if config.max_batch_tokens < 1:
        raise ConfigError(
            f"max_batch_tokens {config.max_batch_tokens}: expected at least 1, or None for 4096"
        )
    config.use_async_batching, config.use_cuda_graph, config.max_blocks_per_request = False, False, 0
    config.default_compile_level = 0
    return config


def _pages(model: Any, cfg: Config, shapes: list[LayerShape], tokens: int | None, requests: int) -> int:
    """Return how many sealed tiles there is room for."""
    if tokens is None and model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return capacity(
            cfg,
            int(free * _SHARE),
            layers=shapes,
            sequences=requests,
            hold=HOLD,
            dtype=model.dtype,
            device=model.device,
        ).pages
    if tokens is None:
        context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if context is None:
            raise ConfigError(
                "tokens None: expected a number, as the model's config names no longest context"
            )
        tokens = requests * context
    return -(-tokens // cfg.group)
