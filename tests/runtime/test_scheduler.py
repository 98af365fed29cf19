"""The scheduler against a plain model of its promises: slots, token budget, order, nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtlab import RequestError, SamplingParams
from trtlab.runtime.request import Request
from trtlab.runtime.scheduler import Scheduler

work = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=12)


@given(st.integers(1, 4), st.integers(0, 12), work)
def test_every_request_is_served_whole_in_order_within_the_bounds(slots, spare, jobs):
    budget = slots + spare
    scheduler, arrivals, fed, first_step = Scheduler(slots, budget), [], {}, {}
    for prompt, new, arrival in jobs:
        arrivals.append((arrival, Request(tuple(range(prompt)), SamplingParams(max_new_tokens=new))))
    step_number = 0
    while arrivals or scheduler.waiting or scheduler.running:
        for item in [a for a in arrivals if a[0] <= step_number]:
            scheduler.add(item[1])
            arrivals.remove(item)
        step = scheduler.next()
        assert step or not (scheduler.waiting or scheduler.running)
        assert sum(len(chunk.token_ids) for _, chunk in step) <= budget
        assert len({chunk.slot for _, chunk in step}) == len(step) <= slots
        generating = [request for request in scheduler.running if request.output_ids]
        assert {id(r) for r in generating} <= {id(r) for r, _ in step}, "a request that generates gets its token"
        for request, chunk in step:
            assert chunk.slot == request.slot and chunk.past == request.past and chunk.token_ids
            first_step.setdefault(id(request), step_number)
            fed.setdefault(id(request), []).extend(chunk.token_ids)
            request.past += len(chunk.token_ids)
            if request.past == request.total:
                request.accept(1000 + len(request.output_ids), None)
            if request.done:
                assert tuple(fed[id(request)]) == (*request.prompt_ids, *request.output_ids[:-1])
                scheduler.release(request)
        step_number += 1
        assert step_number < 2000
    assert len(fed) == len(jobs)
    assert sorted(scheduler._free) == list(range(slots))


def test_first_come_first_served():
    scheduler = Scheduler(1, 8)
    requests = [Request((1, 2), SamplingParams(max_new_tokens=1)) for _ in range(3)]
    for request in requests:
        scheduler.add(request)
    for request in requests:
        assert [r for r, _ in scheduler.next()] == [request]
        scheduler.release(request)


def test_a_waiting_request_can_be_withdrawn():
    scheduler = Scheduler(1, 8)
    first, second = (Request((1,), SamplingParams()) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    scheduler.next()
    scheduler.release(second)
    scheduler.release(first)
    assert scheduler.next() == []
    with scheduler.borrowed_slot() as slot:
        assert slot == 0


def test_a_slot_cannot_be_borrowed_when_all_are_taken():
    scheduler = Scheduler(1, 8)
    scheduler.add(Request((1,), SamplingParams()))
    scheduler.next()
    with pytest.raises(RequestError, match="every slot is taken") as caught, scheduler.borrowed_slot():
        pass
    assert caught.value.remedy


def test_a_borrowed_slot_comes_back_after_an_error():
    scheduler = Scheduler(1, 8)
    with pytest.raises(ValueError, match="inside"), scheduler.borrowed_slot():
        raise ValueError("inside")
    with scheduler.borrowed_slot() as slot:
        assert slot == 0
