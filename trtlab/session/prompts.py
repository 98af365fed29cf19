"""Turns prompts into token ids, and refuses those that an engine cannot serve. Runs nothing."""

from __future__ import annotations

import operator
from collections import abc
from collections.abc import Sequence

from trtlab.config.sampling import SamplingParams
from trtlab.config.session import SessionConfig
from trtlab.errors import RequestError
from trtlab.runtime.tokenizer import Message, Tokenizer
from trtlab.session.runnable_engine import RunnableEngine
from trtlab.validation import require

Prompt = str | Sequence[int] | Sequence[Message]


class Prompts:
    """Checks prompts and parameters against one engine's bounds and vocabulary."""

    def __init__(self, engine: RunnableEngine, config: SessionConfig, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self._config = config
        self._tokenizer = tokenizer

    def checked(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        """The prompt's token ids; RequestError when this engine cannot serve it."""
        if params.stop and self._tokenizer is None:
            raise RequestError(
                "stop words need a tokenizer", remedy="leave stop out, or put tokenizer.json in the folder"
            )
        ids = self.checked_ids(self._ids(prompt))
        self.refuse_beyond_bounds(ids, params)
        return ids

    def refuse_beyond_bounds(self, ids: tuple[int, ...], params: SamplingParams) -> None:
        """Raise RequestError when the engine's bounds hold too little for these ids and their answer."""
        build = self._engine.build_config
        room = build.seq_len - len(ids)
        if params.max_new_tokens > room:
            shorter = f"lower max_new_tokens to {room}" if room else "shorten the prompt"
            raise RequestError(
                f"prompt of {len(ids)} and max_new_tokens {params.max_new_tokens} exceed max_seq_len {build.seq_len}",
                remedy=f"{shorter}, or build with a larger max_seq_len",
            )
        if len(ids) > build.max_num_tokens and not self._config.enable_chunked_context:
            raise RequestError(
                f"prompt of {len(ids)} tokens exceeds max_num_tokens {build.max_num_tokens}",
                remedy="set SessionConfig(enable_chunked_context=True), or build with a larger max_num_tokens",
            )

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty", remedy="give at least one character")
            return self.require_tokenizer().encode(prompt)
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], abc.Mapping):
            return self.require_tokenizer().encode_chat(prompt)  # type: ignore[arg-type]
        return prompt  # type: ignore[return-value]

    def checked_ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The ids as a tuple of int; RequestError for none, too many, or one outside the vocabulary."""
        try:
            ids = tuple(operator.index(token) for token in token_ids)
        except TypeError as error:
            raise RequestError(
                f"the prompt cannot be read as token ids: {error}", remedy="give a str, or a list of int"
            ) from error
        vocab, limit = self._engine.config.vocab_size, self._engine.build_config.input_len
        if not ids:
            raise RequestError("the prompt is empty", remedy="give at least one token")
        outside = next((token for token in ids if not 0 <= token < vocab), None)
        if outside is not None:
            raise RequestError(
                f"token id {outside} is outside the vocabulary",
                expected=f"0 to {vocab - 1}",
                remedy="use this engine's own tokenizer: session.encode(text)",
            )
        if len(ids) > limit:
            raise RequestError(
                f"prompt of {len(ids)} tokens exceeds max_input_len {limit}",
                remedy="shorten the prompt, or build with a larger max_input_len",
            )
        return ids

    def require_tokenizer(self) -> Tokenizer:
        """The engine's tokenizer; RequestError without one."""
        if self._tokenizer is None:
            raise RequestError(
                "this engine has no tokenizer", remedy="give token ids, or put tokenizer.json in its folder"
            )
        return self._tokenizer


def checked_params(params: SamplingParams | None) -> SamplingParams:
    """The params, or the defaults for None; ConfigError for anything else."""
    return require(SamplingParams, SamplingParams() if params is None else params, "SamplingParams(max_new_tokens=32)")


def is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt (str, list, array or tensor of ids, conversation), and not a list of prompts."""
    if isinstance(prompts, abc.Mapping) or not hasattr(prompts, "__len__"):
        raise RequestError(
            "unknown kind of prompt",
            got=repr(prompts),
            expected="a str, token ids, a list of messages, or a list of prompts",
        )
    if isinstance(prompts, str) or len(prompts) == 0:
        return True
    first = prompts[0]
    return isinstance(first, abc.Mapping) or (hasattr(first, "__index__") and getattr(first, "ndim", 0) == 0)
