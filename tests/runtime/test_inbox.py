"""Nobody waits for a forward pass: requests join, fork and end while another thread is inside one, and none is lost."""

from __future__ import annotations

import threading

import pytest

from trtlab import RequestError
from trtlab.runtime.inbox import Arrival, Inbox

PROMPTS = [(1, 2, 3), (4, 5, 6, 7, 8, 9, 10), (2,) * 9]
PATIENCE_S = 20  # only a thread that hangs takes so long


def in_thread(work, *arguments):
    """What ``work`` gives or raises, run in a thread of its own that must come back."""
    results = []

    def run():
        try:
            results.append(work(*arguments))
        except Exception as error:  # noqa: BLE001 - raised below
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), f"{work.__name__} waits for the step"
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


class Blocked:
    """A step in another thread that stays in its forward pass until ``finish``."""

    def __init__(self, bed):
        self._bed, self._leave, inside = bed, threading.Event(), threading.Event()
        self.event = None

        def wait(_):
            inside.set()
            assert self._leave.wait(PATIENCE_S)

        def run():
            self.event = bed.loop.step()

        bed.rank.before_run = wait
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert inside.wait(PATIENCE_S)

    def finish(self):
        self._bed.rank.before_run = lambda step: None
        self._leave.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self._bed.loop.check_integrity()


@pytest.mark.parametrize("kind", ["no_evict", "evict", "static", "slots"])
def test_requests_join_fork_and_end_while_a_forward_pass_runs(bench, kind):
    bed = bench(no_evict=kind != "evict", in_flight=kind != "static", paged=kind != "slots", batch=4)
    parent, dropped = bed.submit(PROMPTS[0], 9), bed.submit(PROMPTS[1], 9)
    bed.step()
    blocked = Blocked(bed)
    late = in_thread(bed.submit, PROMPTS[2], 5)
    child = in_thread(bed.fork, parent)
    short_lived = in_thread(bed.submit, PROMPTS[1], 5)
    assert in_thread(bed.loop.cancel, dropped) and in_thread(bed.loop.cancel, short_lived)
    assert bed.loop.is_under_way(late) and bed.loop.waiting == 3
    assert dropped.finish_reason is None  # its row is being computed
    bed.loop.check_integrity()
    blocked.finish()
    assert (dropped.finish_reason, short_lived.finish_reason) == ("cancelled", "cancelled")
    assert {finish.request for finish in blocked.event.finished} == {dropped.number, short_lived.number}
    assert not dropped.chain.blocks or kind == "static"  # freed without another step
    bed.run()
    for request in (parent, late, child):
        assert request.finish_reason == "length"
        bed.check_answer(request)
    bed.check_empty()


def test_a_caller_still_gets_the_errors_that_concern_it(bench):
    bed = bench(num_blocks=8)
    parent = bed.submit(PROMPTS[0], 3)
    ended = bed.submit(PROMPTS[1], 1)
    bed.step()
    blocked = Blocked(bed)
    with pytest.raises(RequestError, match="the pool has 8"):
        in_thread(bed.submit, (1,) * 30, 9)
    with pytest.raises(RequestError, match="request 2 is not under way"):
        in_thread(bed.fork, ended, 5)
    assert not in_thread(bed.loop.cancel, ended)
    blocked.finish()
    bed.run()
    bed.check_answer(parent)


@pytest.mark.parametrize("prompt", range(1, 13))
@pytest.mark.parametrize("ends", [False, True])
def test_a_fork_is_carried_out_after_its_parent_went_on(bench, prompt, ends):
    """Wherever in a block the parent stood: the child shares what both have, and never writes what others may find."""
    bed = bench(tokens_per_block=4)
    parent = bed.submit(tuple(range(1, prompt + 1)), 4 if ends else 9)
    for _ in range(3):
        bed.step()
    blocked = Blocked(bed)
    child = in_thread(bed.fork, parent, 12)
    blocked.finish()
    assert parent.total == child.total + 1 and (parent.finish_reason == "length") == ends
    again = bed.submit((*parent.prompt_ids, *parent.output_ids), 6)  # finds what the parent filled
    bed.run()
    for request in (parent, child, again):
        bed.check_answer(request)
    bed.check_empty()


def test_a_request_from_within_a_step_of_the_same_thread_waits_for_its_end(bench):
    bed, joined = bench(), []
    bed.submit(PROMPTS[0], 4, lambda: joined or joined.append(bed.submit(PROMPTS[1], 3)))
    bed.step()
    (inner,) = joined
    assert bed.loop.is_under_way(inner) and inner.slot is None
    bed.run()
    bed.check_answer(inner)


def test_an_interrupt_loses_no_message_that_waits(bench):
    bed = bench()
    running, dropped = bed.submit(PROMPTS[0], 6), bed.submit(PROMPTS[1], 6)
    bed.step()
    messages = []

    def interrupted(step):
        messages.append(in_thread(bed.submit, PROMPTS[2], 4))
        messages.append(in_thread(bed.fork, running))
        in_thread(bed.loop.cancel, dropped)
        raise KeyboardInterrupt

    bed.rank.before_run = interrupted
    with pytest.raises(KeyboardInterrupt):
        bed.step()
    bed.rank.before_run = lambda step: None
    assert dropped.finish_reason == "cancelled" and bed.loop.waiting == 3  # the running one is computed anew
    bed.run()
    for request in (running, *messages):
        assert request.finish_reason == "length"
        bed.check_answer(request)
    bed.check_empty()


def test_a_message_whose_carrying_out_is_interrupted_is_carried_out_again(bench, monkeypatch):
    bed = bench()
    waits = bed.loop.scheduler.add
    for after in (False, True):  # before it joined the queue, or between that and leaving the inbox

        def add(request, after=after):
            if after:
                waits(request)
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(bed.loop.scheduler, "add", add)
        with pytest.raises(KeyboardInterrupt):
            bed.submit(PROMPTS[0], 4)
        bed.loop.check_integrity()
        bed.step()
        assert len(bed.loop.scheduler.running) == 1 and bed.loop.waiting == 0
        bed.run()
    bed.check_empty()


def test_close_ends_what_came_during_a_step_and_nothing_comes_after(bench):
    bed = bench()
    bed.submit(PROMPTS[0], 6)
    blocked = Blocked(bed)
    late = in_thread(bed.submit, PROMPTS[1], 4)
    closing = threading.Thread(target=bed.loop.close)
    closing.start()
    blocked.finish()
    closing.join(PATIENCE_S)
    assert late.finish_reason == "cancelled" and "closed while request 2" in str(late.error)
    with pytest.raises(RequestError, match="closed"):
        bed.submit(PROMPTS[0], 4)
    bed.check_empty()


def test_many_threads_that_submit_and_cancel_beside_the_steps_lose_nothing(bench):
    bed = bench(num_blocks=64, batch=4)
    kept, stop, errors = [], threading.Event(), []

    def send(seed):
        try:
            for number in range(30):
                request = bed.loop_submit((seed, number % 5, 3), 1 + number % 4)
                if number % 3 == 0:
                    bed.loop.cancel(request)
                else:
                    kept.append(request)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    def drive():
        while not stop.is_set():
            bed.loop.step()

    numbers = threading.Lock()

    def loop_submit(prompt, new):
        with numbers:
            request = bed.request(prompt, new)
        bed.loop.submit(request)
        return request

    bed.loop_submit = loop_submit
    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(1, 5)]
    driver = threading.Thread(target=drive)
    for thread in (*threads, driver):
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    stop.set()
    driver.join(PATIENCE_S)
    bed.run()
    assert not errors and len(kept) == 80
    for request in kept:
        assert request.finish_reason == "length"
        bed.check_answer(request)
    bed.check_empty()


def test_messages_keep_their_order_and_stay_until_they_are_carried_out():
    inbox, seen = Inbox(), []
    first, second = object(), object()
    inbox.post(Arrival(first))

    def carry_out(message):
        seen.append(message.request)
        if message.request is first and len(seen) == 1:
            inbox.post(Arrival(second))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inbox.drain(carry_out)
    assert inbox.arrivals == {first, second}
    inbox.drain(carry_out)
    assert seen == [first, first, second] and not inbox.messages
