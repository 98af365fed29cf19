"""Drives a session's steps through scheduler, blocks, ranks and sampler. Knows tokens, not text."""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trtlab.config.build import BuildConfig
from trtlab.config.session import SessionConfig
from trtlab.errors import RequestError
from trtlab.parallel.step_inputs import Chunk, StepInputs
from trtlab.runtime.backend import Backend
from trtlab.runtime.blocks import BlockManager
from trtlab.runtime.events import EventLog, Finish, StepEvent, Work
from trtlab.runtime.inbox import Arrival, Cancellation, Inbox, Message
from trtlab.runtime.kv_cache_view import KvCache
from trtlab.runtime.request_state import RequestState
from trtlab.runtime.sampler import sample
from trtlab.runtime.scheduler import NextStep, Scheduler

Listener = Callable[[], None]  # called after each token of a request; it may set the finish reason
Turn = tuple[RequestState, Chunk]


class Loop:
    """Runs requests until they end. Every method may be called from any thread; one step runs at a time.

    ``submit``, ``fork`` and ``cancel`` never wait for a step: they post a message. The message is carried out at once
    when no step runs, else by the thread that runs the step, before the step ends.
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
        self.kv_cache = KvCache(pool, self._blocks, self.scheduler)
        self._steps = 0
        self._listeners: dict[RequestState, Listener | None] = {}  # its keys are all requests that have not ended
        self._finished: list[Finish] = []  # since the last event
        self._deadlines: list[tuple[float, int, RequestState]] = []  # a heap of (deadline_s, number, request)
        self._inbox = Inbox()
        self._lock = threading.RLock()  # its holder may change requests, slots and blocks
        self._depth = 0  # above 0 the holder is changing them: a message that its own thread posts must wait
        self._exclusive = _Exclusive(self)

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
        with self._inbox.lock:
            self._require_open()
            parent = message.parent
            if parent is not None and parent not in self._listeners:
                raise RequestError(f"request {parent.number} is not under way in this session", remedy="submit it here")
            self.scheduler.refuse_if_never(message.request)
            self._listeners[message.request] = listener
            self._inbox.post(message)
        self._attend()

    def cancel(self, request: RequestState) -> bool:
        """End a running or waiting request, at the latest when the present step ends; False when it had ended."""
        with self._inbox.lock:
            if request not in self._listeners:
                return False
            self._inbox.post(Cancellation(request))
        self._attend()
        return True

    def is_under_way(self, request: RequestState) -> bool:
        """Whether the request was queued here and has not ended."""
        return request in self._listeners

    @property
    def waiting(self) -> int:
        """Requests under way that have no slot."""
        return max(0, len(self._listeners) - len(self.scheduler.running))

    def _attend(self) -> None:
        """Carry out messages, unless another thread holds the lock: that thread looks again after it releases it."""
        while self._inbox.messages and self._lock.acquire(blocking=False):
            try:
                if self._depth:
                    return
                self._drain()
            finally:
                self._lock.release()

    def _drain(self) -> None:
        self._depth += 1
        try:
            self._inbox.drain(self._carry_out)
        finally:
            self._depth -= 1

    def _carry_out(self, message: Message) -> None:
        request = message.request
        if request not in self._listeners:
            return
        if isinstance(message, Cancellation):
            self._end(request, "cancelled")
        elif request.slot is None and not self.scheduler.is_waiting(request):
            request.arrival = self._steps
            if request.deadline_s < math.inf:
                heapq.heappush(self._deadlines, (request.deadline_s, request.number, request))
            parent = message.parent
            if parent is None or not self.backend.pool.paged or not self.scheduler.fork(parent, request):
                self.scheduler.add(request)

    def step(self) -> StepEvent | None:
        """Run one step; None when there is nothing to do. An error of one request ends that request alone."""
        with self._exclusive:
            self._require_open()
            return self._step()

    def advance(self, request: RequestState) -> None:
        """Run one step, unless the request has ended: another thread may have run the steps that it needed."""
        with self._exclusive:
            if request in self._listeners:
                event = self._step()
                assert event is not None or request not in self._listeners, f"request {request.number} never runs"

    def _step(self) -> StepEvent | None:
        start = self.clock()
        try:
            step, work = self._choose_and_run(start)
        finally:
            if self._inbox.messages:
                self._drain()
        if not step.chunks and not self._finished:
            return None
        event = self._event(step, work, start)
        self.events.append(event)
        self._steps += 1
        return event

    def _choose_and_run(self, start: float) -> tuple[NextStep, tuple[Work, ...]]:
        while self._deadlines and (self._deadlines[0][0] <= start or self._deadlines[0][2].done):
            *_, late = heapq.heappop(self._deadlines)
            if not late.done:
                self._end(late, "timed_out")
        step = self.scheduler.next()
        assert step.chunks or not self.scheduler.waiting, f"empty step while {self.scheduler.waiting} wait"
        try:
            return step, self._run(step) if step.chunks else ()
        except BaseException:  # an interrupt may come anywhere: requests of the step are computed again from the start
            for request in step.chunks:
                if request.finish_reason is not None and request in self._listeners:
                    self._end(request, request.finish_reason)
                elif request in self._listeners:
                    self.scheduler.restart(request)
            raise

    def _event(self, step: NextStep, work: tuple[Work, ...], start: float) -> StepEvent:
        blocks, self._finished, finished = self._blocks, [], tuple(self._finished)
        return StepEvent(
            step=self._steps,
            start_s=start,
            end_s=self.clock(),
            work=work,
            admitted=tuple(step.admitted),
            preempted=tuple(request.number for request in step.preempted),
            finished=finished,
            waiting=tuple(request.number for request in self.scheduler.waiting),
            blocks=blocks.changes(),
            used=blocks.used,
            cached=blocks.cached,
            free=blocks.available - blocks.cached,
        )

    def _run(self, step: NextStep) -> tuple[Work, ...]:
        turns = list(step.chunks.items())
        try:
            if step.copies:
                self.backend.ranks.copy_blocks(step.copies)
        except Exception as error:  # noqa: BLE001 - any block of the step may hold wrong K and V now
            for request, _ in turns:
                self._fail(request, error)
            return ()
        try:
            return self._compute(turns)
        except Exception as error:  # noqa: BLE001 - an error of any class ends the request that causes it
            if len(turns) == 1:
                self._fail(turns[0][0], error)
                return ()
        work: tuple[Work, ...] = ()
        for turn in turns:  # the failed step changed no request: running them one by one shows which one fails
            try:
                work += self._compute([turn])
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(turn[0], error)
        return work

    def _compute(self, turns: Sequence[Turn]) -> tuple[Work, ...]:
        logits = self.backend.ranks.run(StepInputs(tuple(chunk for _, chunk in turns)))
        ready = [
            row
            for row, (request, (_, past, token_ids, _)) in enumerate(turns)
            if past + len(token_ids) == len(request.token_ids) and request.finish_reason is None
        ]
        samples = sample(logits if len(ready) == len(turns) else logits[ready], [turns[row][0] for row in ready])
        generating, work = set(ready), []
        for row, (request, (_, past, token_ids, _)) in enumerate(turns):  # after sampling, which may fail
            tokens, wasted = len(token_ids), request.finish_reason is not None
            if not wasted:
                self.scheduler.computed(request, tokens)
            work.append(Work(request.number, past, tokens, row in generating, wasted))
        for row, (token, logprob) in zip(ready, samples, strict=True):
            self._accept(turns[row][0], token, logprob)
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
        self.scheduler.release(request)
        self._finished.append(Finish(request.number, reason))

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """The logits after each token: [tokens, vocab], float32, on the CPU. The tokens are not kept for reuse.

        Raises:
            RequestError: when no slot is free, or too few blocks.
        """
        with self._exclusive:
            self._require_open()
            with self.scheduler.borrowed_slot(len(token_ids)) as (slot, blocks):
                limit = self._max_num_tokens
                starts = range(0, len(token_ids), limit)
                chunks = [Chunk(slot, start, tuple(token_ids[start : start + limit]), blocks) for start in starts]
                parts = [self.backend.ranks.run(StepInputs((chunk,), every_token=True)) for chunk in chunks]
                return torch.cat([part.cpu() for part in parts])

    def check_integrity(self) -> None:
        """Raise AssertionError when requests, slots and blocks disagree."""
        self.scheduler.check_integrity()
        queued = {*self.scheduler.running, *self.scheduler.waiting}
        lost = (queued | self._inbox.arrivals) ^ set(self._listeners)
        assert not lost, f"requests are queued and not under way, or the reverse: {lost}"
        assert not any(request.done for request in queued), f"a request has ended and is still queued: {queued}"

    def close(self) -> None:
        """Cancel all requests under way and free the ranks; a second call does nothing."""
        with self._exclusive:
            if self.closed:
                return
            with self._inbox.lock:
                self.closed = True  # no request arrives from here on
            self._drain()
            for request in tuple(self._listeners):
                request.error = RequestError(
                    f"the session was closed while request {request.number} was under way",
                    remedy="let it finish first: request.result(), or session.run()",
                )
                self._end(request, "cancelled")
            self.backend.ranks.close()

    def _require_open(self) -> None:
        if self.closed:
            raise RequestError("this session is closed", remedy="open another with engine.session()")


class _Exclusive:
    """Context manager that holds a loop's lock; messages are carried out before and after. Entered at every step."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __enter__(self) -> None:
        loop = self._loop
        loop._lock.acquire()
        try:
            if loop._inbox.messages and not loop._depth:
                loop._drain()
        except BaseException:
            loop._lock.release()
            raise
        loop._depth += 1

    def __exit__(self, *_: object) -> None:
        loop = self._loop
        loop._depth -= 1
        loop._lock.release()
        if loop._inbox.messages:
            loop._attend()
