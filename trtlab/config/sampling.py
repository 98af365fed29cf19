"""How the next token of a request is chosen: frozen, validated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from trtlab.config.base import (
    NotNegativeFloat,
    NotNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Seed,
    Settings,
    settings,
)

FLOAT32 = torch.finfo(torch.float32)  # the sampler's arithmetic
Word = Annotated[str, Field(min_length=1)]
TokenId = NotNegativeInt
NO_END = -1


def _as_words(stop: object) -> object:
    """A tuple of stop words from a single word or from None."""
    return () if stop is None else (stop,) if isinstance(stop, str) else stop


def _none_as_empty(stop: object) -> object:
    return () if stop is None else stop


def _in_float32(value: float) -> float:
    """The value if it is neither 0 nor infinite in float32, unless it is 0 itself."""
    if 0 < value < FLOAT32.tiny or value > FLOAT32.max:
        raise ValueError(f"a number from {FLOAT32.tiny:.3g} to {FLOAT32.max:.3g}, which float32 holds")
    return value


Float32 = AfterValidator(_in_float32)


@settings
class SamplingParams(Settings):
    """How the next token is chosen: greedily unless temperature, top_k or top_p is set."""

    max_new_tokens: PositiveInt = 32
    """Most tokens of an answer. TensorRT-LLM: ``max_output_len``, ``max_tokens``."""
    temperature: Annotated[NotNegativeFloat, Float32] | None = None
    """Divisor of the logits; 0 takes the best token. Above 1 flattens the choice, below 1 sharpens it."""
    top_k: NotNegativeInt | None = None
    """How many of the best tokens stay to choose from; 0 keeps every token. It comes after the temperature."""
    top_p: Annotated[PositiveShare, Float32] | None = None
    """Probability that the smallest set of best tokens must reach; 1 keeps every token.

    It comes after ``top_k`` (Holtzman et al., arXiv:1904.09751).
    """
    repetition_penalty: Annotated[PositiveFloat, Float32] = 1.0
    """Factor that makes tokens of the prompt and the answer less likely; 1 changes nothing.

    It divides their positive and multiplies their negative logits (Keskar et al., arXiv:1909.05858).
    """
    stop: Annotated[Sequence[Word] | Word | None, BeforeValidator(_as_words)] = ()
    """Words that end the text before them; an empty word would stop at once. TensorRT-LLM: ``stop_words``.

    A special token may be given by its text, ``"<|eot_id|>"``, although an answer's text has no special tokens.
    """
    seed: Seed | None = None
    """Seed of the random draw; None gives another draw each time. TensorRT-LLM: ``random_seed``."""
    logprobs: bool = False
    """Whether the log-probability of each chosen token is kept, before temperature and filtering."""
    ignore_eos: bool = False
    """Whether the answer continues after the model's end token, up to ``max_new_tokens``; ``stop`` still ends it."""
    stop_token_ids: Annotated[Sequence[TokenId] | None, BeforeValidator(_none_as_empty)] = ()
    """Token ids that end the answer before them, besides the model's own."""
    end_id: Annotated[int, Field(ge=NO_END, lt=2**63)] | None = None
    """The end token, in place of the model's own ones; -1 for none."""

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        chosen = (self.temperature, self.top_k, self.top_p)
        return chosen == (None, None, None) or self.temperature == 0 or self.top_k == 1
