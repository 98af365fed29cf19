"""The fourth object of the workflow: takes prompts, runs the engine step by step, gives text."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from trtlab.config import SamplingParams, SessionConfig
from trtlab.display.card import Shown
from trtlab.engine import Engine
from trtlab.errors import RequestError
from trtlab.runtime.executor import Chunk, Executor, StepInputs
from trtlab.runtime.request import Request
from trtlab.runtime.sampler import sample
from trtlab.runtime.scheduler import Scheduler
from trtlab.runtime.streaming import TextStream
from trtlab.runtime.tokenizer import Message, Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, repr=False)
class Completion(Shown):
    """One finished answer. ``finish_reason`` is ``"stop"`` (end token, or ``stop_reason``) or ``"length"``.

    ``logprobs`` are natural logarithms, one a token, None unless asked for. ``text`` is empty without a tokenizer.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    stop_reason: str | None = None
    logprobs: tuple[float, ...] | None = None


class Session(Shown):
    """Generates with one engine. Use it as a context manager, or call ``close()``.

    Two sessions can live side by side: nothing is shared but the engine's weights on disk.
    """

    def __init__(self, engine: Engine, executor: Executor, config: SessionConfig, reason: str) -> None:
        self.engine = engine
        self.config = config
        self.backend_reason = reason
        self._executor = executor
        self._scheduler = Scheduler(engine.build_config.max_batch_size, engine.build_config.max_num_tokens)
        self._tokenizer = Tokenizer(engine.tokenizer_dir) if engine.tokenizer_dir else None
        self._answers: dict[Request, _Answer] = {}
        self.closed = False

    @property
    def backend(self) -> str:
        """Which executor runs: tensorrt, torch or interpreter."""
        return self._executor.name

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._scheduler.waiting)

    @overload
    def generate(self, prompts: str, params: SamplingParams | None = None) -> Completion: ...  # type: ignore[overload-overlap]
    @overload
    def generate(
        self, prompts: Sequence[int] | Sequence[Message], params: SamplingParams | None = None
    ) -> Completion: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]: ...

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> Completion | list[Completion]:
        """Answer one prompt or many; many run together and come back in their order.

        A prompt is text, token ids, or a conversation (``[{"role": "user", "content": ...}]``, by the tokenizer's
        chat template). Raises RequestError for an empty prompt, an id outside the vocabulary, or a request beyond
        the engine's bounds, before anything runs.
        """
        one = _is_single(prompts)
        batch: Sequence[Any] = [prompts] if one else prompts
        requests = [self._request(prompt, params or SamplingParams()) for prompt in batch]
        answers = [self._submit(request) for request in requests]
        try:
            while not all(answer.request.done for answer in answers):
                self.step()
        finally:
            self._withdraw(answers)
        completions = [answer.completion() for answer in answers]
        return completions[0] if one else completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The answer's text as it comes; the pieces join to exactly ``generate``'s text. Arguments as for it."""
        request = self._request(prompt, params or SamplingParams())
        if self._tokenizer is None:
            raise RequestError("streaming text needs a tokenizer", remedy="use generate() for token ids")
        return self._pieces(request)

    def _pieces(self, request: Request) -> Iterator[str]:
        """The request joins at the first ``next``, so that a stream which nobody reads takes no slot."""
        answer = self._submit(request)
        try:
            while not request.done:
                self.step()
                if piece := answer.take():
                    yield piece
            if piece := answer.take():  # another call finished the request between two pieces
                yield piece
        finally:
            self._withdraw([answer])

    def step(self) -> int:
        """Run one step for all requests under way; gives how many tokens it computed."""
        self._require_open()
        step = self._scheduler.next()
        if not step:
            return 0
        logits = self._executor.run(StepInputs([chunk for _, chunk in step]))
        ready = [row for row, (request, chunk) in enumerate(step) if chunk.past + len(chunk.token_ids) == request.total]
        chosen = sample(logits if len(ready) == len(step) else logits[ready], [step[row][0] for row in ready])
        for request, chunk in step:  # only now: a step that failed is run again by whoever goes on
            request.past += len(chunk.token_ids)
        for row, (token, logprob) in zip(ready, chosen, strict=True):
            self._accept(step[row][0], token, logprob)
        return sum(len(chunk.token_ids) for _, chunk in step)

    def _accept(self, request: Request, token: int, logprob: float | None) -> None:
        request.accept(token, logprob)
        self._answers[request].advance()
        if request.done:
            self._scheduler.release(request)
            del self._answers[request]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """The logits that follow each token of a prompt: [tokens, vocab], float32, on the CPU."""
        self._require_open()
        ids = self._checked_ids(token_ids)
        limit = self.engine.build_config.max_num_tokens
        with self._scheduler.borrowed_slot() as slot:
            parts = [
                self._executor.run(StepInputs([Chunk(slot, start, ids[start : start + limit])], every_token=True)).cpu()
                for start in range(0, len(ids), limit)
            ]
        return torch.cat(parts)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, special tokens in front as the model expects them."""
        return self._require_tokenizer().encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._require_tokenizer().decode(token_ids)

    def _submit(self, request: Request) -> _Answer:
        answer = _Answer(request, TextStream(self._tokenizer, request.params.stop) if self._tokenizer else None)
        self._answers[request] = answer
        self._scheduler.add(request)
        return answer

    def _withdraw(self, answers: Sequence[_Answer]) -> None:
        """Take out what an error or an abandoned stream left under way."""
        for answer in answers:
            if self._answers.pop(answer.request, None) is not None:
                self._scheduler.release(answer.request)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        self._require_open()
        if params.stop and self._tokenizer is None:
            raise RequestError(
                "stop words need a tokenizer", remedy="leave stop out, or put tokenizer.json in the folder"
            )
        ids = self._checked_ids(self._ids(prompt))
        build = self.engine.build_config
        room = build.seq_len - len(ids)
        if params.max_new_tokens > room:
            shorter = f"lower max_new_tokens to {room}" if room else "shorten the prompt"
            raise RequestError(
                f"prompt of {len(ids)} and max_new_tokens {params.max_new_tokens} exceed max_seq_len {build.seq_len}",
                remedy=f"{shorter}, or build with a larger max_seq_len",
            )
        if len(ids) > build.max_num_tokens and not self.config.enable_chunked_context:
            raise RequestError(
                f"prompt of {len(ids)} tokens exceeds max_num_tokens {build.max_num_tokens}",
                remedy="set SessionConfig(enable_chunked_context=True), or build with a larger max_num_tokens",
            )
        return Request(ids, params, self._tokenizer.end_ids if self._tokenizer else frozenset())

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty", remedy="give at least one character")
            return self._require_tokenizer().encode(prompt)
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            return self._require_tokenizer().encode_chat(prompt)  # type: ignore[arg-type]
        return prompt  # type: ignore[return-value]

    def _checked_ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        try:
            ids = tuple(operator.index(token) for token in token_ids)
        except TypeError as error:
            raise RequestError(
                f"this prompt is no sequence of token ids: {error}", remedy="give text, or a list of whole numbers"
            ) from error
        vocab, limit = self.engine.config.vocab_size, self.engine.build_config.max_input_len
        if not ids:
            raise RequestError("the prompt is empty", remedy="give at least one token")
        outside = next((token for token in ids if not 0 <= token < vocab), None)
        if outside is not None:
            raise RequestError(f"token id {outside} is outside the vocabulary", expected=f"0 to {vocab - 1}")
        if len(ids) > limit:
            raise RequestError(
                f"prompt of {len(ids)} tokens exceeds max_input_len {limit}",
                remedy="shorten the prompt, or build with a larger max_input_len",
            )
        return ids

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError(
                "this engine has no tokenizer", remedy="give token ids, or put tokenizer.json in its folder"
            )
        return self._tokenizer

    def _require_open(self) -> None:
        if self.closed:
            raise RequestError("this session is closed", remedy="open another with engine.session()")

    def close(self) -> None:
        """Free the weights and the cache; a second close is harmless."""
        self.closed = True
        self._executor.close()

    def __enter__(self) -> Session:
        self._require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Answer:
    """A request and its text. Tokens become text when a reader takes it, or at once when a stop word may end it."""

    def __init__(self, request: Request, stream: TextStream | None) -> None:
        self.request = request
        self._stream = stream
        self._read = 0  # tokens that the stream has seen
        self._fresh = ""  # text that nobody has taken yet

    def advance(self) -> None:
        """Look for stop words in what is new; a request that meets one is done."""
        if self.request.params.stop:
            self._fresh += self._settle()

    def take(self) -> str:
        """The text that has settled since the last call; all of it once the request is done."""
        piece, self._fresh = self._fresh + self._settle(), ""
        return piece

    def _settle(self) -> str:
        if self._stream is None:
            return ""
        new = self.request.output_ids[self._read :]
        self._read += len(new)
        piece = self._stream.feed(new)
        if self.request.done:
            piece += self._stream.finish()
        if self._stream.stopped_by is not None:
            self.request.finish_reason = "stop"
        return piece

    def completion(self) -> Completion:
        """The finished answer."""
        self.take()
        request = self.request
        assert request.finish_reason is not None, "the answer is finished"
        return Completion(
            request.prompt_ids,
            tuple(request.output_ids),
            self._stream.text if self._stream else "",
            request.finish_reason,
            self._stream.stopped_by if self._stream else None,
            tuple(request.logprobs) if request.params.logprobs else None,
        )


def _is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt: a text, ids (a list, an array, a tensor), or a conversation; not a list of such."""
    if isinstance(prompts, str) or len(prompts) == 0:
        return True
    first = prompts[0]
    return isinstance(first, Mapping) or (hasattr(first, "__index__") and getattr(first, "ndim", 0) == 0)
