"""The scheduler's promises: bounds, order, chunks of whole blocks, room kept free, and nobody starves."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtlab import RequestError, SamplingParams
from trtlab.runtime.blocks import BlockManager
from trtlab.runtime.request_state import PRIORITY_STEPS, RequestState
from trtlab.runtime.scheduler import Scheduler


class Bed:
    """A scheduler and someone who carries out its plans: every finished prompt gets one more token a step."""

    def __init__(self, num_blocks=64, size=4, *, batch=4, budget=32, reuse=False, **kind):
        self.blocks = BlockManager(num_blocks, size, enable_reuse=reuse)
        self.scheduler = Scheduler(self.blocks, max_batch_size=batch, max_num_tokens=budget, **kind)
        self.batch, self.budget, self.size = batch, budget, size
        self.in_flight = kind.get("in_flight", True)
        self.numbers = itertools.count(1)
        self.steps = 0
        self.finished = {}  # request: the step
        self.plan = None

    def add(self, prompt, new=4, priority=0):
        ids = tuple(prompt) if not isinstance(prompt, int) else tuple([next(self.numbers) + 1000] * prompt)
        params = SamplingParams(max_new_tokens=new)
        request = RequestState(next(self.numbers), ids, params, priority=priority, arrival=self.steps)
        self.scheduler.refuse_if_never(request)
        self.scheduler.add(request)
        return request

    def step(self):
        """Plan, check the bounds, carry out; gives {request: tokens}."""
        plan = self.plan = self.scheduler.next()
        self.scheduler.check_integrity()
        assert plan.chunks or not self.scheduler.waiting
        assert sum(len(chunk.token_ids) for chunk in plan.chunks.values()) <= self.budget
        assert len(plan.chunks) <= self.batch
        spent = {request: chunk for request, chunk in plan.chunks.items() if request in self.finished}
        assert all(len(chunk.token_ids) == 1 for chunk in spent.values()) and not (spent and self.in_flight)
        work = {request: chunk for request, chunk in plan.chunks.items() if request not in spent}
        for request, chunk in work.items():
            assert chunk.slot == request.slot and chunk.past == request.past
            end = chunk.past + len(chunk.token_ids)
            assert list(chunk.token_ids) == request.token_ids[chunk.past : end]
            assert chunk.blocks == request.chain.blocks and len(chunk.blocks) * self.size >= end
            assert end == request.total or len(chunk.token_ids) % self.size == 0 or self.size > self.budget
            self.scheduler.computed(request, len(chunk.token_ids))
            if end == request.total:
                request.accept(7, None)
            if request.done:
                self.scheduler.release(request)
                self.finished[request] = self.steps
        self.scheduler.check_integrity()
        self.steps += 1
        return {request: len(chunk.token_ids) for request, chunk in work.items()}

    def until(self, *requests, most=500):
        for _ in range(most):
            if all(request in self.finished for request in requests):
                return self.steps
            self.step()
        raise AssertionError(f"not finished within {most} steps")


kinds = {
    "no_evict": st.booleans(),
    "in_flight": st.booleans(),
    "chunked": st.booleans(),
    "reuse": st.booleans(),
}
jobs = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=12)


@given(st.integers(1, 4), st.integers(0, 12), st.integers(1, 8), st.integers(0, 20), st.fixed_dictionaries(kinds), jobs)
def test_every_request_is_served_whole_within_the_bounds(batch, spare, size, more_blocks, kind, jobs):
    budget = batch + spare + (0 if kind["chunked"] else 30)
    bed = Bed(-(-39 // size) + more_blocks, size, batch=batch, budget=budget, **kind)
    left, all_requests = sorted(jobs, key=lambda job: job[2]), []
    while left or bed.scheduler.waiting or bed.scheduler.running:
        while left and left[0][2] <= bed.steps:
            prompt, new, _ = left.pop(0)
            all_requests.append(bed.add([prompt % 3] * prompt, new))
        bed.step()
        if not kind["no_evict"] or bed.plan.preempted:
            continue
        generating = {request for request in bed.scheduler.running if request.output_ids}
        assert generating <= set(bed.plan.chunks), "a request that generates gets its token"
    assert set(bed.finished) == set(all_requests)
    assert bed.blocks.used == 0
    assert all(len(request.output_ids) == request.params.max_new_tokens for request in all_requests)


def test_first_come_first_served():
    bed = Bed(batch=1)
    first, second, third = bed.add(3), bed.add(1), bed.add(2)
    bed.until(first, second, third)
    assert bed.finished[first] < bed.finished[second] < bed.finished[third]


def test_a_higher_priority_goes_first_and_does_not_interrupt():
    bed = Bed(batch=1)
    running = bed.add(3)
    bed.step()
    plain, urgent = bed.add(3), bed.add(3, priority=1)
    bed.until(running, plain, urgent)
    assert bed.finished[running] < bed.finished[urgent] < bed.finished[plain]


def test_a_stream_of_urgent_requests_delays_a_plain_one_by_a_bounded_wait():
    bed = Bed(batch=1)
    bed.add(1, 1, priority=1)
    plain = bed.add(1, 1)
    for _ in range(PRIORITY_STEPS + 10):
        bed.add(1, 1, priority=1)
        bed.step()
    assert PRIORITY_STEPS - 1 <= bed.finished[plain] <= PRIORITY_STEPS + 2


@given(
    st.integers(1, 4),
    st.integers(0, 8),
    st.integers(1, 8),
    st.integers(1, 30),
    st.integers(1, 9),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.fixed_dictionaries(kinds | {"reuse": st.just(False)}),
)
def test_nobody_starves_while_short_requests_keep_coming(batch, spare, size, prompt, new, short, kind):
    budget = batch + spare + (0 if kind["chunked"] else 30)
    bed = Bed(-(-39 // size) + 6, size, batch=batch, budget=budget, **kind)
    for _ in range(batch):
        bed.add(*short)
    bed.step()
    long = bed.add(prompt, new)
    for _ in range(400):
        while len(bed.scheduler.waiting) < 3:
            bed.add(*short)
        bed.step()
        if long in bed.finished:
            return
    raise AssertionError("400 steps, and the request is not through")


def test_newcomers_do_not_take_the_budget_that_a_fork_left_too_small_for_a_prompt_under_way():
    bed = Bed(num_blocks=400, size=8, batch=10, budget=10)
    parent = bed.add(1, 200)
    bed.step()
    long = bed.add(60, 1)
    bed.add(1, 12)
    assert bed.step()[long] == 8 and len(bed.scheduler.running) == 3
    child = RequestState(9999, parent.prompt_ids, SamplingParams(max_new_tokens=200), arrival=bed.steps)
    child.token_ids += parent.output_ids
    assert bed.scheduler.fork(parent, child)
    for _ in range(60):
        while len(bed.scheduler.waiting) < 3:
            bed.add(1, 12)
        bed.step()
    assert long in bed.finished


# --- chunks


@pytest.mark.parametrize(
    ("size", "budget", "expected"), [(4, 10, [8, 8, 5]), (8, 10, [8, 8, 5]), (16, 10, [10, 10, 1])]
)
def test_a_long_prompt_comes_in_chunks_of_whole_blocks_if_one_fits_the_budget(size, budget, expected):
    bed = Bed(size=size, budget=budget)
    request = bed.add(21, 1)
    assert [bed.step()[request] for _ in expected] == expected


def test_requests_that_generate_go_before_prompts():
    bed = Bed(budget=10)
    first = bed.add(3, 9)
    bed.step()
    long = bed.add(30, 1)
    assert [bed.step() for _ in range(2)] == [{first: 1, long: 8}, {first: 1, long: 8}]


def test_without_chunked_context_a_prompt_waits_until_it_fits_whole():
    bed = Bed(budget=10, chunked=False)
    first = bed.add(3, 3)
    bed.step()
    whole, behind = bed.add(10, 1), bed.add(1, 1)
    assert bed.step() == {first: 1} == bed.step(), "and nobody overtakes it"
    assert bed.step() == {whole: 10}
    bed.until(behind)


def test_a_preempted_request_that_outgrew_the_budget_comes_in_parts_without_chunked_context():
    bed = Bed(num_blocks=6, size=4, batch=2, budget=8, chunked=False, no_evict=False)
    first, second = bed.add(8, 10), bed.add(4, 14)
    bed.until(first, second)
    assert second.preemptions > 0 and first.preemptions == 0


def test_a_fork_that_outgrew_the_budget_comes_in_parts_without_chunked_context():
    bed = Bed(batch=1, budget=8, chunked=False)
    parent = bed.add(8, 6)
    for _ in range(5):
        bed.step()
    child = RequestState(99, parent.prompt_ids, SamplingParams(max_new_tokens=8), arrival=bed.steps)
    child.token_ids += parent.output_ids
    assert not bed.scheduler.fork(parent, child), "no slot is free"
    bed.scheduler.add(child)
    bed.until(parent, child)


# --- blocks


def test_without_eviction_a_request_waits_until_the_longest_ends_of_all_fit():
    bed = Bed(num_blocks=8, size=4)
    first, second = bed.add(8, 13), bed.add(4, 9)  # 5 blocks, and 3
    third = bed.add(1, 1)
    assert set(bed.step()) == {first, second}
    bed.until(second)
    assert third not in bed.finished and set(bed.step()) == {first, third}


def test_with_eviction_a_request_joins_at_once_and_the_last_to_come_goes_first():
    bed = Bed(num_blocks=8, size=4, no_evict=False)
    first, second, third, fourth = (bed.add(8, 20) for _ in range(4))
    assert set(bed.step()) == {first, second, third}, "one block more for each that runs must stay free"
    preempted = []
    while not bed.finished:
        bed.step()
        preempted += bed.plan.preempted
    assert preempted[:2] == [third, second] and set(bed.finished) == {first} and not first.preemptions
    bed.until(second, third, fourth)


def test_a_preempted_request_goes_on_before_those_that_came_later():
    bed = Bed(num_blocks=8, size=4, no_evict=False)
    first, second, third = bed.add(8, 20), bed.add(8, 20), bed.add(1, 1)
    while not second.preemptions:
        bed.step()
    assert bed.scheduler.waiting[0] is second
    bed.until(first, second, third)


def test_static_batching_takes_nobody_until_all_are_done():
    bed = Bed(in_flight=False)
    first, second = bed.add(3, 2), bed.add(3, 6)
    bed.step()
    third = bed.add(3, 2)
    while second not in bed.finished:
        assert third not in bed.step()
        assert first in bed.finished and set(bed.plan.chunks) == {first, second}  # its row is computed for nothing
    assert not bed.scheduler.spent and first.slot is None
    assert third in bed.step() and bed.finished[first] < bed.finished[second]


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    bed = Bed(num_blocks=4, size=8)
    bed.add(20, 13)
    with pytest.raises(RequestError) as caught:
        bed.add(20, 14)
    text = str(caught.value)
    assert "needs 5 KV blocks and the pool has 4" in text and "20 tokens and max_new_tokens 14" in text
    assert "32 tokens at most" in text and "max_tokens_in_paged_kv_cache" in text


def test_a_reused_prefix_is_not_computed_again():
    bed = Bed(reuse=True)
    first = bed.add(range(21), 1)
    bed.until(first)
    again = bed.add(range(21), 1)
    assert bed.step() == {again: 1} and again.reused == 20
    assert bed.plan.admitted[0].reused_tokens == 20


def test_a_fork_runs_on_the_blocks_of_its_parent():
    bed = Bed()
    parent = bed.add(10, 4)
    bed.step()
    child = RequestState(99, parent.prompt_ids, SamplingParams(max_new_tokens=4), arrival=bed.steps)
    child.token_ids += parent.output_ids
    assert bed.scheduler.fork(parent, child) and child.past == 10 and bed.blocks.shared == 3
    assert bed.step() == {parent: 1, child: 1}
    assert len(bed.plan.copies) == 1 and bed.blocks.shared == 2
    bed.until(parent, child)
    assert parent.output_ids == child.output_ids


@pytest.mark.parametrize(("num_blocks", "placed"), [(6, False), (7, True)])
def test_a_fork_is_placed_only_if_both_can_copy_the_open_block_and_reach_their_ends(num_blocks, placed):
    bed = Bed(num_blocks=num_blocks)
    parent = bed.add(10, 4)
    bed.step()
    child = RequestState(99, parent.prompt_ids, SamplingParams(max_new_tokens=4), arrival=bed.steps)
    child.token_ids += parent.output_ids
    assert bed.scheduler.fork(parent, child) == placed
    bed.scheduler.check_integrity()
    if not placed:
        bed.scheduler.add(child)
    bed.until(parent, child)


# --- the borrowed slot


def test_a_waiting_request_can_be_withdrawn():
    bed = Bed(batch=1)
    first, second = bed.add(1), bed.add(1)
    bed.step()
    bed.scheduler.release(second)
    bed.scheduler.release(first)
    assert bed.step() == {}
    with bed.scheduler.borrowed_slot(5) as (slot, blocks):
        assert slot == 0 and len(blocks) == bed.blocks.used == 2
    assert bed.blocks.used == 0


def test_a_slot_cannot_be_borrowed_when_all_are_taken():
    bed = Bed(batch=1)
    bed.add(1)
    bed.step()
    with pytest.raises(RequestError, match="every slot is taken") as caught, bed.scheduler.borrowed_slot(1):
        pass
    assert caught.value.remedy


def test_a_slot_cannot_be_borrowed_without_blocks_for_its_tokens():
    bed = Bed(num_blocks=4, size=4)
    bed.add(9, 1)
    bed.step()
    running = bed.add(9, 2)
    bed.step()
    assert running.slot is not None
    with pytest.raises(RequestError, match=r"5 tokens need 2 KV blocks.*1 of 4"), bed.scheduler.borrowed_slot(5):
        pass
    bed.scheduler.check_integrity()
    with bed.scheduler.borrowed_slot(4):
        pass


def test_a_borrowed_slot_comes_back_after_an_error():
    bed = Bed(batch=1)
    with pytest.raises(ValueError, match="inside"), bed.scheduler.borrowed_slot(3):
        raise ValueError("inside")
    with bed.scheduler.borrowed_slot(3) as (slot, _):
        assert slot == 0
    bed.scheduler.check_integrity()
