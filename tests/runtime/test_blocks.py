"""The block manager against a plain loop over lists, and its promises one by one."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from trtlab.runtime.blocks import BlockManager, Chain
from trtlab.runtime.events import Block, EventLog, StepEvent


class Model:
    """The pool in plain lists. Content is known by all tokens up to a block's end, without hashes."""

    def __init__(self, num_blocks, size, reuse):
        self.num_blocks, self.size, self.reuse = num_blocks, size, reuse
        self.held: dict[int, list[int]] = {}
        self.committed: dict[int, int] = {}  # blocks that had their chance to become known content
        self.freed: list[int] = []
        self.cached: list[int] = []  # longest unused first
        self.fresh = list(range(num_blocks))
        self.content: dict[int, tuple[int, ...]] = {}

    def owners(self, block):
        return tuple(sorted(owner for owner, blocks in self.held.items() if block in blocks))

    @property
    def available(self):
        return len(self.freed) + len(self.cached) + len(self.fresh)

    def match(self, tokens):
        found = []
        for end in range(self.size, len(tokens), self.size):
            block = next((b for b, known in self.content.items() if known == tuple(tokens[:end])), None)
            if block is None:
                break
            found.append(block)
        return found

    def open(self, owner, blocks, committed):
        self.held[owner], self.committed[owner] = list(blocks), committed
        self.cached = [block for block in self.cached if block not in blocks]

    def take(self):
        if self.freed:
            self.freed.sort()
            return self.freed.pop(0)
        if self.fresh:
            return self.fresh.pop(0)
        block = self.cached.pop(0)
        del self.content[block]
        return block

    def drop(self, owner, block):
        self.held[owner].remove(block)
        if not self.owners(block):
            (self.cached if block in self.content else self.freed).append(block)

    def reserve(self, owner, past, tokens):
        """The copies, or None; the shared block in the way is exchanged, the rest is appended."""
        blocks = self.held[owner]
        index, copies = past // self.size, []
        must_copy = index < len(blocks) and len(self.owners(blocks[index])) > 1
        missing = max(0, -(-tokens // self.size) - len(blocks))
        if missing + must_copy > self.available:
            return None
        if must_copy:
            source = blocks[index]
            self.drop(owner, source)
            target = self.take()
            blocks.insert(index, target)
            copies.append((source, target))
        for _ in range(missing):
            blocks.append(self.take())
        return copies

    def commit(self, owner, tokens, past):
        for index in range(self.committed[owner], past // self.size):
            self.committed[owner] = index + 1
            known = tuple(tokens[: (index + 1) * self.size])
            block = self.held[owner][index]
            if self.reuse and block not in self.content and known not in self.content.values():
                self.content[block] = known

    def release(self, owner):
        for block in list(reversed(self.held[owner])):
            self.drop(owner, block)
        del self.held[owner]

    def forget(self):
        for block in self.cached:
            del self.content[block]
        self.freed += self.cached
        self.cached = []

    def block(self, number):
        known = self.content.get(number, ())
        return Block(number, self.owners(number), number in self.cached, known[-self.size :])


class Machine(RuleBasedStateMachine):
    """Chains open, grow, share, fork and go, in the manager and in the model alike."""

    counted: ClassVar[Counter[str]] = Counter()

    @initialize(num_blocks=st.integers(1, 12), size=st.integers(1, 4), reuse=st.sampled_from([True, True, True, False]))
    def start(self, num_blocks, size, reuse):
        self.manager = BlockManager(num_blocks, size, enable_reuse=reuse)
        self.model = Model(num_blocks, size, reuse)
        self.chains: dict[int, Chain] = {}
        self.past: dict[int, int] = {}
        self.memory = [[None] * size for _ in range(num_blocks)]  # what a rank would hold
        self.shadow: dict[int, Block] = {}
        self.log, self.history = EventLog(4), []
        self.numbers = iter(range(1, 10**6))

    def chain(self, pick):
        return list(self.chains.values())[pick % len(self.chains)]

    # Few tokens and few beginnings, so that prefixes meet.
    @precondition(lambda self: len(self.chains) < 6)
    @rule(beginning=st.sampled_from([0, 0, 0, 1]), length=st.integers(1, 18), turn=st.integers(0, 20))
    def open(self, beginning, length, turn):
        tokens = [beginning] * min(length, turn) + [1 - beginning] * (length - turn)
        chain = Chain(next(self.numbers), tokens)
        prefix = self.manager.match(chain)
        assert prefix == (self.model.match(tokens) if self.model.reuse else [])
        assert self.manager.unused(prefix) == sum(not self.model.owners(block) for block in prefix)
        assert self.manager.open(chain, prefix) == len(prefix) * self.model.size < len(tokens)
        self.model.open(chain.owner, prefix, len(prefix))
        self.chains[chain.owner], self.past[chain.owner] = chain, len(prefix) * self.model.size
        for index, block in enumerate(prefix):  # what is shared is what would have been computed
            assert self.memory[block] == self.written(chain, index * self.model.size, (index + 1) * self.model.size)
        self.counted["reused blocks"] += len(prefix)

    def written(self, chain, start, stop):
        """What computing the places leaves in them: as K and V, it depends on all tokens before."""
        return [tuple(chain.token_ids[: place + 1]) for place in range(start, stop)]

    @precondition(lambda self: self.chains)
    @rule(pick=st.integers(0, 5), tokens=st.integers(1, 9), fail=st.sampled_from([False, False, False, True]))
    def compute(self, pick, tokens, fail):
        """Reserve places, copy, write and commit; or stop after the reservation, as when a step fails."""
        chain = self.chain(pick)
        past = self.past[chain.owner]
        end = past + tokens
        while len(chain.token_ids) < end:
            chain.token_ids.append(chain.token_ids[0])
        before = [self.manager.block(number) for number in range(self.model.num_blocks)]
        demand, available = self.manager.demand(chain, past, end), self.manager.available
        copies = self.manager.reserve(chain, past, end)
        assert copies == self.model.reserve(chain.owner, past, end)
        assert (copies is None) == (demand > available)
        if copies is None:
            self.counted["refused"] += 1
            assert before == [self.manager.block(number) for number in range(self.model.num_blocks)]
            return
        for source, target in copies:
            self.memory[target] = list(self.memory[source])
        self.counted["copies"] += len(copies)
        size = self.model.size
        writable = chain.blocks[past // size : -(-end // size)]
        assert all(self.manager.block(block).owners == (chain.owner,) for block in writable)
        assert not any(self.manager.block(block).token_ids for block in writable), "known content is never overwritten"
        if fail:
            return
        for place, value in enumerate(self.written(chain, past, end), past):
            self.memory[chain.blocks[place // size]][place % size] = value
        self.past[chain.owner] = end
        self.manager.commit(chain, end)
        self.model.commit(chain.owner, chain.token_ids, end)

    @precondition(lambda self: self.chains and len(self.chains) < 6)
    @rule(pick=st.integers(0, 5))
    def fork(self, pick):
        parent = self.chain(pick)
        past = self.past[parent.owner]
        child = Chain(next(self.numbers), list(parent.token_ids))
        self.manager.fork(parent, child, past)
        self.model.open(child.owner, parent.blocks[: -(-past // self.model.size)], past // self.model.size)
        self.chains[child.owner], self.past[child.owner] = child, past

    @precondition(lambda self: self.chains)
    @rule(pick=st.integers(0, 5))
    def release(self, pick):
        chain = self.chain(pick)
        self.manager.release(chain)
        self.model.release(chain.owner)
        assert chain.blocks == () and chain.committed == 0
        del self.chains[chain.owner], self.past[chain.owner]

    @rule(really=st.sampled_from([False, False, True]))
    def forget(self, really):
        if really:
            self.manager.forget()
            self.model.forget()

    @rule()
    def end_a_step(self):
        changes = self.manager.changes()
        self.shadow.update({block.number: block for block in changes})
        now = {number: self.model.block(number) for number in range(self.model.num_blocks)}
        assert {number: self.shadow.get(number, Block(number)) for number in now} == now
        self.log.append(event(len(self.history), changes))
        self.history.append({number: block for number, block in now.items() if block.state != "free"})
        kept = len(self.log)
        assert [self.log.blocks_after(index) for index in range(kept)] == self.history[-kept:]
        assert self.log.blocks_after(-1) == self.history[-1]

    @invariant()
    def the_same_as_the_model(self):
        if not hasattr(self, "manager"):
            return
        self.counted["steps"] += 1
        manager, model = self.manager, self.model
        manager.check_integrity()
        assert {chain.owner: list(chain.blocks) for chain in manager.chains()} == model.held
        blocks = [manager.block(number) for number in range(model.num_blocks)]
        assert blocks == [model.block(number) for number in range(model.num_blocks)]
        states = Counter(block.state for block in blocks)
        assert manager.used == states["used"] + states["shared"] and manager.shared == states["shared"]
        assert manager.cached == states["cached"] and manager.available == states["cached"] + states["free"]
        assert list(manager._cached) == model.cached
        for owner, chain in self.chains.items():  # nobody's tokens were overwritten
            places = [place for block in chain.blocks for place in self.memory[block]]
            assert places[: self.past[owner]] == self.written(chain, 0, self.past[owner])
        self.counted["evicted"] = max(self.counted["evicted"], manager.evicted)


def event(step, changes=()):
    return StepEvent(step, 0.0, 0.0, (), (), (), (), (), changes, 0, 0, 0)


@pytest.mark.slow
def test_any_sequence_of_operations_leaves_what_plain_lists_hold():
    Machine.counted.clear()
    run_state_machine_as_test(Machine, settings=settings(max_examples=270, stateful_step_count=50))
    seen = Machine.counted
    assert seen["steps"] >= 10_000
    assert min(seen["reused blocks"], seen["copies"], seen["refused"], seen["evicted"]) > 0, "each case was met"


# --- one by one


def computed(manager, owner, tokens):
    """A chain whose tokens are all computed."""
    chain = Chain(owner, list(tokens))
    past = manager.open(chain, manager.match(chain))
    assert manager.reserve(chain, past, len(tokens)) == []
    manager.commit(chain, len(tokens))
    return chain


@given(st.integers(1, 40), st.integers(1, 9))
def test_an_identical_prompt_reuses_all_whole_blocks_before_its_last_token(length, size):
    manager = BlockManager(64, size)
    manager.release(computed(manager, 1, range(length)))
    again = Chain(2, list(range(length)))
    assert manager.open(again, manager.match(again)) == (length - 1) // size * size
    manager.check_integrity()


@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 7))
def test_a_prompt_that_departs_reuses_the_whole_blocks_before_that(length, same, size):
    manager = BlockManager(64, size)
    manager.release(computed(manager, 1, range(length)))
    other = Chain(2, [*range(min(same, length)), *range(100, 130)])
    assert manager.open(other, manager.match(other)) == min(same, length) // size * size


def test_a_prefix_shorter_than_a_block_reuses_nothing():
    manager = BlockManager(8, 4)
    manager.release(computed(manager, 1, [1, 2, 3]))
    assert manager.match(Chain(2, [1, 2, 3, 4, 5])) == [] and manager.cached == 0


def test_the_same_tokens_after_another_beginning_are_not_reused():
    manager = BlockManager(8, 2)
    manager.release(computed(manager, 1, [1, 2, 3, 4]))
    assert manager.match(Chain(2, [9, 9, 3, 4, 5])) == []
    assert manager.match(Chain(3, [3, 4, 5])) == []


def test_a_colliding_hash_is_not_taken_for_the_same_prefix(monkeypatch):
    monkeypatch.setattr("trtlab.runtime.blocks.hash", lambda _: 1, raising=False)
    manager = BlockManager(8, 2)
    first = computed(manager, 1, [1, 2, 3])
    assert manager.match(Chain(2, [5, 6, 7])) == []
    assert manager.match(Chain(3, [1, 2, 7])) == list(first.blocks[:1])
    manager.release(computed(manager, 4, [5, 6, 5, 6, 7]))
    manager.check_integrity()


def test_reuse_can_be_forbidden():
    manager = BlockManager(8, 2, enable_reuse=False)
    manager.release(computed(manager, 1, range(7)))
    assert manager.match(Chain(2, list(range(7)))) == [] and manager.cached == 0 and manager.available == 8


def test_freed_blocks_are_reused_first():
    manager = BlockManager(8, 2, enable_reuse=False)
    first, second = computed(manager, 1, range(6)), computed(manager, 2, range(4))
    assert (first.blocks, second.blocks) == ((0, 1, 2), (3, 4))
    manager.release(first)
    assert computed(manager, 3, range(8)).blocks == (0, 1, 2, 5)


def test_what_is_cached_is_evicted_only_when_nothing_is_free():
    manager = BlockManager(4, 2)
    manager.release(computed(manager, 1, [1, 2]))
    chain = computed(manager, 2, [5, 6, 7, 8, 9, 9])
    assert manager.evicted == 0 and manager.block(0).state == "cached" and chain.blocks == (1, 2, 3)
    assert manager.reserve(chain, 6, 8) == [] and manager.evicted == 1 and chain.blocks == (1, 2, 3, 0)
    manager.check_integrity()


def test_the_block_unused_longest_is_evicted_first():
    manager = BlockManager(3, 2)
    a, b, c = (computed(manager, number, [number, number]) for number in (1, 2, 3))
    for chain in (b, c, a):
        manager.release(chain)
    numbers = []
    filling = Chain(9, [0] * 6)
    manager.open(filling)
    for past in (0, 2, 4):
        manager.reserve(filling, past, past + 2)
        numbers.append(filling.blocks[-1])
    assert numbers == [1, 2, 0]


def test_using_a_cached_block_makes_it_the_last_to_be_evicted():
    manager = BlockManager(3, 2)
    for number in (1, 2, 3):
        manager.release(computed(manager, number, [number, number]))
    again = Chain(4, [1, 1, 5])
    manager.open(again, manager.match(again))
    manager.release(again)
    filling = Chain(9, [0] * 4)
    manager.open(filling)
    manager.reserve(filling, 0, 4)
    assert filling.blocks == (1, 2) and manager.block(0).state == "cached"


def test_the_tail_of_a_chain_is_evicted_before_its_head():
    manager = BlockManager(4, 2)
    manager.release(computed(manager, 1, range(8)))
    filling = Chain(2, [50] * 8)
    manager.open(filling)
    for past, left in ((0, 3), (2, 2), (4, 1), (6, 0)):
        assert manager.reserve(filling, past, past + 2) == []
        assert len(manager.match(Chain(3, list(range(9))))) == left


def test_a_forked_chain_shares_all_blocks_until_one_writes():
    manager = BlockManager(8, 4)
    parent = computed(manager, 1, range(6))
    child = Chain(2, list(range(6)))
    manager.fork(parent, child, 6)
    assert child.blocks == parent.blocks == (0, 1) and manager.shared == 2 and manager.used == 2
    assert manager.demand(child, 6, 7) == 1
    assert manager.reserve(child, 6, 7) == [(1, 2)] and child.blocks == (0, 2)
    assert manager.reserve(parent, 6, 7) == [], "the block is the parent's alone now"
    assert manager.shared == 1
    manager.check_integrity()


def test_a_fork_at_a_block_boundary_copies_nothing():
    manager = BlockManager(8, 4)
    parent = computed(manager, 1, range(8))
    child = Chain(2, list(range(8)))
    manager.fork(parent, child, 8)
    assert manager.reserve(child, 8, 9) == [] and manager.reserve(parent, 8, 9) == []
    assert child.blocks[:2] == parent.blocks[:2] and child.blocks[2] != parent.blocks[2]


def test_what_does_not_fit_changes_nothing():
    manager = BlockManager(2, 2)
    chain = computed(manager, 1, range(3))
    manager.changes()
    assert manager.reserve(chain, 3, 5) is None
    assert chain.blocks == (0, 1) and manager.changes() == () and manager.available == 0
    manager.check_integrity()


def test_two_that_compute_the_same_prefix_leave_one_copy_of_it():
    manager = BlockManager(8, 2)
    chains = [Chain(number, [4, 5, 6]) for number in (1, 2)]
    for chain in chains:
        manager.open(chain, manager.match(chain))
        manager.reserve(chain, 0, 3)
    for chain in chains:
        manager.commit(chain, 3)
    for chain in chains:
        manager.release(chain)
        manager.check_integrity()
    assert manager.cached == 1 and manager.available == 8


def test_forget_leaves_what_is_in_use():
    manager = BlockManager(8, 2)
    running = computed(manager, 1, [1, 2, 3, 4])
    manager.release(computed(manager, 2, [7, 8, 9]))
    manager.forget()
    assert manager.cached == 0 and manager.used == 2
    assert manager.match(Chain(3, [7, 8, 9])) == []
    assert manager.match(Chain(4, [1, 2, 3, 4, 5])) == list(running.blocks)


@pytest.mark.parametrize(
    "damage",
    [
        lambda m, c: m._freed.append(c.blocks[0]),
        lambda m, c: m._owners.pop(c.blocks[0]),
        lambda m, c: setattr(c, "blocks", c.blocks[:-1]),
        lambda m, c: m._by_hash.clear(),
        lambda m, c: m._cached.update({c.blocks[0]: None}),
        lambda m, c: setattr(m, "_fresh", 5),
        lambda m, c: setattr(c, "blocks", (*c.blocks, c.blocks[0])),
    ],
)
def test_damaged_books_are_noticed(damage):
    manager = BlockManager(8, 2)
    chain = computed(manager, 1, range(5))
    manager.check_integrity()
    damage(manager, chain)
    with pytest.raises(AssertionError):
        manager.check_integrity()
