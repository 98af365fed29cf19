"""The state of one request: its prompt, its answer so far, its slot and blocks. Knows tokens, not text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from trtlab.config.sampling import SamplingParams
from trtlab.runtime.blocks import Chain

PRIORITY_STEPS = 1000  # steps of waiting that equal one level of priority, so that no request waits for ever


@dataclass(eq=False)
class RequestState:
    """A prompt and its answer so far.

    ``past`` counts the tokens whose K and V are cached. ``deadline_s`` is a time of the session's clock. ``arrival`` is
    the number of the first step after the request came.
    """

    number: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    end_ids: frozenset[int] = frozenset()
    priority: int = 0
    arrival: int = 0
    deadline_s: float = math.inf
    slot: int | None = None
    past: int = 0
    reused: int = 0  # prompt tokens found in the cache when it was last admitted
    preemptions: int = 0
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None
    generator: torch.Generator | None = None
    stops: Mapping[int, int | str] = field(default_factory=dict)  # further ids that end it, and the reason to give
    plain: bool = field(init=False)  # greedy, without penalty or logprobs: an argmax of the logits is enough
    token_ids: list[int] = field(init=False)
    chain: Chain = field(init=False)

    def __post_init__(self) -> None:
        params = self.params
        self.plain = params.greedy and not params.logprobs and params.repetition_penalty == 1
        self.token_ids = list(self.prompt_ids)
        self.chain = Chain(self.number, self.token_ids)

    @property
    def key(self) -> tuple[int, int]:
        """Sort key: the request with the smallest key runs first. Late arrival and low priority make it larger."""
        return self.arrival - PRIORITY_STEPS * self.priority, self.number

    @property
    def output_ids(self) -> list[int]:
        """The answer so far."""
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def total(self) -> int:
        """Tokens known so far, prompt and answer."""
        return len(self.token_ids)

    @property
    def longest(self) -> int:
        """The most tokens that the request can have in the cache: its last token is never fed to the model."""
        return len(self.prompt_ids) + self.params.max_new_tokens - 1

    @property
    def generates(self) -> bool:
        """Whether its next step is a single new token: all others are cached."""
        return self.past + 1 == len(self.token_ids)

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return self.finish_reason is not None

    def accept(self, token: int, logprob: float | None) -> None:
        """Append a token to the answer; the end token and the length bound finish the request."""
        if token in self.stops or (token in self.end_ids and not self.params.ignore_eos):
            self.stop_reason = self.stops.get(token)
            self.finish_reason = "stop"
            return
        self.token_ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if len(self.token_ids) - len(self.prompt_ids) >= self.params.max_new_tokens:
            self.finish_reason = "length"
