"""The data of a KV pool's picture, from a session's events: blocks after one step, and all steps. Knows no picture."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trtlab.runtime.events import Block, EventLog, StepEvent
from trtlab.runtime.kv_cache_view import KvCache

DRAWN = 512  # cells of the map, at most; a GPU's pool can have a million blocks
BARS = 200  # along the axis of steps, at most
LAST = sys.maxsize  # sorts behind every place in a chain


@dataclass(frozen=True)
class Moment:
    """The blocks that are not free, by number, and the number of filled places of each block in use.

    It is the state after ``step``; None is now.
    """

    step: int | None
    blocks: Mapping[int, Block]
    filled: Mapping[int, int]

    def block(self, number: int) -> Block:
        """One block by its number, also a free one."""
        return self.blocks.get(number, Block(number))

    def counts(self, num_blocks: int) -> tuple[int, int, int, int]:
        """How many of a pool's ``num_blocks`` are in use, shared (some of those in use), cached and free."""
        used = sum(bool(block.owners) for block in self.blocks.values())
        shared = sum(len(block.owners) > 1 for block in self.blocks.values())
        return used, shared, len(self.blocks) - used, num_blocks - len(self.blocks)


def moment_after(events: EventLog, index: int, tokens_per_block: int) -> Moment:
    """The state of the blocks after the event at ``index``."""
    cached_tokens, chains = _replayed(events[: range(len(events))[index] + 1])
    blocks = events.blocks_after(index)
    return Moment(events[index].step, blocks, _filled(blocks, cached_tokens, chains, tokens_per_block))


def moment_now(cache: KvCache, numbers: Iterable[int]) -> Moment:
    """The present state of the blocks with these numbers, also between two steps, after a submit, fork or cancel."""
    while True:
        try:
            blocks = {number: block for number in numbers if (block := cache.block(number)).state != "free"}
            return Moment(None, blocks, _filled(blocks, cache.held, cache.chains, cache.pool.tokens_per_block))
        except (RuntimeError, KeyError):  # a step in another thread changed the dict during the loop
            continue


def _replayed(events: Iterable[StepEvent]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """The number of cached tokens of each running request, and its chain of blocks in the order it received them.

    Events do not record a block's place in its chain. Only the last block of a chain can be partly filled, so it is
    enough to know which block came last. Among blocks that came in one step, those with known tokens are full and come
    first; blocks that a fork took over from another request keep their order there; the others are ordered by number.
    """
    cached_tokens: dict[int, int] = {}
    chains: dict[int, list[int]] = {}
    owners: dict[int, tuple[int, ...]] = {}
    for event in events:
        for request in (*event.preempted, *(finish.request for finish in event.finished)):
            cached_tokens.pop(request, None)
        done = {finish.request for finish in event.finished}
        cached_tokens.update((work.request, work.past + work.tokens) for work in event.work if work.request not in done)
        for _, _, _, block in sorted(_place(block, owners, chains) for block in event.blocks):
            before = owners.pop(block.number, ())
            for request in before:
                if request not in block.owners:
                    chains[request].remove(block.number)
            for request in block.owners:
                if request not in before:
                    chains.setdefault(request, []).append(block.number)
            if block.owners:
                owners[block.number] = block.owners
    return cached_tokens, chains


def _place(
    block: Block, owners: Mapping[int, tuple[int, ...]], chains: Mapping[int, Sequence[int]]
) -> tuple[bool, int, int, Block]:
    """The sort key that orders an event's blocks by their places in chains."""
    before = owners.get(block.number)
    place = chains[before[0]].index(block.number) if before else LAST
    return not block.token_ids, place, block.number, block


def _filled(
    blocks: Mapping[int, Block], cached_tokens: Mapping[int, int], chains: Mapping[int, Sequence[int]], size: int
) -> dict[int, int]:
    """The filled places of each block in use; for a shared block, those of the request that filled the most."""
    filled = {number: size if block.token_ids else 0 for number, block in blocks.items() if block.owners}
    for request, chain in chains.items():
        for place, number in enumerate(chain):
            if number in filled:
                places = min(size, max(0, cached_tokens.get(request, 0) - place * size))
                filled[number] = max(filled[number], places)
    return filled


@dataclass(frozen=True)
class History:
    """All steps as bars of ``width`` steps: the blocks after a bar's last step, and the tokens of all its steps.

    ``reused`` counts tokens that admitted requests found in the cache; ``preempted`` are the numbers of preempted
    requests.
    """

    first: int
    width: int
    used: tuple[int, ...]
    cached: tuple[int, ...]
    free: tuple[int, ...]
    computed: tuple[int, ...]
    reused: tuple[int, ...]
    preempted: tuple[tuple[int, ...], ...]

    def bar(self, step: int) -> int:
        """The index of the bar that contains a step."""
        return (step - self.first) // self.width

    def last(self, bar: int) -> int:
        """The last step of a bar; a session can end before it."""
        return self.first + (bar + 1) * self.width - 1


def history(events: Sequence[StepEvent]) -> History:
    """The steps of these events as bars, at most BARS."""
    events = list(events)
    width = max(1, -(-len(events) // BARS))
    bars = [events[start : start + width] for start in range(0, len(events), width)]
    return History(
        events[0].step if events else 0,
        width,
        tuple(bar[-1].used for bar in bars),
        tuple(bar[-1].cached for bar in bars),
        tuple(bar[-1].free for bar in bars),
        tuple(sum(event.tokens for event in bar) for bar in bars),
        tuple(sum(admission.reused_tokens for event in bar for admission in event.admitted) for bar in bars),
        tuple(tuple(request for event in bar for request in event.preempted) for bar in bars),
    )


def cells(num_blocks: int, ever_used: Iterable[int]) -> tuple[range, ...]:
    """The block numbers of each cell of the map.

    A cell is one block of a small pool, one ever-used block of a large pool, or a range of blocks if more than DRAWN
    were used.
    """
    if num_blocks <= DRAWN:
        return tuple(range(number, number + 1) for number in range(num_blocks))
    numbers = sorted(ever_used)
    if len(numbers) <= DRAWN:
        return tuple(range(number, number + 1) for number in numbers)
    width = -(-(numbers[-1] + 1) // DRAWN)
    return tuple(range(start, min(start + width, num_blocks)) for start in range(0, numbers[-1] + 1, width))
