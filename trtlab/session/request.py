"""Public handle to a request: stream its text, await or take its answer, cancel it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Executor as Thread
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from trtlab.card import Shown
from trtlab.errors import RequestError
from trtlab.runtime.loop import Loop
from trtlab.runtime.request_state import RequestState
from trtlab.runtime.text_stream import TextStream

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Completion(Shown):
    """One finished answer.

    ``finish_reason`` is ``"stop"`` (end token, or ``stop_reason``), ``"length"``, ``"cancelled"`` or ``"timed_out"``;
    the last two leave what there was. ``logprobs`` are natural logarithms, one a token, None unless asked for.
    ``text`` is empty without a tokenizer.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    stop_reason: str | None = None
    logprobs: tuple[float, ...] | None = None


class Request(Shown):
    """A prompt on its way to an answer; ``session.submit`` and ``fork`` make one.

    Whoever waits for it drives the session: ``stream()`` and ``result()`` run steps, in which all other requests go on
    too. In a notebook's event loop ``async for piece in request`` and ``await request`` run them in a thread.
    """

    def __init__(self, state: RequestState, text: TextStream | None, loop: Loop, thread: Callable[[], Thread]) -> None:
        self.state = state
        self._text = text
        self._loop = loop
        self._thread = thread
        self._reading = threading.Lock()  # of the text, which steps feed and any thread may take
        self._read = 0  # tokens that the text has seen
        self._fresh = ""  # text that nobody has taken yet

    @property
    def number(self) -> int:
        """Its number in the session, from 1; events name it so."""
        return self.state.number

    @property
    def status(self) -> str:
        """waiting, running, or why it ended: stop, length, cancelled, timed_out, error."""
        return self.state.finish_reason or ("waiting" if self.state.slot is None else "running")

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
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
        """Tokens that were found in the cache when it last got its slot."""
        return self.state.reused

    @property
    def preemptions(self) -> int:
        """How often it was interrupted for want of blocks, to be computed again."""
        return self.state.preemptions

    def stream(self) -> Iterator[str]:
        """The answer's text from where it was last read, as it comes. Raises what ended the request, if it failed."""
        self._require_text()
        last = False
        while not last:
            piece, last = self._next_piece()
            if piece:
                yield piece
        self._raise_error()

    def result(self) -> Completion:
        """The finished answer; raises what ended the request, if it failed."""
        while not self.done:
            self._loop.advance(self.state)
        return self._completion()

    def cancel(self) -> bool:
        """End it and free its blocks; False when it had ended before. What there is of the answer stays.

        Never waits: while another thread runs a step it takes effect when that step ends.
        """
        return self._loop.cancel(self.state)

    async def _pieces(self) -> AsyncIterator[str]:
        self._require_text()
        last = False
        while not last:
            piece, last = await self._aside(self._next_piece)
            if piece:
                yield piece
        self._raise_error()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces()

    async def _wait(self) -> Completion:
        while not self.done:
            await self._aside(partial(self._loop.advance, self.state))
        return await self._aside(self._completion)

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._wait().__await__()

    async def _aside(self, work: Callable[[], T]) -> T:
        """Run it in the session's thread: it may run steps or wait for one, and an event loop must not."""
        if self._loop.closed:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread(), work)

    def _next_piece(self) -> tuple[str, bool]:
        """The text that can be read now, after a step if there is none; and whether it was the last."""
        last = self.done  # read first: what it leaves can then be taken whole
        piece = self._take()
        if not piece and not last:
            self._loop.advance(self.state)
            last = self.done
            piece = self._take()
        return piece, last

    def look_for_stop(self) -> None:
        """Read what is new when a stop word may end the request; the loop calls it after each token."""
        if self._text is None or not self.state.params.stop:
            return
        with self._reading:
            self._fresh += self._settle()
        if self._text.stopped_by is not None:
            self.state.finish_reason = "stop"

    def _take(self) -> str:
        """The text that has settled since the last call; all of it once the request is done."""
        with self._reading:
            piece, self._fresh = self._fresh + self._settle(), ""
            return piece

    def _settle(self) -> str:
        if self._text is None:
            return ""
        ended = self.state.done  # read first: no token follows it
        new = self.state.token_ids[len(self.state.prompt_ids) + self._read :]
        self._read += len(new)
        piece = self._text.feed(new)
        if ended:
            piece += self._text.finish()
        return piece

    def _completion(self) -> Completion:
        self._raise_error()
        with self._reading:
            self._fresh += self._settle()  # whoever streams may still want it
        state = self.state
        assert state.finish_reason is not None, "the answer is not finished"
        return Completion(
            state.prompt_ids,
            tuple(state.output_ids),
            self._text.text if self._text else "",
            state.finish_reason,
            self._text.stopped_by if self._text else None,
            tuple(state.logprobs) if state.params.logprobs else None,
        )

    def _raise_error(self) -> None:
        if self.state.error is not None:
            raise self.state.error

    def _require_text(self) -> None:
        if self._text is None:
            raise RequestError("streaming text needs a tokenizer", remedy="use result() for token ids")
