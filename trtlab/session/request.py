"""The public handle to a request: stream its text, await or take its answer, cancel it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

from trtlab.card import Shown
from trtlab.errors import RequestError
from trtlab.interrupts import hold_interrupts
from trtlab.runtime.loop import Loop
from trtlab.runtime.request_state import RequestState
from trtlab.runtime.step_thread import StepThread
from trtlab.runtime.text_stream import TextStream

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Completion(Shown):
    """One finished answer.

    ``finish_reason`` is ``"stop"`` (end token, or the stop word or stop token ``stop_reason``), ``"length"``,
    ``"cancelled"`` or ``"timed_out"``; after the last two the answer is what had been generated. ``logprobs`` are
    natural logarithms, one per token; None if they were not requested. ``text`` is empty without a tokenizer.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: tuple[float, ...] | None = None


class Request(Shown):
    """Public handle to a running request: stream, await, cancel. ``session.submit`` and ``session.fork`` make it.

    ``stream()`` and ``result()`` run the session's steps, and these serve all other requests too. In a notebook's event
    loop ``async for piece in request`` and ``await request`` run the steps in a thread.
    """

    def __init__(self, state: RequestState, text: TextStream | None, loop: Loop, thread: StepThread) -> None:
        self.state = state
        self._text = text
        self._loop = loop
        self._thread = thread
        self._text_lock = threading.Lock()  # steps extend the text, and any thread may read it
        self._given = 0  # characters of the text that stream() has given
        self._tasks = 0  # of an event loop, which wait for the request

    def __reduce__(self) -> NoReturn:
        raise RequestError("a request cannot be copied or pickled", remedy="pickle request.result(), its answer")

    @property
    def number(self) -> int:
        """The request's number in the session, from 1; events use the same number."""
        return self.state.number

    @property
    def status(self) -> str:
        """``waiting``, ``running``, or why it ended: ``stop``, ``length``, ``cancelled``, ``timed_out``, ``error``."""
        return self.state.finish_reason or ("waiting" if self.state.slot is None else "running")

    @property
    def done(self) -> bool:
        """Whether the request has ended, for any reason."""
        return not self._loop.is_under_way(self.state)

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.state.prompt_ids

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The answer's tokens so far."""
        return tuple(self.state.output_ids)

    @property
    def reused_tokens(self) -> int:
        """Tokens that were found in the cache when the request last got its slot."""
        return self.state.reused

    @property
    def preemptions(self) -> int:
        """How often the request lost its blocks to another one and was computed again."""
        return self.state.preemptions

    def submit(self, parent: RequestState | None = None) -> None:
        """Queue the request, as a fork if there is a ``parent``; called once, by the session."""
        listener = self.look_for_stop if self.state.params.stop else None
        if parent is None:
            self._loop.submit(self.state, listener)
        else:
            self._loop.fork(parent, self.state, listener)

    def stream(self) -> Iterator[str]:
        """Yield the answer's text as it is generated, from where it was last read.

        Raises:
            RequestError: when the request failed, or without a tokenizer.
        """
        self._require_text()
        return iter(self._next_piece, None)

    def result(self) -> Completion:
        """Run steps until the request ends and return its answer.

        Raises:
            RequestError: when the request failed.
        """
        while not self.done:
            self._loop.advance(self.state)
        return self._completion()

    def cancel(self) -> bool:
        """End the request and free its blocks; the answer so far stays. False when it had ended before.

        Never waits: while another thread runs a step, the request ends with that step.
        """
        return self._loop.cancel(self.state)

    async def _pieces(self) -> AsyncIterator[str]:
        self._require_text()
        last = False
        while not last:
            last = await self._in_thread(self._wait_for_text)
            if piece := self._take():
                yield piece
        self._raise_error()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces()

    async def _wait(self) -> Completion:
        while not self.done:
            await self._in_thread(partial(self._loop.advance, self.state))
        return await self._in_thread(self._completion)

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._wait().__await__()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the session's thread: it may run or await steps, which would block the event loop.

        A task that is cancelled here cancels the request, unless another task waits for it too.
        """
        self._loop.exclusive.require_own_process()
        if self._loop.closed:
            return work()
        self._tasks += 1
        try:
            return await self._thread.run(work)
        except asyncio.CancelledError:
            if self._tasks == 1:
                self.cancel()
            raise
        finally:
            self._tasks -= 1

    def _next_piece(self) -> str | None:
        """The text that can be read now, after as many steps as it takes; None at the end."""
        given, last = self._given, False
        try:
            while not last:
                last = self._wait_for_text()
                if piece := self._take():
                    return piece
        except BaseException:  # an interrupt: the next call gives the same text
            self._given = given
            raise
        self._raise_error()
        return None

    def _wait_for_text(self) -> bool:
        """Run a step if no text can be read now; returns whether the text is complete."""
        last = self.done  # read before the text: if the request has ended, the text is complete
        if not last and not self._has_text():
            self._loop.advance(self.state)
            last = self.done
        return last

    def look_for_stop(self) -> None:
        """End the request if its new text contains a stop word; the loop calls this after each token."""
        if self._text is None or not self.state.params.stop:
            return
        self._settle()
        if self._text.stopped_by is not None:
            self.state.finish_reason = "stop"

    def _has_text(self) -> bool:
        return len(self._settle()) > self._given

    def _take(self) -> str:
        """The text that became final since the last call; all of the rest once the request is done."""
        text, given = self._settle(), self._given
        self._given = len(text)
        return text[given:]

    def _settle(self) -> str:
        """Feed new tokens to the text and return all of it that no later token can change."""
        if self._text is None:
            return ""
        with hold_interrupts(), self._text_lock:
            ended = self.state.done  # read before the tokens: none is added after it
            self._text.feed(self.state.token_ids[len(self.state.prompt_ids) + self._text.fed :])
            if ended:
                self._text.finish()
            return self._text.text

    def _completion(self) -> Completion:
        self._raise_error()
        text, state = self._settle(), self.state
        assert state.finish_reason is not None, f"request {state.number} has not ended"
        return Completion(
            state.prompt_ids,
            tuple(state.output_ids),
            text,
            state.finish_reason,
            state.stop_reason if self._text is None or self._text.stopped_by is None else self._text.stopped_by,
            tuple(state.logprobs) if state.params.logprobs else None,
        )

    def _raise_error(self) -> None:
        if self.state.error is not None:
            raise self.state.error

    def _require_text(self) -> None:
        if self._text is None:
            raise RequestError("streaming text needs a tokenizer", remedy="use result() for token ids")


def cancel_all(requests: Sequence[Request]) -> None:
    """End the requests that are still under way, also when an interrupt arrives at the first line of this."""
    try:
        for request in requests:
            request.cancel()
    finally:
        for request in requests:
            request.cancel()
