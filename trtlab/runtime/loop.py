"""Drives a session's steps through scheduler, blocks, ranks and sampler. Knows tokens, not text."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TypeVar

from torch import Tensor

from trtlab.config.build import BuildConfig
from trtlab.config.session import SessionConfig
from trtlab.errors import RequestError
from trtlab.interrupts import hold_interrupts
from trtlab.parallel.step_inputs import Chunk, StepInputs
from trtlab.runtime.backend import Backend
from trtlab.runtime.blocks import BlockManager
from trtlab.runtime.events import EventLog, Finish, StepEvent, Work
from trtlab.runtime.exclusive import Exclusive
from trtlab.runtime.inbox import Arrival, Cancellation, Inbox, Message
from trtlab.runtime.kv_cache_view import KvCache
from trtlab.runtime.request_state import RequestState
from trtlab.runtime.sampler import sample
from trtlab.runtime.scheduler import NextStep, Scheduler
from trtlab.runtime.step_event import step_event

Listener = Callable[[], None]  # called after each token of a request; it may set the finish reason
Turn = tuple[RequestState, Chunk]
Sample = tuple[int, float | None]  # a token and its log-probability
T = TypeVar("T")
DEADLINE = attrgetter("deadline_s", "number")


class Loop:
    """Runs requests until they end. Every method may be called from any thread; one step runs at a time.

    ``submit``, ``fork`` and ``cancel`` never wait for a step: they post a message. The message is carried out at once
    when no step runs, else by the thread that runs the step, before the step ends.

    An interrupt (SIGINT) takes effect after a step, or between two layers of its forward pass; the requests of such a
    step are computed again. Any other exception amid a step's bookkeeping ends the session and all its requests.
    """

    def __init__(
        self,
        backend: Backend,
        build: BuildConfig,
        config: SessionConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        pool = backend.pool
        self.backend = backend
        self.clock = clock
        self.events = EventLog(config.events_kept)
        self.closed = False
        self._max_num_tokens = build.max_num_tokens
        self._blocks = BlockManager(
            pool.num_blocks, pool.tokens_per_block, enable_reuse=config.enable_block_reuse and pool.paged
        )
        self.scheduler = Scheduler(
            self._blocks,
            max_batch_size=build.max_batch_size,
            max_num_tokens=build.max_num_tokens,
            no_evict=config.capacity_scheduler_policy == "GUARANTEED_NO_EVICT",
            in_flight=config.batching_type == "INFLIGHT",
            chunked=config.enable_chunked_context,
        )
        self._steps = 0
        self._listeners: dict[RequestState, Listener | None] = {}  # its keys are all requests that have not ended
        self._finished: list[Finish] = []  # since the last event
        self._deadlines: list[RequestState] = []  # requests under way that have one, the earliest first
        self._inbox = Inbox()
        self.exclusive = Exclusive(self._inbox, self._carry_out, self._leave)
        self._closing = False  # close() was called within a step
        self._sound = True  # False while a step changes requests, slots and blocks
        self._broken: RequestError | None = None
        self.kv_cache = KvCache(pool, self._blocks, self.scheduler, self.exclusive)

    def submit(self, request: RequestState, listener: Listener | None = None) -> None:
        """Queue a request.

        Args:
            request: A new request.
            listener: Called after each of its tokens; it may set the request's finish reason.

        Raises:
            RequestError: when the pool could not hold the request even alone, or the session is closed.
        """
        self._post_arrival(Arrival(request), listener)

    def fork(self, parent: RequestState, child: RequestState, listener: Listener | None = None) -> None:
        """Queue a request that begins with tokens of ``parent``; it shares the parent's blocks where it can.

        Raises:
            RequestError: as ``submit``, and when ``parent`` is not under way.
        """
        self._post_arrival(Arrival(child, parent), listener)

    def _post_arrival(self, message: Arrival, listener: Listener | None) -> None:
        self.exclusive.require_own_process()
        with hold_interrupts():
            with self._inbox.lock:
                self.require_open()
                parent = message.parent
                if parent is not None and parent not in self._listeners:
                    raise RequestError(
                        f"request {parent.number} is not under way in this session", remedy="submit it here"
                    )
                self.scheduler.refuse_if_never(message.request)
                self._listeners[message.request] = listener
                self._inbox.post(message)
            self.exclusive.attend()

    def cancel(self, request: RequestState) -> bool:
        """End a running or waiting request, at the latest when the present step ends; False when it had ended."""
        if request not in self._listeners or not self.exclusive.in_own_process:
            return False
        with hold_interrupts():
            with self._inbox.lock:
                if request not in self._listeners:
                    return False
                self._inbox.post(Cancellation(request))
            self.exclusive.attend()
        return True

    def is_under_way(self, request: RequestState) -> bool:
        """Whether the request was queued here and has not ended."""
        return request in self._listeners

    @property
    def waiting(self) -> int:
        """Requests under way that have no slot."""
        return max(0, len(self._listeners) - len(self.scheduler.running))

    def _carry_out(self, message: Message) -> None:
        request = message.request
        if request not in self._listeners:
            return
        if isinstance(message, Cancellation):
            self._end(request, "cancelled")
        elif request.slot is None and not self.scheduler.is_waiting(request):
            request.arrival = self._steps
            if request.deadline_s < math.inf:
                insort(self._deadlines, request, key=DEADLINE)
            parent = message.parent
            if parent is None or not self.backend.pool.paged or not self.scheduler.fork(parent, request):
                self.scheduler.add(request)

    def step(self) -> StepEvent | None:
        """Run one step; None when there is nothing to do. An error of one request ends that request alone."""
        with self.exclusive.changes():
            self.require_open()
            return self._step()

    def advance(self, request: RequestState) -> None:
        """Run one step, unless the request has ended: another thread may have run the steps that it needed."""
        with self.exclusive.changes():
            if request in self._listeners:
                event = self._step()
                assert event is not None or request not in self._listeners, f"request {request.number} never runs"

    def _step(self) -> StepEvent | None:
        start = self.clock()
        self._sound = False
        while self._deadlines and self._deadlines[0].deadline_s <= start:
            self._end(self._deadlines[0], "timed_out")
        step = self.scheduler.next()
        assert step.chunks or not self.scheduler.waiting, f"empty step while {self.scheduler.waiting} wait"
        work = self._run(step) if step.chunks else ()
        if self._inbox.messages:
            self.exclusive.drain()
        event = None
        if step.chunks or self._finished:
            finished, self._finished = tuple(self._finished), []
            event = step_event(self._steps, (start, self.clock()), step, work, finished, self.scheduler)
            self.events.append(event)
            self._steps += 1
        self._sound = True
        return event

    def _run(self, step: NextStep) -> tuple[Work, ...]:
        turns = list(step.chunks.items())
        try:
            if step.copies:
                self._in_model(lambda: self.backend.ranks.copy_blocks(step.copies))
        except Exception as error:  # noqa: BLE001 - any block of the step may hold wrong K and V now
            for request, _ in turns:
                self._fail(request, error)
            return ()
        return self._commit(turns, self._compute_each(turns))

    def _in_model(self, run: Callable[[], T]) -> T:
        """Run the ranks; after an interrupt the running requests are queued again, to be computed from the start."""
        try:
            return run()
        except BaseException as error:
            if not isinstance(error, Exception):
                for request in tuple(self.scheduler.running):
                    self.scheduler.restart(request)
                self._sound = True
            raise

    def _compute_each(self, turns: Sequence[Turn]) -> dict[RequestState, Sample | None]:
        """``_compute``; after an error the requests run one by one, and an error ends the one that causes it."""
        try:
            return self._compute(turns)
        except Exception as error:  # noqa: BLE001 - an error of any class
            if len(turns) == 1:
                self._fail(turns[0][0], error)
                return {}
        return {request: token for turn in turns for request, token in self._compute_each([turn]).items()}

    def _compute(self, turns: Sequence[Turn]) -> dict[RequestState, Sample | None]:
        """Run the model and sample: each request's new token, None for a prompt that goes on. Changes no request."""
        inputs = StepInputs(tuple(chunk for _, chunk in turns))
        logits = self._in_model(lambda: self.backend.ranks.run(inputs))
        ready = [
            row
            for row, (request, (_, past, token_ids, _)) in enumerate(turns)
            if past + len(token_ids) == len(request.token_ids) and request.finish_reason is None
        ]
        samples = sample(logits if len(ready) == len(turns) else logits[ready], [turns[row][0] for row in ready])
        return dict.fromkeys(request for request, _ in turns) | {
            turns[row][0]: token for row, token in zip(ready, samples, strict=True)
        }

    def _commit(self, turns: Sequence[Turn], samples: dict[RequestState, Sample | None]) -> tuple[Work, ...]:
        work = []
        for request, (_, past, token_ids, _) in turns:
            if request in samples:
                tokens, wasted = len(token_ids), request.finish_reason is not None
                if not wasted:
                    self.scheduler.computed(request, tokens)
                work.append(Work(request.number, past, tokens, samples[request] is not None, wasted))
        for request, token in samples.items():
            if token is not None:
                self._accept(request, *token)
        return tuple(work)

    def _accept(self, request: RequestState, token: int, logprob: float | None) -> None:
        request.accept(token, logprob)
        listener = self._listeners[request]
        try:
            if listener is not None:
                listener()
        except Exception as error:  # noqa: BLE001 - an error of a listener ends its own request
            self._fail(request, error)
            return
        if request.finish_reason is not None:
            self._end(request, request.finish_reason)

    def _fail(self, request: RequestState, error: Exception) -> None:
        if request.done:  # an ended request of a closed batch: its row is not used
            return
        request.error = RequestError(
            f"request {request.number} failed in step {self._steps}: {type(error).__name__}: {error}",
            remedy="the other requests go on; the cause is attached",
        )
        request.error.__cause__ = error
        self._end(request, "error")

    def _end(self, request: RequestState, reason: str) -> None:
        request.finish_reason = reason
        del self._listeners[request]
        if request.deadline_s < math.inf:
            del self._deadlines[bisect_left(self._deadlines, DEADLINE(request), key=DEADLINE)]
        self.scheduler.release(request)
        self._finished.append(Finish(request.number, reason))

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """The logits after each token: [tokens, vocab], float32, on the CPU. The tokens are not kept for reuse.

        Raises:
            RequestError: when no slot is free, or too few blocks.
        """
        with self.exclusive.changes():
            self.require_open()
            with self.scheduler.borrowed_slot(len(token_ids)) as (slot, blocks):
                return self.backend.ranks.run_prompt(slot, blocks, token_ids, self._max_num_tokens)

    def check_integrity(self) -> None:
        """Raise AssertionError when requests, slots and blocks disagree."""
        self.scheduler.check_integrity()
        queued = {*self.scheduler.running, *self.scheduler.waiting}
        lost = (queued | self._inbox.arrivals) ^ set(self._listeners)
        assert not lost, f"requests are queued and not under way, or the reverse: {lost}"
        assert not any(request.done for request in queued), f"a request has ended and is still queued: {queued}"

    def close(self) -> None:
        """Cancel all requests under way and free the ranks; a second call does nothing.

        Called by a step's own thread within the step, it takes effect at the step's end.
        """
        with self.exclusive.changes():
            self._closing = True

    def _leave(self, error: BaseException | None) -> None:
        """At the end of every change: end a session whose bookkeeping was cut short, and carry out ``close``."""
        if self._sound and error is not None and not isinstance(error, Exception):
            try:
                self.check_integrity()
            except AssertionError:
                self._sound = False
        if not self._sound:
            self._break(error)
        if self._closing and not self.closed:
            with self._inbox.lock:
                self.closed = True  # no request arrives from here on
            self.exclusive.drain()
            for request in tuple(self._listeners):
                request.error = RequestError(
                    f"the session was closed while request {request.number} was under way",
                    remedy="let it finish first: request.result(), or session.run()",
                )
                self._end(request, "cancelled")
            self.backend.ranks.close()

    def _break(self, cause: BaseException | None) -> None:
        """End the session with an error: an exception cut a step's bookkeeping short."""
        self._broken = RequestError(
            f"the session ended in step {self._steps}: an exception cut its bookkeeping short",
            got=repr(cause),
            remedy="open another with engine.session(); the cause is attached",
        )
        self._broken.__cause__ = cause
        with self._inbox.lock:
            self.closed = self._sound = True
            requests = tuple(self._listeners)
            self._inbox.messages.clear()
            self._listeners.clear()
            self._deadlines.clear()
        self.scheduler.reset()
        for request in requests:
            request.error, request.finish_reason = self._broken, request.finish_reason or "error"
        self.backend.ranks.close()

    def require_open(self) -> None:
        """Raise RequestError when the session is closed, and say why when an exception closed it."""
        if self._broken is not None:
            raise self._broken
        if self.closed:
            raise RequestError("this session is closed", remedy="open another with engine.session()")
