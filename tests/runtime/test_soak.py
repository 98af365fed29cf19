"""Thousands of requests with cancels, errors, forks and little room: none lost, no block lost, memory flat."""

from __future__ import annotations

import gc
import random
import tracemalloc

import pytest


@pytest.mark.slow
def test_thousands_of_requests_leave_nothing_behind(bench):
    """With preemptions: what the pool promises to those it never evicts is looked at in test_stateful.py."""
    dice, target = random.Random(1), 3_000
    bed = bench(num_blocks=14, tokens_per_block=4, batch=4, budget=16, no_evict=False, events_kept=20)
    fate, live, ended, memory = [0], [], dict.fromkeys(("length", "stop", "cancelled", "timed_out", "error"), 0), {}

    def sometimes_fail(step):
        fate[0] += 1
        if fate[0] % 97 in (0, 1, 2):  # once for the batch, and again for the first two alone
            raise ValueError("bad luck")

    def started():
        if live and dice.random() < 0.1:
            return bed.fork(dice.choice(live))
        prompt = [dice.randrange(3)] * dice.choice([1, 3, 8, 8, 20]) + [dice.randrange(50)]
        late = {"deadline_s": bed.clock.now + 30} if dice.random() < 0.05 else {}
        return bed.submit(prompt, dice.choice([1, 2, 3, 6, 16]), end=7, priority=dice.choice([0, 0, 1]), **late)

    def settle():
        for request in [r for r in live if r.done]:
            live.remove(request)
            ended[request.finish_reason] += 1
            bed.check_answer(request)

    bed.rank.before_run = sometimes_fail
    tracemalloc.start()
    try:
        count = 0
        while count < target or live:
            while count < target and len(live) < 9:
                live.append(started())
                count += 1
                if count in (1_000, target):
                    gc.collect()
                    memory[count] = tracemalloc.get_traced_memory()[0]
            if dice.random() < 0.05:
                assert bed.loop.cancel(dice.choice([r for r in live if not r.done]))
            bed.clock.now += 1
            bed.step()
            settle()
    finally:
        tracemalloc.stop()
    assert sum(ended.values()) == target and min(ended.values()) >= 5, ended
    assert len(bed.loop.events) == 20 and not bed.loop._listeners and len(bed.loop._deadlines) < 10
    assert memory[target] - memory[1_000] < 30_000, memory
    bed.check_empty()
