"""Requests come, go, fork and fail in any order: every answer is the one it would be alone, and no bound is broken."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from trtlab import RequestError

from .conftest import END, VOCAB, Bench

SOME = st.sampled_from
USUAL = {"beginning": 0, "same": 9, "rest": [], "new": 5, "priority": 0, "wait": None, "ends": False}
THEN = SOME([1, 2, 3, 4, 6, 12])  # steps after each change


def fails_with(request):
    """A rank's hook that fails whenever this request takes part, alone or with others."""

    def look(step):
        if any(chunk.slot == request.slot for chunk in step.chunks):
            raise ValueError("the request's own fault")

    return look


def fails_once(counter):
    """A hook that fails the first time only."""
    counter = iter(counter)

    def look(step):
        if next(counter, None) is not None:
            raise ValueError("passes by")

    return look


class Machine(RuleBasedStateMachine):
    """A loop over the fake rank. What a request answers is compared with a plain loop at its end."""

    counted: ClassVar[Counter[str]] = Counter()

    @initialize(
        tokens_per_block=SOME([1, 2, 3, 4, 4, 8]),
        batch=st.integers(1, 5),
        spare=SOME([0, 1, 3, 8, 30]),
        pool=SOME(["tiny", "tiny", "small", "ample"]),
        no_evict=st.booleans(),
        in_flight=SOME([True, True, True, False]),
        chunked=SOME([True, True, False]),
        reuse=SOME([True, True, False]),
        paged=SOME([True, True, True, True, False]),
    )
    def start(self, tokens_per_block, batch, spare, pool, **kind):
        num_blocks = -(-{"tiny": 24, "small": 48, "ample": 300}[pool] // tokens_per_block)
        budget = batch + spare
        if not kind["chunked"]:
            budget += 24
        self.bench = Bench(num_blocks, tokens_per_block, batch=batch, budget=budget, seq_len=40, events_kept=5, **kind)
        self.kind = kind
        self.live: list = []
        self.ended = 0
        self.doomed: dict = {}  # requests that must fail, and how
        self.cancelled: list = []

    def pick(self, number):
        return self.live[number % len(self.live)]

    @precondition(lambda self: len(self.live) < 10)
    @rule(
        count=st.integers(1, 4),
        beginning=st.integers(0, 2),
        same=SOME([0, 1, 2, 4, 5, 8, 9, 16, 22]),
        rest=st.lists(st.integers(0, VOCAB - 1), max_size=4),
        new=SOME([1, 2, 5, 9, 14, 16]),
        priority=SOME([0, 0, 0, 1, -1]),
        wait=SOME([None, None, None, 1.0, 4.0]),
        ends=SOME([False, False, True]),
        then=THEN,
    )
    def submit(self, count, then, **request):
        for _ in range(count):
            self.submit_one(**request)
        self.steps(then)

    def submit_one(self, beginning, same, rest, new, priority, wait, ends):
        bench, prompt = self.bench, [*([beginning] * same), *rest] or [5]
        more = {"priority": priority, "end": END if ends else None}
        if wait is not None:
            more["deadline_s"] = bench.clock.now + wait
        places = bench.blocks.num_blocks * bench.size
        if -(-(len(prompt) + new - 1) // bench.size) > bench.blocks.num_blocks:
            with pytest.raises(RequestError, match=f"the pool has {bench.blocks.num_blocks}.*{places} tokens at most"):
                bench.submit(prompt, new, **more)
            self.counted["refused"] += 1
        else:
            self.live.append(bench.submit(prompt, new, **more))

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 11), more=st.integers(0, 9), then=THEN)
    def fork(self, number, more, then):
        bench, running = self.bench, self.bench.loop.scheduler.running
        parent = running[number % len(running)] if running and number else self.pick(number)
        new = len(parent.output_ids) + 1 + more
        needed = -(-(len(parent.prompt_ids) + new - 1) // bench.size)
        if len(self.live) < 12 and needed <= bench.blocks.num_blocks:
            self.live.append(bench.fork(parent, new))
            self.counted["forked in place"] += self.live[-1].slot is not None
        self.steps(then)

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 11), then=THEN)
    def cancel(self, number, then):
        request = self.pick(number)
        assert self.bench.loop.cancel(request)
        assert not self.bench.loop.cancel(request), "it had ended before"
        assert request.finish_reason == "cancelled"
        self.settle()
        self.steps(then)

    @rule(then=THEN)
    def clear_the_cache(self, then):
        self.bench.loop.kv_cache.clear()
        self.steps(then)

    @rule(length=st.integers(1, 9), then=THEN)
    def look_at_logits(self, length, then):
        bench = self.bench
        try:
            rows = bench.loop.logits(range(length))
        except RequestError as error:
            assert "every slot is taken" in str(error) or "KV blocks" in str(error)
        else:
            assert rows.shape == (length, VOCAB)
        bench.loop.check_integrity()
        self.steps(then)

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 11), kind=SOME(["own", "passing", "interrupt"]), then=THEN)
    def a_step_goes_wrong(self, number, kind, then):
        bench, request = self.bench, self.pick(number)
        before = [r for r in self.live if not r.done]
        if kind == "own":
            bench.rank.before_run = fails_with(request)
            bench.step()
            if request.done and request.finish_reason == "error":
                assert f"request {request.number} failed" in str(request.error)
                assert isinstance(request.error.__cause__, ValueError)
                self.counted["failed"] += 1
            assert [r.error for r in before if r is not request and r.error] == []
        elif kind == "passing":
            bench.rank.before_run = fails_once([1])
            many = bench.step()
            failed = [r for r in before if r.finish_reason == "error"]
            assert len(failed) <= 1 and (not failed or many.work == ()), "alone it cannot be told from its own fault"
        elif kind == "interrupt":
            bench.rank.before_run = interrupt
            bench.rank.before_copy = interrupt
            try:
                bench.step()
            except KeyboardInterrupt:
                self.counted["interrupted"] += 1
            assert [r for r in before if r.finish_reason == "error"] == []
            bench.rank.before_copy = lambda copies: None
        bench.rank.before_run = lambda step: None
        self.settle()
        self.steps(then)

    def steps(self, count):
        for _ in range(count):
            if not self.live:
                self.submit_one(**USUAL)
            event = self.bench.step()
            self.bench.clock.now += 0.25
            self.settle()
            if event is None:  # all that there was has run out of time
                assert not self.live
                continue
            self.counted["steps"] += 1
            self.counted["preempted"] += len(event.preempted)
            self.counted["reused"] += sum(admission.reused_tokens for admission in event.admitted)
            self.counted["chunks"] += sum(not work.generated for work in event.work)

    def settle(self):
        """Whoever is done leaves with the right answer; nobody is lost."""
        for request in [r for r in self.live if r.done]:
            self.live.remove(request)
            self.bench.check_answer(request)
            self.counted[request.finish_reason] += 1
        scheduler = self.bench.loop.scheduler
        assert {r.number for r in self.live} == {r.number for r in scheduler.running + scheduler.waiting}

    def teardown(self):
        if not hasattr(self, "bench"):
            return
        work = sum(r.longest + 1 for r in self.live)
        taken = self.bench.run(100 + 10 * work)
        self.settle()
        assert not self.live
        self.bench.check_empty()
        self.counted["steps"] += taken
        self.counted["copied"] += self.bench.rank.copied
        self.counted["evicted"] += self.bench.blocks.evicted
        self.bench.loop.close()
        assert self.bench.rank.closed


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_any_mix_of_requests_gives_each_the_answer_it_has_alone():
    Machine.counted.clear()
    run_state_machine_as_test(Machine, settings=settings(max_examples=110, stateful_step_count=40))
    seen = Machine.counted
    assert seen["steps"] >= 10_000
    met = "preempted reused chunks copied evicted refused failed interrupted cancelled timed_out stop length"
    assert not [name for name in [*met.split(), "forked in place"] if not seen[name]], seen
