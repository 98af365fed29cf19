"""The loop's life: errors that end only whom they belong to, cancels, deadlines, interrupts, and its end."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from trtlab import RequestError, SamplingParams

from .conftest import END, VOCAB, alone

PROMPTS = [(1, 2, 3, 4, 5, 6, 7, 8, 9), (5,), (9, 9, 9, 9, 9), (1, 2, 3, 4, 8)]


def fail_when(belongs, times=10**6):
    left = iter(range(times))

    def look(step):
        if belongs(step) and next(left, None) is not None:
            raise ValueError("broken")

    return look


def takes_part(request):
    return lambda step: any(chunk.slot == request.slot for chunk in step.chunks)


def submitted(bench, new=6, **more):
    return [bench.submit(prompt, new, **more) for prompt in PROMPTS]


def check_all(bench, *requests, reasons=("stop", "length")):
    for request in requests:
        assert request.finish_reason in reasons
        bench.check_answer(request)
    bench.check_empty()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_error_that_repeats_alone_ends_the_request_whose_it_is(bench, after):
    bed = bench()
    requests = submitted(bed)
    for _ in range(after):
        bed.step()
    guilty = requests[2]
    bed.rank.before_run = fail_when(takes_part(guilty))
    bed.run()
    assert guilty.finish_reason == "error" and len(guilty.output_ids) == after
    assert str(guilty.error).startswith(f"request 3 failed in step {after}: ValueError: broken")
    assert isinstance(guilty.error, RequestError) and isinstance(guilty.error.__cause__, ValueError)
    check_all(bed, *requests[:2], requests[3])
    assert next(f for event in bed.loop.events for f in event.finished if f.reason == "error").request == 3


def test_an_error_that_does_not_repeat_alone_ends_nobody(bench):
    bed = bench()
    requests = submitted(bed)
    bed.step()
    bed.rank.before_run = fail_when(lambda step: len(step.chunks) > 1, times=1)
    event = bed.step()
    assert [work.request for work in event.work] == [1, 2, 3, 4] and event.generated == 4
    bed.run()
    check_all(bed, *requests)


def test_an_error_with_every_batch_still_lets_all_finish_one_by_one(bench):
    bed = bench()
    requests = submitted(bed)
    bed.rank.before_run = fail_when(lambda step: len(step.chunks) > 1)
    bed.run()
    check_all(bed, *requests)


def test_an_error_that_everyone_meets_ends_everyone_and_the_loop_goes_on(bench):
    bed = bench()
    requests = submitted(bed)
    bed.rank.before_run = fail_when(lambda step: True)
    event = bed.step()
    assert event.work == () and [f.reason for f in event.finished] == ["error"] * 4
    bed.rank.before_run = lambda step: None
    check_all(bed, *requests, reasons=("error",))
    again = submitted(bed)
    bed.run()
    check_all(bed, *again)


def test_an_error_while_blocks_are_copied_ends_those_of_the_step_and_the_loop_goes_on(bench):
    bed = bench(batch=3, budget=3, tokens_per_block=4)
    parent = bed.submit(PROMPTS[1], 6)
    bed.step()
    child = bed.fork(parent)

    def broken(copies):
        raise OSError("no copy")

    bed.rank.before_copy = broken
    bed.step()
    assert parent.finish_reason == child.finish_reason == "error"
    assert f"request {child.number} failed" in str(child.error) and "OSError: no copy" in str(child.error)
    bed.rank.before_copy = lambda copies: None
    again = submitted(bed)
    bed.run()
    check_all(bed, *again)


def spoiled(requests, value):
    """Logits of these requests become ``value``."""

    def change(logits, step):
        for row, chunk in enumerate(step.chunks):
            if any(chunk.slot == request.slot for request in requests):
                logits[row] = value
        return logits

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_without_probabilities_end_the_request_that_draws_from_them(bench, value):
    bed = bench()
    guilty = bed.submit((3, 3), params=SamplingParams(max_new_tokens=6, temperature=1.0, seed=1))
    requests = submitted(bed)[:3]
    bed.rank.logits = spoiled([guilty], value)
    bed.run()
    assert guilty.finish_reason == "error" and f"request {guilty.number} failed" in str(guilty.error)
    for request in requests:
        bed.check_answer(request)
        assert request.finish_reason == "length"
    bed.check_empty()


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_logits_that_are_not_numbers_end_a_greedy_request_too(bench, penalty):
    bed = bench()
    guilty = bed.submit((3, 3), params=SamplingParams(max_new_tokens=6, repetition_penalty=penalty))
    requests = submitted(bed)[:3]
    bed.rank.logits = spoiled([guilty], float("nan"))
    bed.run()
    assert guilty.finish_reason == "error" and "one is not a number" in str(guilty.error)
    for request in requests:
        bed.check_answer(request)
        assert request.finish_reason == "length"
    bed.check_empty()


def test_a_neighbour_without_probabilities_does_not_change_what_others_draw(bench):
    params = SamplingParams(max_new_tokens=8, temperature=5.0, seed=1)
    answers = []
    for spoil in (False, True):
        bed = bench()
        request = bed.submit((3, 3), params=params)
        guilty = bed.submit((4, 4), params=params)
        for _ in range(3):
            bed.step()
        if spoil:
            bed.rank.logits = spoiled([guilty], float("nan"))
        bed.run()
        assert guilty.finish_reason == ("error" if spoil else "length")
        answers.append(request.output_ids)
    assert answers[0] == answers[1]


def test_an_error_while_text_is_made_ends_its_own_request(bench):
    bed = bench()
    heard = []

    def listener():
        heard.append(1)
        if len(heard) == 3:
            raise UnicodeError("no text")

    others = submitted(bed)[:3]
    guilty = bed.submit((8, 8), 6, listener)
    bed.run()
    assert guilty.finish_reason == "error" and len(guilty.output_ids) == 3 == len(heard)
    assert "UnicodeError: no text" in str(guilty.error)
    for request in others:
        assert request.finish_reason == "length"
        bed.check_answer(request)
    bed.check_empty()


def test_a_listener_may_end_its_request(bench):
    bed = bench()
    request = bed.request((8, 8), 6)
    bed.loop.submit(request, lambda: setattr(request, "finish_reason", "stop" if request.total == 5 else None))
    others = submitted(bed)[:3]
    bed.run()
    assert request.finish_reason == "stop" and len(request.output_ids) == 3
    for other in others:
        bed.check_answer(other)
    bed.check_empty()


def test_the_end_token_ends_an_answer_and_is_no_part_of_it(bench):
    bed = bench()
    prompt = next((i, j) for i in range(VOCAB) for j in range(VOCAB) if 2 <= len(alone((i, j), 20)) < 20)
    request = bed.submit(prompt, 20, end=END)
    bed.run()
    assert request.finish_reason == "stop" and END not in request.output_ids
    check_all(bed, request)


# --- interrupts


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["no_evict", "evict", "static", "slots"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupt_while_the_model_runs_leaves_the_loop_usable(bench, after, kind):
    bed = bench(no_evict=kind != "evict", in_flight=kind != "static", paged=kind != "slots")
    requests = submitted(bed)
    for _ in range(after):
        bed.step()
    bed.rank.before_run = interrupt
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            bed.step()
    bed.rank.before_run = lambda step: None
    bed.run()
    check_all(bed, *requests)


def test_an_interrupt_before_a_block_is_copied_loses_nothing_of_it(bench):
    bed = bench()
    parent = bed.submit(PROMPTS[0], 9)
    bed.step()
    child = bed.fork(parent)
    bed.rank.before_copy = interrupt
    with pytest.raises(KeyboardInterrupt):
        bed.step()
    bed.rank.before_copy = lambda copies: None
    bed.run()
    check_all(bed, parent, child)


@pytest.mark.parametrize("finishes", [False, True])
def test_an_interrupt_while_tokens_are_handed_out_takes_effect_after_the_step(bench, finishes):
    bed = bench()
    calls = []

    def listener():
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    requests = [bed.submit(PROMPTS[0], 6), bed.submit(PROMPTS[1], 2 if finishes else 6, listener), *submitted(bed)[:2]]
    bed.step()
    with pytest.raises(KeyboardInterrupt):
        bed.step()
    assert requests[0].total == len(PROMPTS[0]) + 2  # all of the step's tokens were handed out
    bed.run()
    check_all(bed, *requests)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, AssertionError])
@pytest.mark.parametrize("place", ["choose", "hand out", "record"])
def test_an_exception_amid_the_bookkeeping_ends_the_session_and_says_so(bench, error, place, monkeypatch):
    """Another thread can raise one anywhere (PyThreadState_SetAsyncExc); no account is kept half changed."""
    bed = bench()
    requests = submitted(bed)
    bed.step()

    def fail(*_, **__):
        raise error("from outside")

    scheduler = bed.loop.scheduler
    name, owner = {
        "choose": ("reserve", bed.blocks),
        "hand out": ("computed", scheduler),
        "record": ("changes", bed.blocks),
    }[place]
    monkeypatch.setattr(owner, name, fail)
    if name == "reserve":
        monkeypatch.setattr(bed.blocks, "writable", lambda *_: False)
    with pytest.raises(error, match="from outside"):
        bed.loop.step()
    with pytest.raises(RequestError, match=r"the session ended in step 1: .*engine\.session"):
        bed.loop.step()
    with pytest.raises(RequestError, match="the session ended"):
        bed.submit(PROMPTS[0], 2)
    assert all(isinstance(request.error.__cause__, error) for request in requests)
    assert bed.rank.closed and bed.loop.closed
    bed.check_empty()
    bed.loop.close()


def test_a_lock_that_a_thread_left_behind_is_taken_over(bench, monkeypatch):
    """An exception from outside can end a thread between taking the lock and its first change."""
    monkeypatch.setattr("trtlab.runtime.exclusive.ABANDONED_S", 0.3)
    bed = bench()
    requests = submitted(bed)
    bed.step()
    thread = threading.Thread(target=bed.loop.exclusive._lock.acquire)
    thread.start()
    thread.join()
    late = bed.submit(PROMPTS[1], 3)
    bed.run()
    check_all(bed, *requests, late)


def test_a_request_may_be_cancelled_from_within_a_step(bench):
    """As when the garbage collector closes a dropped stream just then."""
    for when in ("before_run", "listener"):
        bed = bench(batch=5)
        requests = submitted(bed)
        dropped = bed.request((8, 8), 6)

        def cancel(*_, bed=bed, dropped=dropped):
            bed.loop.cancel(dropped)

        bed.loop.submit(dropped, cancel if when == "listener" else None)
        if when == "before_run":
            bed.rank.before_run = cancel
        bed.step()
        assert dropped.finish_reason == "cancelled"
        bed.run()
        assert all(request.finish_reason == "length" for request in requests)
        check_all(bed, *requests)


# --- cancels, deadlines, close


def test_a_request_is_cancelled_once(bench):
    bed = bench(batch=1, budget=8)
    running, waiting = bed.submit(PROMPTS[0], 6), bed.submit(PROMPTS[1], 6)
    bed.step()
    for request in (waiting, running):
        assert bed.loop.cancel(request) and not bed.loop.cancel(request)
        assert request.finish_reason == "cancelled" and request.error is None
        bed.loop.check_integrity()
    bed.check_empty()
    last = bed.step()  # nothing runs, and still there is something to tell
    assert {finish.request for finish in last.finished} == {1, 2} and not last.work and last.used == 0
    assert bed.step() is None


def test_cancelled_requests_stand_in_the_next_event(bench):
    bed = bench()
    first, second = bed.submit(PROMPTS[0], 6), bed.submit(PROMPTS[1], 6)
    bed.step()
    bed.loop.cancel(first)
    assert [(f.request, f.reason) for f in bed.step().finished] == [(1, "cancelled")]
    bed.run()
    check_all(bed, second)


def test_a_deadline_ends_a_request_with_what_it_has(bench):
    bed = bench(batch=1)
    late = bed.submit(PROMPTS[0], 9, deadline_s=5.0)
    never_ran = bed.submit(PROMPTS[1], 9, deadline_s=4.0)
    patient = bed.submit(PROMPTS[2], 9, deadline_s=500.0)
    for _ in range(3):
        bed.step()
    bed.clock.now = 5.0
    event = bed.step()
    assert {(f.request, f.reason) for f in event.finished} == {(1, "timed_out"), (2, "timed_out")}
    assert len(late.output_ids) == 3 and never_ran.output_ids == []
    bed.run()
    check_all(bed, patient)
    bed.check_answer(late)


def test_a_deadline_that_is_met_changes_nothing(bench):
    bed = bench()
    request = bed.submit(PROMPTS[0], 3, deadline_s=5.0)
    bed.run()
    bed.clock.now = 50.0
    assert bed.step() is None and request.finish_reason == "length"


def test_close_cancels_what_is_under_way_and_a_second_close_is_harmless(bench):
    bed = bench(batch=2)
    requests = submitted(bed)
    bed.step()
    bed.loop.close()
    bed.loop.close()
    assert bed.rank.closed and all(request.finish_reason == "cancelled" for request in requests)
    assert "closed while request 3 was under way" in str(requests[2].error)
    bed.check_empty()
    fresh = bed.request((1, 2))
    for use in (
        lambda: bed.loop.submit(fresh),
        lambda: bed.loop.fork(requests[0], fresh),
        bed.loop.step,
        lambda: bed.loop.logits([1]),
    ):
        with pytest.raises(RequestError, match="closed") as caught:
            use()
        assert caught.value.remedy
    assert not bed.loop.cancel(requests[0])


def test_a_fork_of_another_session_is_refused(bench):
    bed, other = bench(), bench()
    stranger = other.submit(PROMPTS[0], 6)
    other.step()
    with pytest.raises(RequestError, match="not under way in this session"):
        bed.fork(stranger)
    bed.check_empty()


# --- two at once, logits, slots


def test_steps_and_requests_may_come_from_several_threads(bench):
    bed = bench(num_blocks=60, batch=3, budget=12)
    requests, errors = [], []

    def work(seed):
        try:
            for i in range(12):
                request = bed.request((seed, i, i, i, i), 5)
                bed.loop.submit(request)
                requests.append(request)
                if i % 5 == 0:
                    bed.loop.cancel(request)
                while not request.done:
                    bed.loop.step()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(requests) == 48
    check_all(bed, *requests, reasons=("length", "cancelled"))


def test_logits_leave_no_trace(bench):
    bed = bench(batch=2, budget=5)
    request = bed.submit(PROMPTS[0], 6)
    bed.step()
    ids = [*PROMPTS[2], 1, 2]
    rows = bed.loop.logits(ids)
    assert rows.argmax(-1)[-1] == alone(tuple(ids), 1, None)[0] and rows.shape == (7, VOCAB)
    bed.loop.check_integrity()
    bed.run()
    check_all(bed, request)


def test_an_error_in_logits_gives_the_slot_back(bench):
    bed = bench()
    bed.rank.before_run = fail_when(lambda step: True)
    with pytest.raises(ValueError, match="broken"):
        bed.loop.logits([1, 2, 3])
    bed.check_empty()


def test_slots_without_paging_keep_the_same_account_and_share_nothing(bench):
    answers = []
    for paged in (True, False):
        bed = bench(num_blocks=40, paged=paged)
        requests = submitted(bed) + submitted(bed)
        bed.step()
        requests.append(bed.fork(requests[0]))
        used = bed.loop.kv_cache.used
        bed.run()
        check_all(bed, *requests)
        answers.append([request.output_ids for request in requests])
        if not paged:
            assert used == 3 + 1 + 2 + 2 and bed.rank.copied == 0
            assert bed.loop.kv_cache.reused_tokens == 0 and not bed.loop.kv_cache.reuse_enabled
    assert answers[0] == answers[1]


def test_the_view_of_the_cache_counts_what_a_plain_loop_counts(bench):
    bed = bench(num_blocks=40, budget=64)
    first, second = bed.submit(range(21), 6), bed.submit(range(3), 6)
    bed.step()
    view = bed.loop.kv_cache
    assert (view.used, view.shared, view.cached, view.free) == (7, 0, 0, 33)
    assert view.tokens == 21 + 3 and view.fragmentation == 1 - 24 / 28
    child = bed.fork(first)
    assert view.shared == 6 and view.tokens == 24 and view.chains[child.number] == view.chains[first.number]
    bed.run()
    assert view.used == 0 and view.tokens == 0 and view.fragmentation == 0.0 and view.cached == 8
    again = bed.submit(range(21), 6)
    bed.step()
    assert child.reused == 21 and again.reused == 20
    assert view.reused_tokens == 21 + 20 and view.short_prompts == 1
    assert view.prompt_tokens == 21 + 3 + 22 + 21
    assert len(view.blocks) == 40 and sum(block.state == "cached" for block in view.blocks) == view.cached
    bed.run()
    assert view.clear() == 8 and view.cached == 0 and view.free == 40
    check_all(bed, first, second, child, again)


def test_logits_are_taken_from_the_rows_of_finished_prompts_only(bench):
    bed = bench(budget=8)
    long, short = bed.submit(range(30), 3), bed.submit((4,), 12)
    event = bed.step()
    assert [(work.request, work.generated) for work in event.work] == [(1, False)]
    while not long.output_ids:
        bed.step()
    bed.run()
    check_all(bed, long, short)
    assert torch.is_tensor(bed.loop.logits([1]))


def test_a_finished_prompt_behind_an_unfinished_one_is_sampled_from_its_own_row(bench):
    bed = bench(budget=10, tokens_per_block=4)
    long, short = bed.submit(range(30), 3), bed.submit((4,), 12)
    event = bed.step()
    assert [(work.request, work.tokens, work.generated) for work in event.work] == [(1, 8, False), (2, 1, True)]
    first_row, second_row = alone(tuple(range(8)), 1, None), alone((4,), 1, None)
    assert first_row != second_row and tuple(short.output_ids) == second_row and not long.output_ids
    bed.run()
    check_all(bed, long, short)
