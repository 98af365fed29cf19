"""A read-only view of the KV cache: blocks, sharing, fragmentation, reuse. Only ``clear`` changes it."""

from __future__ import annotations

from trtlab.card import Shown
from trtlab.runtime.blocks import BlockManager
from trtlab.runtime.events import Block
from trtlab.runtime.exclusive import Exclusive
from trtlab.runtime.pool_size import PoolSize
from trtlab.runtime.scheduler import Scheduler


class KvCache(Shown):
    """A live view of the pool: every property gives the present state."""

    def __init__(self, pool: PoolSize, blocks: BlockManager, scheduler: Scheduler, exclusive: Exclusive) -> None:
        self.pool = pool
        self._blocks = blocks
        self._scheduler = scheduler
        self._exclusive = exclusive

    @property
    def reuse_enabled(self) -> bool:
        """Whether prompts can reuse blocks that were computed before."""
        return self._blocks.enable_reuse

    @property
    def used(self) -> int:
        """Blocks in use by at least one request."""
        return self._blocks.used

    @property
    def shared(self) -> int:
        """Blocks in use by more than one request."""
        return self._blocks.shared

    @property
    def cached(self) -> int:
        """Blocks that no request uses and that can be reused."""
        return self._blocks.cached

    @property
    def free(self) -> int:
        """Blocks without content."""
        return self._blocks.available - self._blocks.cached

    @property
    def evicted(self) -> int:
        """How many cached blocks were overwritten so far because other blocks were not left."""
        return self._blocks.evicted

    def block(self, number: int) -> Block:
        """One block as it is now."""
        return self._blocks.block(number)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every block of the pool, by number."""
        return tuple(self._blocks.block(number) for number in range(self._blocks.num_blocks))

    @property
    def chains(self) -> dict[int, tuple[int, ...]]:
        """The blocks of each running request, in the order of its tokens."""
        return {chain.owner: tuple(chain.blocks) for chain in self._blocks.chains()}

    @property
    def held(self) -> dict[int, int]:
        """Number of tokens whose K and V are cached, for each request with a slot."""
        return {request.number: request.past for request in (*self._scheduler.running, *self._scheduler.spent)}

    @property
    def tokens(self) -> int:
        """Positions in use that hold a token; those of a shared block count once."""
        size, filled = self._blocks.tokens_per_block, dict[int, int]()
        for request in self._scheduler.running:
            for index, block in enumerate(request.chain.blocks):
                tokens = min(size, max(0, request.past - index * size))
                filled[block] = max(tokens, filled.get(block, 0))
        return sum(filled.values())

    @property
    def fragmentation(self) -> float:
        """The share (0 to 1) of positions in used blocks that hold no token: the cost of large blocks. 0 when idle."""
        places = self.used * self._blocks.tokens_per_block
        return 1 - self.tokens / places if places else 0.0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all requests so far, counted when a request gets its slot."""
        return self._scheduler.prompt_tokens

    @property
    def reused_tokens(self) -> int:
        """How many of ``prompt_tokens`` were found in the cache."""
        return self._scheduler.reused_tokens

    @property
    def short_prompts(self) -> int:
        """Requests of one block or less. They reuse nothing: only whole blocks are reused, and never the last token."""
        return self._scheduler.short_prompts

    def clear(self) -> int:
        """Drop the cached blocks that no request uses; returns their number."""
        with self._exclusive.changes():
            dropped = self._blocks.cached
            self._blocks.forget()
            return dropped
