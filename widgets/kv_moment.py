"""What the picture of a KV pool shows, taken from a session's events: blocks at a step, and all steps. No picture."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trtlab.runtime.events import Block, EventLog, StepEvent
from trtlab.runtime.kv_cache_view import KvCache

DRAWN = 512  # cells of the map at most; a GPU's pool can have a million blocks
BARS = 200  # along the steps at most
MOST = sys.maxsize


@dataclass(frozen=True)
class Moment:
    """The blocks that are not free, by number, and how many places of those in use hold a token.

    ``step`` is the one after which they were so; None is now.
    """

    step: int | None
    blocks: Mapping[int, Block]
    filled: Mapping[int, int]

    def block(self, number: int) -> Block:
        """One block, a free one too."""
        return self.blocks.get(number, Block(number))

    def counts(self, num_blocks: int) -> tuple[int, int, int, int]:
        """Blocks in use, those of them that are shared, blocks cached, and free ones of a pool's ``num_blocks``."""
        used = sum(bool(block.owners) for block in self.blocks.values())
        shared = sum(len(block.owners) > 1 for block in self.blocks.values())
        return used, shared, len(self.blocks) - used, num_blocks - len(self.blocks)


def moment_after(events: EventLog, index: int, tokens_per_block: int) -> Moment:
    """The blocks as they were after the event at ``index``."""
    held, chains = _replayed(events[: range(len(events))[index] + 1])
    blocks = events.blocks_after(index)
    return Moment(events[index].step, blocks, _filled(blocks, held, chains, tokens_per_block))


def moment_now(cache: KvCache, numbers: Iterable[int]) -> Moment:
    """Of these blocks how they are, also after a submit, fork or cancel that no step has followed yet."""
    while True:
        try:
            blocks = {number: block for number in numbers if (block := cache.block(number)).state != "free"}
            return Moment(None, blocks, _filled(blocks, cache.held, cache.chains, cache.pool.tokens_per_block))
        except (RuntimeError, KeyError):  # a step runs in another thread, and has changed what was just being read
            continue


def _replayed(events: Iterable[StepEvent]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """The cached tokens of each running request, and its blocks in the order in which it got them.

    Events do not tell a block's place in its chain. Only the last one can be open, so it is enough to know which came
    last. Of blocks that came in one step those with known tokens are full; those that another request had before keep
    their order, because a fork took them over, and the others have the order of their numbers.
    """
    held: dict[int, int] = {}
    chains: dict[int, list[int]] = {}
    owners: dict[int, tuple[int, ...]] = {}
    for event in events:
        for request in (*event.preempted, *(finish.request for finish in event.finished)):
            held.pop(request, None)
        done = {finish.request for finish in event.finished}
        held.update((work.request, work.past + work.tokens) for work in event.work if work.request not in done)
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
    return held, chains


def _place(
    block: Block, owners: Mapping[int, tuple[int, ...]], chains: Mapping[int, Sequence[int]]
) -> tuple[bool, int, int, Block]:
    """Sorts the blocks of an event by their places in chains."""
    before = owners.get(block.number)
    place = chains[before[0]].index(block.number) if before else MOST
    return not block.token_ids, place, block.number, block


def _filled(
    blocks: Mapping[int, Block], held: Mapping[int, int], chains: Mapping[int, Sequence[int]], size: int
) -> dict[int, int]:
    """Places with a token of each block in use; a shared one is as full as the request that filled it most."""
    filled = {number: size if block.token_ids else 0 for number, block in blocks.items() if block.owners}
    for request, chain in chains.items():
        for place, number in enumerate(chain):
            if number in filled:
                mine = min(size, max(0, held.get(request, 0) - place * size))
                filled[number] = max(filled[number], mine)
    return filled


@dataclass(frozen=True)
class History:
    """All steps, ``width`` of them a bar: blocks after each bar's last step, and the tokens of all its steps.

    ``reused`` are tokens that admitted requests found in the cache; ``preempted`` those who lost their blocks.
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
        """The bar in which a step is."""
        return (step - self.first) // self.width

    def last(self, bar: int) -> int:
        """A bar's last step, if the session got so far."""
        return self.first + (bar + 1) * self.width - 1


def history(events: Sequence[StepEvent]) -> History:
    """The steps that are kept, as at most BARS bars."""
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
    """The blocks of each cell of the map: all blocks, or those of a large pool that were ever used, in runs if many."""
    if num_blocks <= DRAWN:
        return tuple(range(number, number + 1) for number in range(num_blocks))
    numbers = sorted(ever_used)
    if len(numbers) <= DRAWN:
        return tuple(range(number, number + 1) for number in numbers)
    width = -(-(numbers[-1] + 1) // DRAWN)
    return tuple(range(start, min(start + width, num_blocks)) for start in range(0, numbers[-1] + 1, width))
