"""The next token of each request of a batch."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import FutureRequestState


def next_tokens(
    logits: Tensor,
    newest: Tensor,
    batch: list[FutureRequestState],
    processors: Any,
    *,
    sample: bool,
    with_logprobs: bool,
) -> tuple[list[int], list[float] | None]:
    """Choose a token for each row of logits.

    Args:
        logits: [requests, vocabulary] of the requests of `batch` that have a new token.
        newest: the newest token of each, [requests].
        batch: all requests of the pass.
        processors: transformers' ContinuousBatchingLogitsProcessorList.
        sample: whether to draw the token; otherwise the likeliest is taken.
        with_logprobs: whether to return the logarithms of the tokens' probabilities.

    Returns:
        A token for each row, and its log-probability or None.
    """
    scores = logits.float()
    if processors.do_processing:
        rows = max(processors.tensors_required, 1)
        arguments = torch.zeros(rows, len(scores), dtype=torch.int32, device=scores.device)
        processors.prepare_tensor_args(batch, arguments)
        scores = processors(newest, scores, arguments)
    if sample:
        tokens = torch.multinomial(scores.softmax(-1), num_samples=1)
    else:
        tokens = scores.argmax(-1, keepdim=True)
    if not with_logprobs:
        return tokens[:, 0].tolist(), None
    logprobs = scores.log_softmax(-1).gather(1, tokens)
    # One transfer for both: float64 holds token ids exactly.
    both = torch.cat([tokens.double(), logprobs.double()], dim=1).tolist()
    return [int(token) for token, _ in both], [logprob for _, logprob in both]
