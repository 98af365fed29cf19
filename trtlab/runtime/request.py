"""One request on its way: its prompt, what it has generated, where it stands. Knows tokens, not text."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from trtlab.config import SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt and its answer so far. ``past`` counts the tokens whose K and V are cached."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    end_ids: frozenset[int] = frozenset()
    slot: int | None = None
    past: int = 0
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    generator: torch.Generator | None = None

    @property
    def total(self) -> int:
        """Tokens known so far, prompt and answer."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def done(self) -> bool:
        """Whether no further token will come."""
        return self.finish_reason is not None

    def pending(self, limit: int) -> tuple[int, ...]:
        """The next tokens to compute, at most ``limit``: the rest of the prompt, or the last token generated."""
        if self.past < len(self.prompt_ids):
            return self.prompt_ids[self.past : self.past + limit]
        return tuple(self.output_ids[self.past - len(self.prompt_ids) :])

    def accept(self, token: int, logprob: float | None) -> None:
        """One more token of the answer; the end token and the length bound finish the request."""
        if token in self.end_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
            return
        self.output_ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if len(self.output_ids) >= self.params.max_new_tokens:
            self.finish_reason = "length"
