"""Session, the fourth object of the workflow: takes prompts, runs the engine step by step, returns text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, overload

import torch
from torch import Tensor

from trtlab.card import Shown
from trtlab.config.base import PositiveFloat
from trtlab.config.calls import public
from trtlab.config.sampling import SamplingParams
from trtlab.config.session import SessionConfig
from trtlab.errors import RequestError
from trtlab.runtime.backend import Backend
from trtlab.runtime.chat_template import Message
from trtlab.runtime.events import EventLog, StepEvent
from trtlab.runtime.kv_cache_view import KvCache
from trtlab.runtime.loop import Loop
from trtlab.runtime.request_state import RequestState
from trtlab.runtime.step_thread import StepThread
from trtlab.runtime.text_stream import TextStream
from trtlab.runtime.tokenizer import Tokenizer
from trtlab.session.prompts import Prompt, Prompts, is_single
from trtlab.session.request import Completion, Request, cancel_all
from trtlab.session.runnable_engine import RunnableEngine


@public
class Session(Shown):
    """Generates with one engine. Use it as a context manager, or call ``close()``.

    Several sessions can be open at once: they share nothing but the engine's weights on disk.
    """

    def __init__(self, engine: RunnableEngine, backend: Backend, config: SessionConfig, reason: str) -> None:
        self.engine = engine
        self.config = config
        self.backend_reason = reason
        self._prompts = Prompts(engine, config, Tokenizer(engine.tokenizer_path) if engine.tokenizer_path else None)
        self._loop = Loop(backend, engine.build_config, config)
        self._numbers = itertools.count(1)
        self._thread = StepThread()

    @property
    def backend(self) -> str:
        """The backend that runs the engine: ``tensorrt``, ``torch`` or ``interpreter``."""
        return self._loop.backend.name

    @property
    def device(self) -> torch.device:
        """Where the steps run: the CPU, or one GPU."""
        return self._loop.backend.device

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._loop.scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot or for blocks."""
        return self._loop.waiting

    @property
    def kv_cache(self) -> KvCache:
        """A live view of the pool of KV blocks: its size and the reason for it, each request's blocks, the reuse."""
        return self._loop.kv_cache

    @property
    def events(self) -> EventLog:
        """What every step did, oldest first."""
        return self._loop.events

    @property
    def has_text(self) -> bool:
        """Whether answers have text: the engine's folder holds a tokenizer, and it can be read."""
        return self._prompts.has_text

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._loop.closed

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
        """Answer one prompt or a list of prompts; the prompts of a list run together.

        Args:
            prompts: A prompt or a list of them. A prompt is a str, token ids, or a conversation
                (``[{"role": "user", "content": ...}]``), which the tokenizer's chat template turns into text.
            params: How to sample, the same for all prompts; None for ``SamplingParams()``.

        Returns:
            One Completion for one prompt; for a list of prompts, a list in the same order.

        Raises:
            RequestError: before anything runs, for an empty prompt, an id outside the vocabulary, or a request beyond
                the engine's bounds or the KV pool.
        """
        params = SamplingParams() if params is None else params
        single = is_single(prompts)
        batch: Sequence[Any] = [prompts] if single else prompts
        token_ids = [self._checked(prompt, params) for prompt in batch]
        requests = [self._request(self._state(ids, params)) for ids in token_ids]
        try:
            for request in requests:
                request.submit()
            completions = [request.result() for request in requests]
        finally:
            cancel_all(requests)
        return completions[0] if single else completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the answer's text as it is generated; the pieces together are exactly ``generate``'s text.

        Args:
            prompt: One prompt, as for ``generate``.
            params: How to sample; None for ``SamplingParams()``.

        Raises:
            RequestError: as ``generate``, and for an engine without a tokenizer.
        """
        params = SamplingParams() if params is None else params
        ids = self._checked(prompt, params)
        self._prompts.require_tokenizer()
        return self._pieces(ids, params)

    def _pieces(self, ids: tuple[int, ...], params: SamplingParams) -> Iterator[str]:
        """Submit the request at the first ``next``, so that a stream that is never read takes no slot."""
        request = self._request(self._state(ids, params))
        try:
            request.submit()
            yield from request.stream()
        finally:
            cancel_all([request])

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        allotted_time_ms: PositiveFloat | None = None,
    ) -> Request:
        """Queue a prompt and return at once; the request runs whenever the session steps.

        Args:
            prompt: One prompt, as for ``generate``.
            params: How to sample; None for ``SamplingParams()``.
            priority: Requests of higher priority run first. One level equals 1,000 steps of waiting, so that no
                request waits for ever.
            allotted_time_ms: After this time the request ends with the answer so far, as ``"timed_out"``.

        Raises:
            RequestError: as ``generate``.
        """
        params = SamplingParams() if params is None else params
        state = self._state(self._checked(prompt, params), params)
        state.priority = priority
        if allotted_time_ms is not None:
            state.deadline_s = self._loop.clock() + allotted_time_ms / 1e3
        return self._submit(state)

    def fork(self, request: Request, params: SamplingParams | None = None) -> Request:
        """Start a second answer from the present state of ``request``, sharing its blocks; both then run independently.

        A block that both would write is copied first.

        Args:
            request: The request to fork, which must be under way.
            params: How to sample; None for the request's own. ``max_new_tokens`` counts from the answer's beginning.

        Raises:
            RequestError: for a request that has ended, or params that it cannot go on with.
        """
        parent = request.state
        params = parent.params if params is None else params
        if request.done:
            raise RequestError(
                f"request {request.number} has ended ({request.status})", remedy="fork a request that is under way"
            )
        self._prompts.refuse_beyond_bounds(parent.prompt_ids, params)
        logprobs, output_ids = list(parent.logprobs), parent.output_ids  # copies: another thread may run a step now
        if parent.params.logprobs:
            output_ids = output_ids[: len(logprobs)]
        if params.max_new_tokens <= len(output_ids):
            raise RequestError(
                f"request {request.number} has generated {len(output_ids)} tokens already",
                got=f"max_new_tokens {params.max_new_tokens}",
                remedy="raise max_new_tokens, which counts from the beginning of the answer",
            )
        if params.logprobs and not parent.params.logprobs:
            raise RequestError("the log-probabilities before the fork were not kept", remedy="leave logprobs out")
        state = self._state(parent.prompt_ids, params)
        state.priority, state.deadline_s = parent.priority, parent.deadline_s
        state.token_ids += output_ids
        state.logprobs += logprobs
        return self._submit(state, parent)

    def step(self) -> StepEvent | None:
        """Run one step for all requests under way and return its event; None when there is nothing to do."""
        return self._loop.step()

    def run(self) -> list[StepEvent]:
        """Step until no request is under way; returns the events."""
        return list(iter(self.step, None))

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """The logits after each token of a prompt: [tokens, vocab], float32, on the CPU."""
        self._loop.require_open()
        return self._loop.logits(self._prompts.checked_ids(token_ids))

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens that the model expects in front."""
        return self._prompts.require_tokenizer().encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._prompts.require_tokenizer().decode(self._prompts.known_ids(token_ids))

    def _state(self, ids: tuple[int, ...], params: SamplingParams) -> RequestState:
        return RequestState(
            next(self._numbers), ids, params, self._prompts.end_ids(params), stops=self._prompts.stops(params)
        )

    def _request(self, state: RequestState) -> Request:
        tokenizer = self._prompts.tokenizer
        text = TextStream(tokenizer, state.params.stop or ()) if tokenizer else None
        return Request(state, text, self._loop, self._thread)

    def _submit(self, state: RequestState, parent: RequestState | None = None) -> Request:
        request = self._request(state)
        try:
            request.submit(parent)
            return request
        except BaseException:  # an interrupt: the caller gets no handle
            request.cancel()
            raise

    def _checked(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        """The prompt's token ids; RequestError when this session cannot serve it."""
        self._loop.require_open()
        return self._prompts.checked(prompt, params)

    def close(self) -> None:
        """Cancel all requests under way, and free the weights and the cache; a second call does nothing.

        In a process that was forked from the session's own it does nothing: weights and cache are the parent's.
        """
        if self._loop.exclusive.in_own_process:
            self._loop.close()
            self._thread.close()

    def __reduce__(self) -> NoReturn:
        raise RequestError(
            "a session cannot be copied or pickled: it holds its engine's memory, requests under way and threads",
            remedy="pickle the engine, and open another session with engine.session()",
        )

    def __enter__(self) -> Session:
        self._loop.require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
