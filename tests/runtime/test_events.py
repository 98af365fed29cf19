"""The event log: what it keeps, and that replaying it gives the pool as it was after each step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtlab.runtime.events import Block, EventLog, StepEvent


def event(step, *blocks):
    return StepEvent(step, 0.0, 1.0, (), (), (), (), (), blocks, 0, 0, 0)


states = st.tuples(st.sampled_from([(), (1,), (1, 2)]), st.booleans()).map(
    lambda pair: {"owners": pair[0], "cached": pair[1] and not pair[0]}
)
steps = st.lists(st.dictionaries(st.integers(0, 5), states, max_size=4), max_size=12)


@given(steps, st.integers(1, 6))
def test_replay_gives_every_kept_state_though_older_events_fell_off(steps, kept):
    log, now, history = EventLog(kept), {}, []
    for number, changes in enumerate(steps):
        blocks = [Block(block, **state) for block, state in changes.items()]
        log.append(event(number, *blocks))
        now = {**now, **{block.number: block for block in blocks}}
        history.append({number: block for number, block in now.items() if block.state != "free"})
    assert [e.step for e in log] == list(range(len(steps)))[-kept:]
    assert [log.blocks_after(index) for index in range(len(log))] == history[-kept:]
    for index in range(-len(log), 0):
        assert log.blocks_after(index) == history[index] and log[index].step == len(steps) + index


def test_a_log_is_a_sequence():
    log = EventLog(3)
    for step in range(5):
        log.append(event(step))
    assert len(log) == 3 and [e.step for e in log[1:]] == [3, 4] and log[-1].step == 4 and log[0] in log
    for bad in (3, -4):
        with pytest.raises(IndexError):
            log.blocks_after(bad)


def test_the_state_of_a_block_has_one_word():
    states = [Block(0, (1,)), Block(0, (1, 2)), Block(0, (), True), Block(0)]
    assert [block.state for block in states] == ["used", "shared", "cached", "free"]


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 20), st.integers(1, 8), st.integers(0, 3)), max_size=10),
    st.booleans(),
    st.integers(1, 8),
)
def test_events_tell_what_happened_to_each_request_and_block(bench, jobs, no_evict, kept):
    bed = bench(num_blocks=12, no_evict=no_evict, budget=12, events_kept=kept)
    requests, events = [], []

    def step():
        event = bed.step()
        if event is not None:
            events.append(event)
            view = {b.number: b for b in bed.loop.kv_cache.blocks if b.state != "free"}
            assert bed.loop.events.blocks_after(-1) == view
            assert event.waiting == tuple(r.number for r in bed.loop.scheduler.waiting)
        return event

    for kind, length, new, steps in jobs:
        requests.append(bed.submit([kind] * length, new))
        for _ in range(steps):
            step()
    while step():
        pass
    assert [e.step for e in events] == list(range(len(events))) and len(bed.loop.events) == min(kept, len(events))
    for request in requests:
        number = request.number
        admitted = [a for e in events for a in e.admitted if a.request == number]
        finished = [f.reason for e in events for f in e.finished if f.request == number]
        work = [w for e in events for w in e.work if w.request == number]
        assert len(admitted) == 1 + request.preemptions == 1 + sum(e.preempted.count(number) for e in events)
        assert finished == [request.finish_reason] and admitted[-1].reused_tokens == request.reused
        assert sum(w.generated for w in work) == len(request.output_ids)
        expected = admitted[0].reused_tokens
        for w in work:
            assert w.past == expected or request.preemptions
            expected = w.past + w.tokens
        assert expected == request.longest
        bed.check_answer(request)
