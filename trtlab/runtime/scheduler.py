"""Which requests run in the next step, and with how many tokens: first come, first served. Knows no tensors."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from trtlab.errors import RequestError
from trtlab.runtime.executor import Chunk
from trtlab.runtime.request import Request


class Scheduler:
    """In-flight batching: a request joins as soon as a slot is free and leaves when it is done.

    A step never runs more than ``max_batch_size`` requests or ``max_num_tokens`` tokens; a longer prompt is fed in
    chunks over several steps.
    """

    def __init__(self, max_batch_size: int, max_num_tokens: int) -> None:
        self._max_num_tokens = max_num_tokens
        self._free = list(range(max_batch_size))  # a heap: low slots first keep the running ones together
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request behind those that wait."""
        self.waiting.append(request)

    def next(self) -> list[tuple[Request, Chunk]]:
        """The chunks of the next step: those that generate first, then prompts as far as the token budget goes."""
        while self.waiting and self._free:
            request = self.waiting.popleft()
            request.slot = heapq.heappop(self._free)
            self.running.append(request)
        budget = self._max_num_tokens
        step = []
        for request in sorted(self.running, key=lambda r: not r.output_ids):
            tokens = request.pending(budget) if budget else ()
            if tokens:
                assert request.slot is not None, "a running request has a slot"
                step.append((request, Chunk(request.slot, request.past, tokens)))
                budget -= len(tokens)
        return step

    def release(self, request: Request) -> None:
        """Take a request out, running or waiting, and free its slot."""
        if request.slot is None:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        heapq.heappush(self._free, request.slot)
        request.slot = None

    @contextmanager
    def borrowed_slot(self) -> Iterator[int]:
        """A free slot outside the queue, for as long as the block lasts; RequestError when all are taken."""
        if not self._free:
            raise RequestError("every slot is taken by a running request", remedy="let one finish first")
        slot = heapq.heappop(self._free)
        try:
            yield slot
        finally:
            heapq.heappush(self._free, slot)
