"""Chooses the requests of the next step, their tokens and their blocks. Knows no tensors and no text."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from trtlab.errors import RequestError
from trtlab.parallel.step_inputs import Chunk
from trtlab.runtime.blocks import BlockManager, Chain
from trtlab.runtime.events import Admission
from trtlab.runtime.request_state import RequestState

LOGITS_OWNER = 0  # owner of the blocks of a borrowed slot; request numbers start at 1


@dataclass
class NextStep:
    """What the next step runs: its chunks in order, the blocks to copy first, and the requests that got or lost a slot.

    ``copies`` are pairs (source block, target block); ``preempted`` requests wait again.
    """

    chunks: dict[RequestState, Chunk] = field(default_factory=dict)
    copies: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)
    preempted: list[RequestState] = field(default_factory=list)


class Scheduler:
    """In-flight batching over one pool: a request joins when a slot and blocks are free, and leaves when it is done.

    A step never runs more than ``max_batch_size`` requests or ``max_num_tokens`` tokens. A longer prompt is fed in
    chunks of whole blocks.

    Args:
        blocks: The pool; the scheduler alone reserves and releases its blocks.
        max_batch_size: The number of slots.
        max_num_tokens: The token budget of one step.
        no_evict: If True, a request joins only when the pool can hold it and all running requests at their longest.
            If False, it joins when its present tokens fit; when the pool runs out, the request that came last gives
            its blocks back and is computed again later.
        in_flight: If False, a batch is closed until all its requests are done. A request that has ended keeps its
            slot and blocks, and its row is computed without use, as in ``transformers.generate``.
        chunked: Whether a prompt may be split over several steps.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        no_evict: bool = True,
        in_flight: bool = True,
        chunked: bool = True,
    ) -> None:
        self.blocks = blocks
        self._max_num_tokens = max_num_tokens
        self._no_evict = no_evict
        self._in_flight = in_flight
        self._chunked = chunked
        self._unit = blocks.tokens_per_block if blocks.tokens_per_block <= max_num_tokens else 1
        self._slots = max_batch_size
        self._set_empty()
        self.prompt_tokens = self.reused_tokens = self.short_prompts = 0  # totals over all admissions

    def _set_empty(self) -> None:
        self._free = list(range(self._slots))  # a heap: the lowest slot is taken first, so used slots stay together
        self.waiting: list[RequestState] = []  # sorted by key
        self.running: list[RequestState] = []  # sorted by key
        self.spent: list[RequestState] = []  # ended requests of a closed batch that still runs
        self._admissions: list[Admission] = []  # since the last step was chosen

    def reset(self) -> None:
        """Forget all requests and free all slots and blocks, whatever their state is."""
        for request in (*self.waiting, *self.running, *self.spent):
            request.slot, request.chain = None, Chain(request.number, request.token_ids)
        self._set_empty()
        self.blocks.reset()

    def refuse_if_never(self, request: RequestState) -> None:
        """Raise RequestError when the pool could not hold the request even alone."""
        needed = self.blocks.required(request.longest)
        if needed > self.blocks.num_blocks:
            raise RequestError(
                f"the request needs {needed} KV blocks and the pool has {self.blocks.num_blocks}",
                got=f"{len(request.prompt_ids)} tokens and max_new_tokens {request.params.max_new_tokens}",
                expected=f"{self.blocks.num_blocks * self.blocks.tokens_per_block} tokens at most",
                remedy="lower max_new_tokens, or raise max_tokens_in_paged_kv_cache",
            )

    def add(self, request: RequestState) -> None:
        """Queue a request by priority and arrival."""
        insort(self.waiting, request, key=lambda r: r.key)

    def is_waiting(self, request: RequestState) -> bool:
        """Whether the request is queued."""
        index = bisect_left(self.waiting, request.key, key=lambda r: r.key)
        return index < len(self.waiting) and self.waiting[index] is request

    def fork(self, parent: RequestState, child: RequestState) -> bool:
        """Admit ``child``, which begins with tokens of the parent, and share the parent's blocks with it.

        The parent may have generated more tokens since the fork was requested: these are not shared.

        Returns:
            False when the child must wait: the parent does not run, or there is no free slot or too few blocks.
        """
        if parent.slot is None or not self._free or not self._in_flight:
            return False
        past, size = min(parent.past, child.total - 1), self.blocks.tokens_per_block
        if past // size < parent.chain.committed:  # the parent has filled this block, and others may reuse it as it is
            past -= past % size
        needed = self.blocks.required(child.longest if self._no_evict else child.total)
        needed -= self.blocks.required(past)
        if past % size:
            needed += 2  # parent and child are each charged a copy of the open block, until one of them has copied it
        if not self._has_room(needed):
            return False
        self.blocks.fork(parent.chain, child.chain, past)
        child.past = child.reused = past
        self._admit(child)
        return True

    def next(self) -> NextStep:
        """Choose the next step: generating requests first, then unfinished prompts, then new requests, each by key."""
        step, budget = NextStep(), self._max_num_tokens
        chunks = step.chunks
        generating: list[RequestState] = []
        filling: list[RequestState] = []
        for request in self.running:
            (generating if request.generates else filling).append(request)
        for request in generating:
            past = request.past
            if request.slot is None or not budget:  # an earlier request of this loop may have preempted it
                continue
            if self.blocks.writable(request.chain, past):  # the usual case, without the cost of _add_chunk
                chunks[request] = Chunk(request.slot, past, (request.token_ids[past],), request.chain.blocks)
                budget -= 1
            else:
                budget -= self._add_chunk(step, request, budget)
        for request in filling:
            if request.slot is not None and budget:
                budget -= self._add_chunk(step, request, budget)
        for request in self.spent[:budget]:  # computes the last token again, at its own position
            assert request.slot is not None, f"ended request {request.number} of a closed batch has no slot"
            last = request.past - 1
            chunks[request] = Chunk(request.slot, last, (request.token_ids[last],), request.chain.blocks)
        all_served = not step.preempted and len(chunks) == len(self.running)  # if not, new requests would take turns
        if all_served and (self._in_flight or not self.running):
            while self.waiting and self._free and budget:
                request = self.waiting[0]
                prefix = self.blocks.match(request.chain)
                tokens = self._chunk_size(request.total - len(prefix) * self.blocks.tokens_per_block, budget, request)
                if not tokens or not self._fits(request, prefix):
                    break
                del self.waiting[0]
                request.past = request.reused = self.blocks.open(request.chain, prefix)
                self._admit(request)
                budget -= self._add_chunk(step, request, budget)
        step.admitted, self._admissions = self._admissions, []
        return step

    def _add_chunk(self, step: NextStep, request: RequestState, budget: int) -> int:
        """Put the request's next tokens into the step; with too few free blocks, later requests are preempted.

        Returns:
            The tokens taken from the budget: negative when a preempted request was already in the step.
        """
        past = request.past
        tokens = self._chunk_size(request.total - past, budget, request)
        if not tokens:
            return 0
        freed = 0
        while (copies := self.blocks.reserve(request.chain, past, past + tokens)) is None:
            if self.spent:
                self._vacate(self.spent.pop())
                continue
            assert not self._no_evict, f"request {request.number} was admitted with too few blocks for {past + tokens}"
            victim = self.running[-1]
            freed += self._preempt(step, victim)
            if victim is request:
                return -freed
        assert request.slot is not None, f"running request {request.number} has no slot"
        step.copies += copies
        token_ids = tuple(request.token_ids[past : past + tokens])
        step.chunks[request] = Chunk(request.slot, past, token_ids, request.chain.blocks)
        return tokens - freed

    def _chunk_size(self, pending: int, budget: int, request: RequestState) -> int:
        """How many of the pending tokens run now: all, or as many whole blocks as the budget allows.

        Without chunked context a prompt runs whole. After preemption or a fork there are generated tokens behind the
        prompt, and together they may exceed the budget, so they may be split.
        """
        if pending <= budget:
            return pending
        if not self._chunked and request.total == len(request.prompt_ids):
            return 0
        return budget // self._unit * self._unit

    def _fits(self, request: RequestState, prefix: list[int]) -> bool:
        tokens = request.longest if self._no_evict else request.total
        return self._has_room(self.blocks.required(tokens) - len(prefix) + self.blocks.unused(prefix))

    def _has_room(self, needed: int) -> bool:
        """Whether ``needed`` more blocks can go to one more request without harm to the running ones."""
        if self._no_evict:
            promised = sum(self.blocks.demand(r.chain, r.past, r.longest) for r in self.running)
        else:
            promised = len(self.running)  # room for each to grow by a block, or the new request is preempted at once
        return needed + promised <= self.blocks.available

    def _admit(self, request: RequestState) -> None:
        request.slot = heapq.heappop(self._free)
        insort(self.running, request, key=lambda r: r.key)
        self._admissions.append(Admission(request.number, request.slot, request.reused))
        self.prompt_tokens += request.total
        self.reused_tokens += request.reused
        self.short_prompts += request.total <= self.blocks.tokens_per_block

    def _preempt(self, step: NextStep, victim: RequestState) -> int:
        """Free a request's slot and blocks and queue it again; returns the budget that its chunk had taken."""
        chunk = step.chunks.pop(victim, None)
        blocks = set(victim.chain.blocks)
        step.copies = [(source, target) for source, target in step.copies if target not in blocks]
        self.restart(victim)
        victim.preemptions += 1
        step.preempted.append(victim)
        return len(chunk.token_ids) if chunk else 0

    def restart(self, request: RequestState) -> None:
        """Free a running request's slot and blocks and queue it again; it will be computed again from its tokens."""
        self.running.remove(request)
        self._vacate(request)
        self._end_batch()
        request.past = 0
        self.add(request)

    def computed(self, request: RequestState, tokens: int) -> None:
        """Record that K and V of ``tokens`` more tokens of the request are in the cache."""
        request.past += tokens
        if request.past // self.blocks.tokens_per_block > request.chain.committed:
            self.blocks.commit(request.chain, request.past)

    def release(self, request: RequestState) -> None:
        """Remove a running or waiting request and free its slot and blocks; a closed batch frees them when all end."""
        if request.slot is None:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        if self._in_flight or not request.past:
            self._vacate(request)
        else:
            self.spent.append(request)
        self._end_batch()

    def _end_batch(self) -> None:
        while self.spent and not self.running:
            self._vacate(self.spent.pop())

    def _vacate(self, request: RequestState) -> None:
        self.blocks.release(request.chain)
        assert request.slot is not None, f"request {request.number} has blocks and no slot"
        heapq.heappush(self._free, request.slot)
        request.slot = None

    @contextmanager
    def borrowed_slot(self, tokens: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Lend a free slot and blocks for ``tokens`` tokens, outside the queue.

        Raises:
            RequestError: when no slot is free, or too few blocks.
        """
        if not self._free:
            raise RequestError("every slot is taken by a running request", remedy="let a request finish first")
        chain = Chain(LOGITS_OWNER, ())
        self.blocks.open(chain)
        slot = heapq.heappop(self._free)
        try:
            if self.blocks.reserve(chain, 0, tokens) is None:
                raise RequestError(
                    f"{tokens} tokens need {self.blocks.required(tokens)} KV blocks",
                    got=f"{self.blocks.available} of {self.blocks.num_blocks} available now",
                    remedy="let a request finish first, or raise max_tokens_in_paged_kv_cache",
                )
            yield slot, chain.blocks
        finally:
            self.blocks.release(chain)
            heapq.heappush(self._free, slot)

    def check_integrity(self) -> None:
        """Raise AssertionError when queues, slots and blocks disagree."""
        self.blocks.check_integrity()
        for queue in (self.running, self.waiting):
            keys = [request.key for request in queue]
            assert keys == sorted(keys), f"queue is not sorted by key: {keys}"
        admitted = [*self.running, *self.spent]
        slots = [request.slot for request in admitted]
        assert None not in slots, f"a running request has no slot: {admitted}"
        assert all(request.slot is None for request in self.waiting), f"a waiting request has a slot: {self.waiting}"
        assert len(set(slots) | set(self._free)) == len(slots) + len(self._free), (slots, self._free)
        owners, numbers = {chain.owner for chain in self.blocks.chains()}, {request.number for request in admitted}
        assert owners == numbers, f"owners of blocks are {owners}, requests with a slot {numbers}"
        assert self.running or not self.spent, f"closed batch has ended and keeps its slots: {self.spent}"
        for request in admitted:
            assert request.past <= len(request.chain.blocks) * self.blocks.tokens_per_block, request
            assert request.chain.committed == request.past // self.blocks.tokens_per_block, request
        if self._no_evict:
            promised = sum(self.blocks.demand(r.chain, r.past, r.longest) for r in self.running)
            assert promised <= self.blocks.available, (promised, self.blocks.available)
