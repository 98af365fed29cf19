"""Turns prompts into token ids, and refuses those that an engine cannot serve. Runs nothing."""

from __future__ import annotations

import operator
import warnings
from collections import abc
from collections.abc import Iterable, Sequence
from typing import Any

from trtlab.config.sampling import NO_END, SamplingParams
from trtlab.config.session import SessionConfig
from trtlab.errors import RequestError
from trtlab.runtime.chat_template import Message
from trtlab.runtime.tokenizer import Tokenizer
from trtlab.session.runnable_engine import RunnableEngine
from trtlab.validation import shorten

Prompt = str | Sequence[int] | Sequence[Message]

A_PROMPT = 'a str, a list of token ids, or a conversation: [{"role": "user", "content": "..."}]'


class Prompts:
    """Checks prompts and parameters against one engine's bounds and vocabulary."""

    def __init__(self, engine: RunnableEngine, config: SessionConfig, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self._config = config
        self._tokenizer = tokenizer

    @property
    def has_text(self) -> bool:
        """Whether there is a tokenizer that can be read."""
        return self._tokenizer is not None and self._tokenizer.problem is None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The engine's tokenizer; None without one, and, with a warning that says why, when it cannot be read."""
        if self._tokenizer is None or self.has_text:
            return self._tokenizer
        warnings.warn(f"the answers have no text: {self._tokenizer.problem}", RuntimeWarning, stacklevel=5)
        return None

    def require_tokenizer(self) -> Tokenizer:
        """The engine's tokenizer; RequestError without one, or when it cannot be read."""
        if self._tokenizer is None:
            raise RequestError(
                "this engine has no tokenizer", remedy="give token ids, or put tokenizer.json in its folder"
            )
        if self._tokenizer.problem is not None:
            raise self._tokenizer.problem
        return self._tokenizer

    def checked(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        """The prompt's token ids; RequestError when this engine cannot serve it."""
        if params.stop and self._tokenizer is None:
            raise RequestError(
                "stop words need a tokenizer",
                remedy="use stop_token_ids, or put tokenizer.json in the folder",
            )
        if params.stop:
            self.require_tokenizer()
        end = () if params.end_id is None or params.end_id == NO_END else (params.end_id,)
        self._refuse_outside((*(params.stop_token_ids or ()), *end), "stop_token_ids or end_id: token id")
        ids = self._ids(prompt)
        self.refuse_beyond_bounds(ids, params)
        return ids

    def end_ids(self, params: SamplingParams) -> frozenset[int]:
        """The model's own ids that end an answer, or the one that the params give in their place."""
        if params.end_id is not None:
            return frozenset({params.end_id} - {NO_END})
        return self._tokenizer.end_ids if self._tokenizer else frozenset()

    def stops(self, params: SamplingParams) -> dict[int, int | str]:
        """Further ids that end the answer, with the reason to give: the id, or the stop word that is its text."""
        special = self._tokenizer.special_texts if self._tokenizer and params.stop else {}
        words: dict[int, int | str] = {special[word]: word for word in params.stop or () if word in special}
        return {**words, **{number: number for number in params.stop_token_ids or ()}}

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

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        longest = self._engine.build_config.input_len
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty", remedy="give at least one character")
            return self.checked_ids(self.require_tokenizer().encode(prompt, longest))
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], abc.Mapping):
            return self.checked_ids(self.require_tokenizer().encode_chat(prompt, longest))  # type: ignore[arg-type]
        return self.checked_ids(prompt)  # type: ignore[arg-type]

    def checked_ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The ids as a tuple of int; RequestError for none, too many, or one outside the vocabulary."""
        _refuse_other_kinds(token_ids)
        limit = self._engine.build_config.input_len
        if len(token_ids) == 0:
            raise RequestError("the prompt is empty", remedy="give at least one token")
        if len(token_ids) > limit:
            raise RequestError(
                f"prompt of {len(token_ids)} tokens exceeds max_input_len {limit}",
                remedy="shorten the prompt, or build with a larger max_input_len",
            )
        return self.known_ids(token_ids)

    def known_ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The ids as a tuple of int; RequestError for what is none, or outside the vocabulary."""
        _refuse_other_kinds(token_ids)
        ids = as_ids(token_ids)
        self._refuse_outside(ids, "token id")
        return ids

    def _refuse_outside(self, ids: Iterable[int], what: str) -> None:
        vocab = self._engine.config.vocab_size
        outside = next((token for token in ids if not 0 <= token < vocab), None)
        if outside is not None:
            raise RequestError(
                f"{what} {outside} is outside the vocabulary",
                expected=f"0 to {vocab - 1}",
                remedy="use this engine's own tokenizer: session.encode(text)",
            )


def is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt (str, list, array or tensor of ids, conversation), and not a list of prompts."""
    if isinstance(prompts, str):
        return True
    _refuse_other_kinds(prompts)
    if len(prompts) == 0:
        raise RequestError(
            "there is no prompt in an empty list", expected=f"{A_PROMPT}; or a list of at least one of these"
        )
    if _is_array(prompts):
        return getattr(prompts, "ndim", 1) == 1
    first = prompts[0]
    return not isinstance(first, str | Sequence) and not (_is_array(first) and getattr(first, "ndim", 1) > 0)


def _refuse_other_kinds(prompt: Any) -> None:
    """Raise RequestError for what has no fixed order, and for sequences that hold no ids."""
    if _is_array(prompt):
        if not prompt.ndim:
            raise RequestError("a single number is no prompt", got=shorten(prompt), remedy="give a list of ids")
        if "int" not in str(prompt.dtype).lower():
            raise RequestError("token ids are integers", got=f"{type(prompt).__name__} of {prompt.dtype}")
    elif isinstance(prompt, bytes | bytearray | memoryview):
        raise RequestError("bytes are no prompt", got=shorten(prompt), remedy='decode them: prompt.decode("utf-8")')
    elif isinstance(prompt, abc.Mapping):
        raise RequestError("a dict is no prompt", got=shorten(prompt), expected=A_PROMPT, remedy="put it in a list")
    elif not isinstance(prompt, Sequence):
        raise RequestError("unknown kind of prompt", got=shorten(prompt), expected=f"{A_PROMPT}; or a list of these")


def _is_array(value: object) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "ndim") and hasattr(value, "tolist")


def as_ids(token_ids: Any) -> tuple[int, ...]:
    """Token ids as ints; RequestError for anything else."""
    try:
        if not _is_array(token_ids) and bool in set(map(type, token_ids)):
            raise TypeError("a bool is no token id")
        return tuple(map(operator.index, token_ids.tolist() if _is_array(token_ids) else token_ids))
    except TypeError as error:
        raise RequestError(
            f"the prompt cannot be read as token ids: {error}", remedy="give a str, or a list of int"
        ) from error
