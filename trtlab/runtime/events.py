"""Records what a session did in each step, for replay by widgets, benchmarks and tests. Changes nothing."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from trtlab.card import Shown


@dataclass(frozen=True)
class Block:
    """One block of the pool: in use by the requests ``owners``, or ``cached`` for reuse, or free.

    ``token_ids`` are set once the block is full and computed; a partly filled block has none yet.
    """

    number: int
    owners: tuple[int, ...] = ()
    cached: bool = False
    token_ids: tuple[int, ...] = ()

    @property
    def state(self) -> str:
        """``used``, ``shared``, ``cached`` or ``free``."""
        if self.owners:
            return "shared" if len(self.owners) > 1 else "used"
        return "cached" if self.cached else "free"


class Work(NamedTuple):
    """One request's share of a step: ``tokens`` computed after ``past`` cached ones.

    ``generated`` tells whether the step gave a token of the answer. ``wasted`` marks a row of a closed batch that is
    computed although its request has ended.
    """

    request: int
    past: int
    tokens: int
    generated: bool
    wasted: bool = False


@dataclass(frozen=True)
class Admission:
    """A request that got a slot; ``reused_tokens`` were found in the cache."""

    request: int
    slot: int
    reused_tokens: int


@dataclass(frozen=True)
class Finish:
    """A request that ended; ``reason`` is stop, length, cancelled, timed_out or error."""

    request: int
    reason: str


@dataclass(frozen=True, repr=False)
class StepEvent(Shown):
    """The record of one step.

    Times are seconds of the session's clock. ``preempted`` and ``waiting`` are request numbers. ``blocks`` are those
    that changed since the last event, as they were after this step; ``used``, ``cached`` and ``free`` count the pool's
    blocks after it.
    """

    step: int
    start_s: float
    end_s: float
    work: tuple[Work, ...]
    admitted: tuple[Admission, ...]
    preempted: tuple[int, ...]
    finished: tuple[Finish, ...]
    waiting: tuple[int, ...]
    blocks: tuple[Block, ...]
    used: int
    cached: int
    free: int

    @property
    def tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(work.tokens for work in self.work)

    @property
    def generated(self) -> int:
        """Tokens of answers that came out of this step."""
        return sum(work.generated for work in self.work)


class EventLog(Shown, Sequence[StepEvent]):
    """The last ``kept`` steps, oldest first. Older ones are merged into the state of blocks that replay starts from."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._events: deque[StepEvent] = deque()
        self._before: dict[int, Block] = {}
        self._lock = threading.Lock()  # steps may run in another thread than the reader's

    def append(self, event: StepEvent) -> None:
        """Add a step."""
        with self._lock:
            self._events.append(event)
            while len(self._events) > self._kept:
                _apply(self._before, self._events.popleft())

    def blocks_after(self, index: int) -> dict[int, Block]:
        """All blocks that are not free, by number, as they were after the event at ``index``."""
        with self._lock:
            state, events = dict(self._before), tuple(self._events)
        for event in events[: range(len(events))[index] + 1]:
            _apply(state, event)
        return state

    @overload
    def __getitem__(self, index: int) -> StepEvent: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepEvent]: ...
    def __getitem__(self, index: int | slice) -> StepEvent | list[StepEvent]:
        return list(self._events)[index] if isinstance(index, slice) else self._events[index]

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[StepEvent]:
        return iter(tuple(self._events))


def _apply(state: dict[int, Block], event: StepEvent) -> None:
    for block in event.blocks:
        if block.state == "free":
            state.pop(block.number, None)
        else:
            state[block.number] = block
