"""A rank that knows no model: it shows whether every token lies where the block tables say, and after what."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

from trtlab import BuildConfig, Mapping, SamplingParams, SessionConfig
from trtlab.parallel.comm import Comm
from trtlab.parallel.ranks import RankGroup
from trtlab.parallel.step_inputs import Chunk, StepInputs
from trtlab.runtime.backend import Backend
from trtlab.runtime.loop import Loop
from trtlab.runtime.pool_size import Bound, PoolSize
from trtlab.runtime.request_state import RequestState

VOCAB = 61
END = 7


def digest(before: int, token: int) -> int:
    """What stands at a token's place: like K and V, it depends on the token and on all that came before it."""
    return hash((before, token, 20250))


def next_token(digests: Sequence[int]) -> int:
    """The answer to all that is read back through the tables."""
    return hash(tuple(digests)) % VOCAB


@functools.lru_cache(200)
def alone(prompt: tuple[int, ...], new: int, end: int | None = END) -> tuple[int, ...]:
    """The answer of a request that runs by itself, by a plain loop without blocks, batches or chunks."""
    ids, digests = list(prompt), []
    while len(ids) < len(prompt) + new:
        for token in ids[len(digests) :]:
            digests.append(digest(digests[-1] if digests else 0, token))
        if (token := next_token(digests)) == end:
            break
        ids.append(token)
    return tuple(ids[len(prompt) :])


class FakeRank:
    """Keeps one number a place; ``before_run`` and ``before_copy`` are called first, to fail or to look."""

    def __init__(self, num_blocks: int, tokens_per_block: int, *, paged: bool = True) -> None:
        self.pool = PoolSize(num_blocks, tokens_per_block, 1, (Bound("test", num_blocks),), paged)
        self.places = [[-1] * tokens_per_block for _ in range(num_blocks)]
        self.before_run: Callable[[StepInputs], None] = lambda step: None
        self.before_copy: Callable[[Sequence[tuple[int, int]]], None] = lambda copies: None
        self.logits = lambda logits, step: logits
        self.last: StepInputs | None = None
        self.copied = 0
        self.closed = False

    def run(self, step: StepInputs, comm: Comm) -> torch.Tensor:
        assert not self.closed
        self.last = step
        self.before_run(step)
        assert len({chunk.slot for chunk in step.chunks}) == len(step.chunks)
        for chunk in step.chunks:  # all write before one reads, as in a layer of a real model
            self._write(chunk)
        rows = []
        for chunk in step.chunks:
            ends = range(1, len(chunk.token_ids) + 1) if step.every_token else [len(chunk.token_ids)]
            rows += [next_token(self._read(chunk, chunk.past + end)) for end in ends]
        logits = torch.zeros(len(rows), VOCAB)
        logits[range(len(rows)), rows] = 1.0
        return self.logits(logits, step)

    def _write(self, chunk: Chunk) -> None:
        size = self.pool.tokens_per_block
        before = self._read(chunk, chunk.past)[-1] if chunk.past else 0
        blocks = chunk.blocks
        for position, token in enumerate(chunk.token_ids, chunk.past):
            before = self.places[blocks[position // size]][position % size] = digest(before, token)

    def _read(self, chunk: Chunk, length: int) -> list[int]:
        return list(itertools.chain.from_iterable(self.places[block] for block in chunk.blocks))[:length]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        assert not self.closed
        self.before_copy(copies)
        for source, target in copies:
            self.places[target] = list(self.places[source])
        self.copied += len(copies)

    def close(self) -> None:
        self.closed = True


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A loop over a fake rank, the requests that were given to it, and what they should answer."""

    def __init__(
        self,
        num_blocks: int = 32,
        tokens_per_block: int = 4,
        *,
        batch: int = 4,
        budget: int = 32,
        seq_len: int = 256,
        no_evict: bool = True,
        in_flight: bool = True,
        chunked: bool = True,
        reuse: bool = True,
        paged: bool = True,
        events_kept: int = 10_000,
    ) -> None:
        self.rank = FakeRank(num_blocks, tokens_per_block, paged=paged)
        backend = Backend("fake", self.rank.pool, RankGroup([self.rank], Mapping()), torch.device("cpu"))
        self.batch, self.budget, self.size = batch, budget, tokens_per_block
        self.clock = Clock()
        build = BuildConfig(
            max_batch_size=batch,
            max_num_tokens=budget,
            max_seq_len=seq_len,
            max_input_len=seq_len,
            tokens_per_block=tokens_per_block,
        )
        config = SessionConfig(
            enable_block_reuse=reuse,
            enable_chunked_context=chunked,
            capacity_scheduler_policy="GUARANTEED_NO_EVICT" if no_evict else "MAX_UTILIZATION",
            batching_type="INFLIGHT" if in_flight else "STATIC",
            events_kept=events_kept,
        )
        self.loop = Loop(backend, build, config, self.clock)
        self.numbers = itertools.count(1)

    @property
    def blocks(self):
        return self.loop.scheduler.blocks

    def request(self, prompt: Sequence[int], new: int = 4, *, end: int | None = None, **more) -> RequestState:
        params = more.pop("params", None) or SamplingParams(max_new_tokens=new)
        ends = frozenset() if end is None else frozenset({end})
        return RequestState(next(self.numbers), tuple(prompt), params, ends, **more)

    def submit(self, prompt: Sequence[int], new: int = 4, listener=None, **more) -> RequestState:
        request = self.request(prompt, new, **more)
        self.loop.submit(request, listener)
        return request

    def fork(self, parent: RequestState, new: int | None = None) -> RequestState:
        params = SamplingParams(max_new_tokens=new or parent.params.max_new_tokens)
        child = RequestState(next(self.numbers), parent.prompt_ids, params, parent.end_ids, parent.priority)
        child.token_ids += parent.output_ids
        self.loop.fork(parent, child)
        return child

    def step(self):
        """One step, and everything that must hold after it."""
        self.rank.last = None
        tries, look = [], self.rank.before_run
        self.rank.before_run = lambda step: (tries.append(step), look(step))
        try:
            event = self.loop.step()
        finally:
            self.rank.before_run = look
            self.loop.check_integrity()
        if event is None:
            assert not tries
            return None
        for step in tries:  # more than one when a step was repeated request by request
            assert 0 < len(step.chunks) <= self.batch
            assert 0 < sum(len(chunk.token_ids) for chunk in step.chunks) <= self.budget
        assert event.tokens <= self.budget and len(event.work) <= self.batch
        assert event.used + event.cached + event.free == self.blocks.num_blocks
        assert self.loop.events[-1] is event
        if self.size <= self.budget:
            for work in event.work:
                assert work.generated or work.wasted or work.tokens % self.size == 0, f"{work} ends within a block"
        return event

    def run(self, most: int = 10_000) -> int:
        """Steps until nothing is left to do."""
        for count in range(most):
            if self.step() is None:
                assert not self.loop.scheduler.running and not self.loop.scheduler.waiting
                return count
        raise AssertionError(f"still busy after {most} steps")

    def check_answer(self, request: RequestState) -> None:
        """All that there is of the answer is what it would be alone; a finished one is whole."""
        end = next(iter(request.end_ids), None)
        whole = alone(request.prompt_ids, request.params.max_new_tokens, end)
        answer = tuple(request.output_ids)
        assert answer == whole[: len(answer)], (request.number, answer, whole)
        if request.finish_reason in ("stop", "length"):
            assert answer == whole
            assert (request.finish_reason == "length") == (len(answer) == request.params.max_new_tokens)

    def check_empty(self) -> None:
        """Nothing runs, waits or holds a block."""
        self.loop.check_integrity()
        assert not self.loop.scheduler.running and not self.loop.scheduler.waiting
        assert self.blocks.used == 0 and self.blocks.available == self.blocks.num_blocks
        assert sorted(self.loop.scheduler._free) == list(range(self.batch))


@pytest.fixture(scope="session")
def bench() -> type[Bench]:
    """The class, for tests that make one a case."""
    return Bench
