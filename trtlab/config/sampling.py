"""How the next token of a request is chosen: frozen, validated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trtlab.config.base import Settings, check_types
from trtlab.config.model import require_positive
from trtlab.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams(Settings):
    """How the next token is chosen; with none of temperature, top_k and top_p given, greedily.

    ``temperature`` divides the logits, then ``top_k`` keeps the k best and ``top_p`` the smallest set whose
    probability reaches p (Holtzman et al., arXiv:1904.09751). ``repetition_penalty`` divides positive and multiplies
    negative logits of tokens already seen (Keskar et al., arXiv:1909.05858). ``stop`` words end the text before
    them. ``logprobs`` keeps the log-probability of each chosen token, before temperature and filtering.
    """

    max_new_tokens: int = 32
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: Sequence[str] | str | None = ()
    seed: int | None = None
    logprobs: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        require_positive("SamplingParams", max_new_tokens=self.max_new_tokens)
        check_types(self)
        object.__setattr__(self, "stop", tuple(stop))
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ConfigError(
                "temperature must be finite and not negative", got=self.temperature, remedy="0 takes the best token"
            )
        if self.top_k is not None and self.top_k < 0:
            raise ConfigError("top_k must not be negative", got=self.top_k, remedy="0 keeps every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top_p must lie in (0, 1]", got=self.top_p, remedy="1 keeps every token")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                "repetition_penalty must be positive and finite",
                got=self.repetition_penalty,
                remedy="1 changes nothing",
            )
        if "" in stop:
            raise ConfigError("an empty stop word would stop at once", got=self.stop, remedy="leave it out")

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        chosen = (self.temperature, self.top_k, self.top_p)
        return chosen == (None, None, None) or self.temperature == 0 or self.top_k == 1
