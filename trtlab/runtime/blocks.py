"""Keeps account of the KV cache's block pool: free blocks, owners of used blocks, and prefixes that can be reused.

Knows tokens and block numbers, no tensors: the ranks hold the memory that the numbers stand for.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trtlab.runtime.events import Block


@dataclass(eq=False)
class Chain:
    """The blocks of one request, in the order of its tokens.

    ``owner`` is the request's number and ``token_ids`` its own list, which grows. ``blocks`` is replaced, never changed
    in place: a step that was sent keeps the old tuple. ``hashes`` are the rolling hashes of the full blocks, computed
    when needed. ``committed`` counts the blocks that are full and computed.
    """

    owner: int
    token_ids: Sequence[int]
    blocks: tuple[int, ...] = ()
    hashes: list[int] = field(default_factory=list)
    committed: int = 0


@dataclass(frozen=True)
class Prefix:
    """What a computed full block holds: its tokens, and the rolling hash of all tokens up to its end.

    ``before`` is the rolling hash up to the block's start, 0 for a first block.
    """

    hash: int
    before: int
    token_ids: tuple[int, ...]


class BlockManager:
    """A pool of ``num_blocks`` blocks of ``tokens_per_block`` tokens.

    A full block is shared with every request that has the same prefix, so that it is computed once. A block that no
    request uses keeps its content until its memory is needed; the block that has been unused longest is evicted first.
    A shared block is never written: a request that must write to it takes a copy.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int, *, enable_reuse: bool = True) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.enable_reuse = enable_reuse
        self._touched: set[int] = set()  # changed since the last call of changes()
        self.evicted = 0
        self._fresh = 0  # blocks from this number on were never used
        self._set_empty()

    def _set_empty(self) -> None:
        self._owners: dict[int, set[int]] = {}  # of each block in use
        self._chains: dict[int, Chain] = {}
        self._freed = list(range(self._fresh))  # a heap: the lowest is taken first, so a chain's blocks lie together
        self._cached: OrderedDict[int, None] = OrderedDict()  # unused blocks with content, longest unused first
        self._content: dict[int, Prefix] = {}
        self._by_hash: dict[int, int] = {}

    def reset(self) -> None:
        """Free every block and forget all content and chains, whatever their state is."""
        self._touched.update(range(self._fresh))
        self._set_empty()

    @property
    def used(self) -> int:
        """Blocks in use by at least one request."""
        return len(self._owners)

    @property
    def cached(self) -> int:
        """Blocks that no request uses and that keep their content for reuse."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that a request can take: the free ones, and the cached ones by eviction."""
        return self.num_blocks - len(self._owners)

    @property
    def shared(self) -> int:
        """Blocks in use by more than one request."""
        return sum(len(owners) > 1 for owners in tuple(self._owners.values()))  # a reader may be another thread

    def required(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.tokens_per_block)

    def match(self, chain: Chain) -> list[int]:
        """The full blocks that hold the chain's prefix; never its last token, because its logits must be computed."""
        prefix: list[int] = []
        if not self.enable_reuse:
            return prefix
        before = 0
        for index in range((len(chain.token_ids) - 1) // self.tokens_per_block):
            rolling = self._hash(chain, index)
            block = self._by_hash.get(rolling)
            if block is None or self._content[block] != Prefix(rolling, before, self._tokens(chain, index)):
                break
            prefix.append(block)
            before = rolling
        return prefix

    def unused(self, blocks: Iterable[int]) -> int:
        """How many of these blocks no request uses: sharing them makes that many fewer available."""
        return sum(block not in self._owners for block in blocks)

    def open(self, chain: Chain, prefix: Sequence[int] = ()) -> int:
        """Begin a chain with the blocks of a known prefix; returns the number of tokens that need not be computed."""
        assert chain.owner not in self._chains and not chain.blocks, f"chain is open already: {chain}"
        self._chains[chain.owner] = chain
        for block in prefix:
            self._share(block, chain)
        chain.blocks = tuple(prefix)
        chain.committed = len(chain.blocks)
        return chain.committed * self.tokens_per_block

    def fork(self, parent: Chain, child: Chain, past: int) -> None:
        """Begin ``child`` with the blocks of the parent's first ``past`` tokens, also a partly filled one."""
        self.open(child, parent.blocks[: self.required(past)])
        child.committed = past // self.tokens_per_block
        child.hashes = parent.hashes[: child.committed]

    def demand(self, chain: Chain, past: int, tokens: int) -> int:
        """Blocks that the chain must take to hold ``tokens`` tokens; a shared block it must copy counts as one."""
        return max(0, self.required(tokens) - len(chain.blocks)) + (self._sharers(chain, past) > 1)

    def writable(self, chain: Chain, past: int) -> bool:
        """Whether the next token's place is in a block that the chain has already and shares with no other."""
        index = past // self.tokens_per_block
        return index < len(chain.blocks) and len(self._owners[chain.blocks[index]]) == 1

    def _sharers(self, chain: Chain, past: int) -> int:
        """How many requests use the block of the chain's next token; 0 when the chain has no such block yet."""
        index = past // self.tokens_per_block
        return len(self._owners[chain.blocks[index]]) if index < len(chain.blocks) else 0

    def reserve(self, chain: Chain, past: int, tokens: int) -> list[tuple[int, int]] | None:
        """Make positions ``past`` to ``tokens`` of the chain writable.

        Returns:
            The block copies (source, target) that must run first; None when the pool has too few blocks, and then
            nothing has changed.
        """
        if self.demand(chain, past, tokens) > self.available:
            return None
        blocks, copies = list(chain.blocks), []
        if self._sharers(chain, past) > 1:  # of all shared blocks, only the partly filled one is written to
            index = past // self.tokens_per_block
            source = blocks[index]
            self._drop(source, chain)
            blocks[index] = self._take(chain)
            copies.append((source, blocks[index]))
        while len(blocks) < self.required(tokens):
            blocks.append(self._take(chain))
        if copies or len(blocks) > len(chain.blocks):
            chain.blocks = tuple(blocks)
        return copies

    def commit(self, chain: Chain, past: int) -> None:
        """Record that ``past`` tokens of the chain are computed: its full blocks can be reused from now on."""
        while (index := chain.committed) < past // self.tokens_per_block:
            block = chain.blocks[index]
            if self.enable_reuse:
                rolling = self._hash(chain, index)
                if rolling not in self._by_hash and block not in self._content:
                    before = chain.hashes[index - 1] if index else 0
                    self._content[block] = Prefix(rolling, before, self._tokens(chain, index))
                    self._by_hash[rolling] = block
                    self._touched.add(block)
            chain.committed += 1

    def release(self, chain: Chain) -> None:
        """Free the chain's blocks. Those with content stay cached for reuse; the chain's end is evicted first."""
        del self._chains[chain.owner]
        for block in reversed(chain.blocks):
            self._drop(block, chain)
        chain.blocks = ()
        chain.committed = 0

    def forget(self) -> None:
        """Drop every prefix that no request uses; later requests compute it again."""
        while self._cached:
            self._evict()

    def block(self, number: int) -> Block:
        """One block as it is now."""
        content = self._content.get(number)
        owners = tuple(sorted(self._owners.get(number, ())))
        return Block(number, owners, number in self._cached, content.token_ids if content else ())

    def chains(self) -> tuple[Chain, ...]:
        """All chains, in order of request number."""
        return tuple(chain for _, chain in sorted(self._chains.items()))

    def changes(self) -> tuple[Block, ...]:
        """The blocks whose owners or content changed since the last call, as they are now."""
        changed = tuple(self.block(number) for number in sorted(self._touched))
        self._touched.clear()
        return changed

    def _hash(self, chain: Chain, index: int) -> int:
        """The rolling hash of the chain's tokens up to the end of a full block."""
        while len(chain.hashes) <= index:
            before = chain.hashes[-1] if chain.hashes else 0
            chain.hashes.append(hash((before, self._tokens(chain, len(chain.hashes)))))
        return chain.hashes[index]

    def _tokens(self, chain: Chain, index: int) -> tuple[int, ...]:
        size = self.tokens_per_block
        return tuple(chain.token_ids[index * size : (index + 1) * size])

    def _share(self, block: int, chain: Chain) -> None:
        self._cached.pop(block, None)
        self._owners.setdefault(block, set()).add(chain.owner)
        self._touched.add(block)

    def _take(self, chain: Chain) -> int:
        """Take a freed block, else a block that was never used, else the cached block that was unused longest."""
        if self._freed:
            block = heapq.heappop(self._freed)
        elif self._fresh < self.num_blocks:
            block = self._fresh
            self._fresh += 1
        else:
            self._evict()
            self.evicted += 1
            block = heapq.heappop(self._freed)
        self._owners[block] = {chain.owner}
        self._touched.add(block)
        return block

    def _drop(self, block: int, chain: Chain) -> None:
        owners = self._owners[block]
        owners.remove(chain.owner)
        self._touched.add(block)
        if owners:
            return
        del self._owners[block]
        if block in self._content:
            self._cached[block] = None
        else:
            heapq.heappush(self._freed, block)

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        del self._by_hash[self._content.pop(block).hash]
        heapq.heappush(self._freed, block)
        self._touched.add(block)

    def check_integrity(self) -> None:
        """Raise AssertionError when the account is inconsistent: lost blocks, wrong owners, missing prefixes."""
        owners: dict[int, set[int]] = {}
        for owner, chain in self._chains.items():
            assert chain.owner == owner, (owner, chain)
            assert len(set(chain.blocks)) == len(chain.blocks), chain
            assert chain.committed <= len(chain.blocks), chain
            for block in chain.blocks:
                owners.setdefault(block, set()).add(owner)
        assert owners == self._owners, (owners, self._owners)
        freed, cached, used = set(self._freed), set(self._cached), set(owners)
        assert len(freed) == len(self._freed), self._freed
        assert not (freed & cached or freed & used or cached & used), (freed, cached, used)
        lost = set(range(self._fresh)) ^ (freed | cached | used)
        assert not lost, f"blocks {lost} are neither freed, cached nor used, or beyond {self._fresh}"
        assert 0 <= self._fresh <= self.num_blocks, (self._fresh, self.num_blocks)
        assert cached <= set(self._content), f"cached blocks without content: {cached - set(self._content)}"
        assert set(self._content) <= cached | used, f"freed blocks with content: {freed & set(self._content)}"
        hashes = {prefix.hash: block for block, prefix in self._content.items()}
        assert hashes == self._by_hash, (hashes, self._by_hash)
