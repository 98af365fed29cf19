"""Chooses the next token of each row of logits. Knows no text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trtlab.config.sampling import SamplingParams
from trtlab.runtime.request_state import RequestState

NOT_A_NUMBER = "the logits hold no best token: one is not a number"


def sample(logits: Tensor, requests: list[RequestState]) -> list[tuple[int, float | None]]:
    """Choose the next token of each request.

    Args:
        logits: [requests, vocab], float32.
        requests: The requests of the rows.

    Returns:
        Each request's token, with its natural log-probability if the request's params ask for it, else None.

    Raises:
        ValueError: when a row holds a value that is not a number, or no probabilities.
    """
    if all(request.plain for request in requests):
        return [(token, None) for token in _best(logits)]
    # All weights are computed, and bad rows raise, before any generator advances: a retry then draws the same tokens.
    weights = [_weights(row, request) for row, request in zip(logits, requests, strict=True)]
    tokens = [_choose(row, request) for row, request in zip(weights, requests, strict=True)]
    return [
        (token, float(row.log_softmax(-1)[token]) if request.params.logprobs else None)
        for token, row, request in zip(tokens, logits, requests, strict=True)
    ]


def _best(logits: Tensor) -> list[int]:
    """The best token of each row; ValueError if a row holds NaN, which max and argmax rank above all numbers."""
    if logits.device.type == "cpu":
        rows = logits.numpy()  # NumPy's argmax is faster than torch's
        tokens = rows.argmax(-1)
        top = rows[np.arange(len(rows)), tokens]
    else:
        top, tokens = torch.stack([part.double() for part in logits.max(-1)]).cpu().numpy()  # one copy to the CPU
    if np.isnan(top).any():
        raise ValueError(NOT_A_NUMBER)
    return tokens.astype(int).tolist()  # type: ignore[no-any-return]


def _weights(row: Tensor, request: RequestState) -> Tensor:
    """What a token is chosen from, ``[vocab]``: scores for a greedy request, else probabilities."""
    params = request.params
    scores = penalize(row, request.token_ids, params.repetition_penalty)
    if params.greedy:
        if scores.isnan().any():
            raise ValueError(NOT_A_NUMBER)
        return scores
    probabilities = filtered_probabilities(scores, params).cpu()
    if probabilities.isnan().any():
        raise ValueError("the logits hold no probabilities: one is infinite or not a number")
    return probabilities


def _choose(weights: Tensor, request: RequestState) -> int:
    if request.params.greedy:
        return int(weights.argmax())
    if request.generator is None:
        request.generator = torch.Generator()
        if request.params.seed is not None:
            request.generator.manual_seed(request.params.seed)
        else:
            request.generator.seed()
    return int(torch.multinomial(weights, 1, generator=request.generator))


def penalize(row: Tensor, seen: list[int], penalty: float) -> Tensor:
    """Logits ``[vocab]`` with those of seen tokens divided (positive) or multiplied (negative) by the penalty."""
    if penalty == 1:
        return row
    index = torch.tensor(sorted(set(seen)), device=row.device)
    values = row[index]
    limit = torch.finfo(row.dtype).max
    finite = values.isfinite()  # a strong penalty gives a large number, not infinity, which would have no probability
    penalized = torch.where(values > 0, values / penalty, values * penalty)
    return row.scatter(0, index, torch.where(finite, penalized.clamp(-limit, limit), penalized))


def filtered_probabilities(scores: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities ``[vocab]`` after temperature, then top-k, then top-p, in Hugging Face's order."""
    if params.temperature is not None:
        scores = (scores - scores.max()) / params.temperature  # shifted, so that a small temperature cannot overflow
    if params.top_k:
        kept = min(params.top_k, scores.shape[-1])
        scores = scores.masked_fill(scores < scores.topk(kept).values[-1], -torch.inf)
    if params.top_p is not None and params.top_p < 1:
        ordered, index = scores.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # the total probability of better tokens
        scores = scores.scatter(0, index[before >= params.top_p], -torch.inf)
    return scores.softmax(-1)
