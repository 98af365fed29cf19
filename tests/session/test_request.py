"""Requests under way: submit, stream, result, cancel, fork, asyncio; and the same tokens on every way to them."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtlab import (
    BuildConfig,
    Checkpoint,
    ConfigError,
    Mapping,
    QuantConfig,
    RequestError,
    SamplingParams,
    SessionConfig,
)

BOUNDS = {"max_seq_len": 96, "max_input_len": 64, "tokens_per_block": 8, "max_batch_size": 4}
DICE = torch.Generator().manual_seed(0)
LONG = torch.randint(0, 99, (45,), generator=DICE).tolist()
PROMPTS = [LONG, [5, 17, 3], [*LONG[:32], 7, 7], [64], [*LONG[:16], *[2] * 9], [41] * 20]


def news(*lengths):
    return [SamplingParams(max_new_tokens=length) for length in lengths]


PARAMS = news(14, 20, 9, 25, 12, 17)


@pytest.fixture(scope="module")
def opened(random_model):
    """``opened(session settings, mapping, backend, source, **build)`` gives a session, closed after the module."""
    sessions = []

    def start(config=None, mapping=None, backend="torch", source=None, **build):
        checkpoint = source or Checkpoint.from_hugging_face(random_model())
        engine = checkpoint.build(BuildConfig(**{**BOUNDS, **build}), mapping=mapping, plan=False)
        sessions.append(engine.session(config, backend=backend, device="cpu"))
        return sessions[-1]

    yield start
    for session in sessions:
        session.close()


def by_hand(session, prompt, new):
    """Each token from all before it, computed anew: no cache, no batch."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(session.logits(ids)[-1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.fixture(scope="module")
def expected(opened):
    session = opened(SessionConfig(enable_block_reuse=False), max_input_len=96)
    return [by_hand(session, prompt, params.max_new_tokens) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def submit_all(session, **more):
    return [session.submit(prompt, params, **more) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def answers(requests):
    return [request.result().token_ids for request in requests]


def idle(session):
    session._loop.check_integrity()
    return (session.running, session.waiting, session.kv_cache.used) == (0, 0, 0)


# --- the same tokens on every way


@pytest.mark.parametrize("block", [1, 8, 16, 32, 64])
def test_paged_and_in_flight_gives_what_computing_from_scratch_gives(block, opened, expected):
    session = opened(tokens_per_block=block)
    assert answers(submit_all(session)) == expected
    assert answers(submit_all(session)) == expected, "and again from what is cached"
    assert session.kv_cache.reused_tokens >= 44 // block * block + 33 // block * block
    assert idle(session)


@pytest.mark.parametrize(
    ("config", "build"),
    [
        ({"batching_type": "STATIC"}, {}),
        ({"enable_block_reuse": False}, {}),
        ({"enable_chunked_context": False}, {}),
        ({}, {"max_num_tokens": 8}),
        ({}, {"max_num_tokens": 5, "tokens_per_block": 16}),
        ({}, {"max_batch_size": 1}),
        ({}, {"max_batch_size": 8}),
        ({"capacity_scheduler_policy": "MAX_UTILIZATION", "max_tokens_in_paged_kv_cache": 72}, {}),
        ({"max_tokens_in_paged_kv_cache": 64}, {}),
    ],
    ids=["static", "no reuse", "whole", "chunks", "small chunks", "one slot", "all slots", "preempted", "small pool"],
)
def test_no_setting_of_the_session_changes_a_token(config, build, opened, expected):
    session = opened(SessionConfig(**config), **build)
    requests = submit_all(session)
    assert answers(requests) == expected and answers(submit_all(session)) == expected
    if config.get("capacity_scheduler_policy"):
        assert sum(request.preemptions for request in requests) > 0
    if build.get("max_num_tokens"):
        assert max(event.tokens for event in session.events) <= build["max_num_tokens"]
    assert idle(session)


def test_one_by_one_gives_what_all_together_give(opened, expected):
    session = opened()
    found = [session.generate(p, params).token_ids for p, params in zip(PROMPTS, PARAMS, strict=True)]
    assert found == expected


def test_a_preempted_request_draws_what_it_would_have_drawn(opened):
    params = SamplingParams(max_new_tokens=24, temperature=1.2, seed=5, logprobs=True)
    free = [opened().generate(prompt, params) for prompt in PROMPTS[:3]]
    tight = SessionConfig(capacity_scheduler_policy="MAX_UTILIZATION", max_tokens_in_paged_kv_cache=88)
    requests = [session.submit(p, params) for session in [opened(tight)] for p in PROMPTS[:3]]
    found = [request.result() for request in requests]
    assert sum(request.preemptions for request in requests) > 0
    assert [a.token_ids for a in found] == [a.token_ids for a in free]
    for a, b in zip(found, free, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_reused_prefix_tells_how_much_it_saved(opened):
    session = opened()
    first = session.submit(LONG, PARAMS[0])
    first.result()
    again = session.submit(LONG, PARAMS[0])
    assert again.result() == first.result()
    assert (first.reused_tokens, again.reused_tokens) == (0, 44 // 8 * 8)
    short = session.submit([*LONG[:7], 1], PARAMS[0])
    short.result()
    assert short.reused_tokens == 0 and session.kv_cache.short_prompts == 1


@pytest.mark.parametrize("algorithm", ["INT8", "FP8"])
@pytest.mark.parametrize("kind", ["merged", "split", "per_head"])
def test_an_eight_bit_cache_gives_the_same_tokens_shared_chunked_and_preempted(algorithm, kind, opened, random_model):
    quant = QuantConfig(kv_cache_quant_algo=algorithm, kv_cache_scales=kind)
    quantized = Checkpoint.from_hugging_face(random_model()).quantize(
        quant, calibration=[LONG, LONG[::-1]] if quant.reads_texts else None
    )
    plain = opened(SessionConfig(enable_block_reuse=False), source=quantized, max_batch_size=1)
    alone = answers(submit_all(plain))
    assert_same_but_for_ties(plain, LONG, by_hand(plain, LONG, PARAMS[0].max_new_tokens), alone[0])
    tight = SessionConfig(capacity_scheduler_policy="MAX_UTILIZATION", max_tokens_in_paged_kv_cache=72)
    session = opened(tight, source=quantized, max_num_tokens=16)
    requests = submit_all(session)
    session.step()
    child = session.fork(requests[0])
    for found in (answers(requests), answers(submit_all(session))):
        for prompt, one, other in zip(PROMPTS, found, alone, strict=True):
            assert_same_but_for_ties(plain, prompt, one, other)
    assert_same_but_for_ties(plain, LONG, child.result().token_ids, alone[0])
    assert idle(session)


def assert_same_but_for_ties(session, prompt, found, expected):
    """Equal, or parted where two tokens are nearly tied.

    A prompt in chunks is summed in another order, and on some processors that rounds a number of an 8-bit cache to its
    neighbour: logits move by hundredths, and two of them may lie nearer. A block of another request moves them by 1.
    """
    assert len(found) == len(expected)
    parted = next((i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), None)
    if parted is not None:
        logits = session.logits([*prompt, *expected[:parted]])[-1]
        assert float(logits.max() - logits[found[parted]]) < 0.05, (parted, found, expected)


def test_ranks_give_what_one_rank_gives(opened, expected):
    tight = SessionConfig(capacity_scheduler_policy="MAX_UTILIZATION", max_tokens_in_paged_kv_cache=72)
    session = opened(tight, Mapping(tp_size=2))
    requests = submit_all(session)
    session.step()
    child = session.fork(requests[0])
    assert answers(requests) == expected and child.result().token_ids == expected[0]
    assert answers(submit_all(session)) == expected and idle(session)


@pytest.mark.tensorrt
def test_slots_of_the_interpreter_keep_the_same_account(opened, expected):
    config = SessionConfig(capacity_scheduler_policy="MAX_UTILIZATION", max_tokens_in_paged_kv_cache=48)
    session = opened(config, backend="interpreter", max_batch_size=3, max_num_tokens=48)
    requests = [session.submit(PROMPTS[i], params) for i, params in ((1, news(6)[0]), (5, news(9)[0]), (4, news(6)[0]))]
    session.step()
    assert session.running == 2 and session.kv_cache.used == 1 + 3, "the third has no room"
    assert not session.kv_cache.reuse_enabled and not session.kv_cache.pool.paged
    child = session.fork(requests[1])
    assert child.status == "waiting"
    found = answers(requests)
    assert found == [expected[1][:6], expected[5][:9], expected[4][:6]]
    assert child.result().token_ids == expected[5][:9] and session.kv_cache.reused_tokens == 0
    assert idle(session)


def test_two_sessions_side_by_side_share_nothing(opened, expected):
    a, b = opened(), opened(max_batch_size=2, tokens_per_block=16)
    requests = [(a if i % 2 else b).submit(PROMPTS[i], PARAMS[i]) for i in range(len(PROMPTS))]
    while a.step() is not None or b.step() is not None:
        pass
    assert answers(requests) == expected and a.kv_cache.reused_tokens == 0
    stranger = b.submit(LONG, PARAMS[0])
    with pytest.raises(RequestError, match="not under way in this session"):
        a.fork(stranger)
    a.close()
    assert stranger.result().token_ids == expected[0]


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 4), st.sampled_from(["run", "run", "cancel", "fork"])), max_size=9
    ),
    st.sampled_from([72, 104, 400]),
    st.booleans(),
)
def test_any_mix_of_arrivals_cancels_and_forks_gives_each_its_tokens(opened, expected, jobs, room, no_evict):
    policy = "GUARANTEED_NO_EVICT" if no_evict else "MAX_UTILIZATION"
    config = SessionConfig(capacity_scheduler_policy=policy, max_tokens_in_paged_kv_cache=room)
    session, requests = opened(config, max_num_tokens=24), []
    for which, steps, then in jobs:
        requests.append((which, session.submit(PROMPTS[which], PARAMS[which])))
        for _ in range(steps):
            session.step()
            session._loop.check_integrity()
        which, request = requests[len(requests) // 2]
        if then == "cancel":
            request.cancel()
        elif then == "fork" and not request.done:
            requests.append((which, session.fork(request)))
    session.run()
    for which, request in requests:
        found = request.result()
        assert found.token_ids == expected[which][: len(found.token_ids)]
        assert found.finish_reason == "cancelled" or len(found.token_ids) == PARAMS[which].max_new_tokens
    assert idle(session)
    session.close()


def test_the_shipped_model_answers_the_same_alone_and_in_chunks_in_a_tiny_pool(opened):
    from trtlab.tiny import EXAMPLES, llama_dir

    model, params = Checkpoint.from_hugging_face(llama_dir()), SamplingParams(max_new_tokens=12, ignore_eos=True)
    plain = opened(SessionConfig(enable_block_reuse=False), source=model, max_batch_size=1)
    alone = [plain.generate(text, params).text for text in EXAMPLES]
    tight = SessionConfig(capacity_scheduler_policy="MAX_UTILIZATION", max_tokens_in_paged_kv_cache=96)
    session = opened(tight, source=model, max_num_tokens=16)
    for _ in range(2):
        requests = [session.submit(text, params) for text in EXAMPLES]
        assert [request.result().text for request in requests] == alone
    assert idle(session)


# --- fork


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_a_greedy_fork_goes_on_as_its_parent_does(steps, opened, expected):
    session = opened()
    parent = session.submit(LONG, PARAMS[0])
    for _ in range(steps):
        session.step()
    children = [session.fork(parent), session.fork(parent, news(20)[0])]
    assert [child.token_ids for child in children] == [parent.token_ids] * 2
    if steps:
        assert session.kv_cache.shared > 0 and all(child.status == "running" for child in children)
    assert parent.result().token_ids == children[0].result().token_ids == expected[0]
    assert children[1].result().token_ids[:14] == expected[0] and len(children[1].token_ids) == 20
    assert idle(session)


def test_forks_that_draw_go_their_own_ways_from_the_same_beginning(opened):
    session = opened()
    parent = session.submit(LONG, SamplingParams(max_new_tokens=20, temperature=1.5, seed=1))
    for _ in range(5):
        session.step()
    start = parent.token_ids
    children = [session.fork(parent, SamplingParams(max_new_tokens=20, temperature=1.5, seed=seed)) for seed in (2, 3)]
    found = [request.result().token_ids for request in (parent, *children)]
    assert len(start) == 5 and all(ids[:5] == start for ids in found) and len(set(found)) == 3


def test_a_fork_outlives_a_cancelled_parent(opened, expected):
    session = opened()
    parent = session.submit(LONG, PARAMS[0])
    for _ in range(4):
        session.step()
    child = session.fork(parent)
    assert parent.cancel()
    assert child.result().token_ids == expected[0] and parent.result().token_ids == expected[0][:4]


def test_forks_that_cannot_be_are_refused(opened):
    session = opened()
    parent = session.submit(LONG, PARAMS[0])
    for _ in range(4):
        session.step()
    for params, words in (
        (news(4)[0], "has generated 4 tokens already"),
        (news(52)[0], "max_seq_len 96"),
        (SamplingParams(max_new_tokens=14, logprobs=True), "were not kept"),
    ):
        with pytest.raises(RequestError, match=words):
            session.fork(parent, params)
    parent.result()
    with pytest.raises(RequestError, match=r"request 1 has ended \(length\)"):
        session.fork(parent)
    assert idle(session)


# --- submit, result, cancel


def test_a_request_tells_where_it_stands(opened, expected):
    session = opened(max_batch_size=1)
    first, second = session.submit(LONG, PARAMS[0]), session.submit(PROMPTS[1], PARAMS[1])
    assert (first.number, second.number) == (1, 2) and first.status == second.status == "waiting"
    event = session.step()
    assert (first.status, second.status) == ("running", "waiting") and first.token_ids == expected[0][:1]
    assert event.admitted[0].request == 1 and event.waiting == (2,)
    assert second.result().token_ids == expected[1] and first.done and first.status == "length"
    assert first.prompt_token_ids == tuple(LONG) and session.run() == [] and session.step() is None


def test_a_higher_priority_goes_first(opened):
    session = opened(max_batch_size=1)
    plain, urgent = session.submit([1, 2], PARAMS[0]), session.submit([3, 4], PARAMS[0], priority=2)
    session.step()
    assert (plain.status, urgent.status) == ("waiting", "running")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"priority": 1.5}, "priority"),
        ({"priority": True}, "priority"),
        ({"allotted_time_ms": 0}, "allotted_time_ms"),
        ({"allotted_time_ms": -1}, "allotted_time_ms"),
        ({"allotted_time_ms": float("nan")}, "allotted_time_ms"),
    ],
)
def test_a_submit_that_means_nothing_is_refused(settings, words, opened):
    session = opened()
    with pytest.raises(ConfigError, match=words):
        session.submit([1], **settings)
    assert session.waiting == 0


def test_a_cancelled_request_keeps_what_it_has(opened, expected):
    session = opened()
    request, other = session.submit(LONG, PARAMS[0]), session.submit(PROMPTS[1], PARAMS[1])
    for _ in range(3):
        session.step()
    assert request.cancel() and not request.cancel()
    found = request.result()
    assert (found.finish_reason, found.token_ids) == ("cancelled", expected[0][:3])
    assert other.result().token_ids == expected[1] and idle(session)


def test_a_request_out_of_time_keeps_what_it_has(opened, expected):
    session = opened()
    now = [0.0]
    session._loop.clock = lambda: now[0]
    request = session.submit(LONG, PARAMS[0], allotted_time_ms=1500)
    session.step()
    session.step()
    now[0] = 1.5
    found = request.result()
    assert (found.finish_reason, found.token_ids) == ("timed_out", expected[0][:2]) and idle(session)


def test_a_failed_request_raises_its_error_each_time_and_the_others_finish(opened, expected, monkeypatch):
    session = opened()
    requests = submit_all(session)
    session.step()
    run, guilty = session._loop.backend.ranks.run, requests[1]

    def broken(step):
        if any(chunk.slot == guilty.state.slot for chunk in step.chunks):
            raise RuntimeError("overflow")
        return run(step)

    monkeypatch.setattr(session._loop.backend.ranks, "run", broken)
    for _ in range(2):
        with pytest.raises(RequestError, match="request 2 failed in step 1: RuntimeError: overflow") as caught:
            guilty.result()
        assert isinstance(caught.value.__cause__, RuntimeError)
    assert guilty.status == "error" and not guilty.cancel()
    assert answers(r for r in requests if r is not guilty) == [expected[i] for i in (0, 2, 3, 4, 5)]
    assert idle(session)


def test_an_interrupted_generate_leaves_the_session_empty_and_other_requests_whole(opened, expected, monkeypatch):
    session = opened()
    other = session.submit(LONG, PARAMS[0])
    session.step()

    def interrupt(step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session._loop.backend.ranks, "run", interrupt)
        session.generate(PROMPTS[1:4])
    assert session.running + session.waiting == 1
    assert other.result().token_ids == expected[0] and idle(session)


def test_close_ends_what_is_under_way_and_whoever_wants_the_result_is_told(opened, expected):
    session = opened(max_batch_size=2)
    requests = submit_all(session)
    session.step()
    session.close()
    assert [request.status for request in requests] == ["cancelled"] * 6
    assert requests[0].token_ids == expected[0][:1] and not requests[0].cancel()
    for request in requests:
        with pytest.raises(RequestError, match=f"closed while request {request.number} was under way"):
            request.result()
    with pytest.raises(RequestError, match="closed"):
        session.submit([1])


# --- text


@pytest.fixture
def talk(talking_model):
    build = BuildConfig(max_seq_len=96, max_input_len=64, max_batch_size=3, tokens_per_block=8)
    with (
        Checkpoint.from_hugging_face(talking_model)
        .build(build, plan=False)
        .session(backend="torch", device="cpu") as session
    ):
        yield session


FREE = SamplingParams(max_new_tokens=24, ignore_eos=True)


def test_streams_of_requests_join_to_their_results(talk):
    texts = ["the cat", "日本", "é"]
    whole = [talk.generate(text, FREE).text for text in texts]
    requests = [talk.submit(text, FREE) for text in texts]
    assert ["".join(request.stream()) for request in requests] == whole
    assert [request.result().text for request in requests] == whole
    assert "".join(requests[0].stream()) == "", "each piece is given once"


def test_a_stream_goes_on_where_the_last_one_stopped(talk):
    whole = talk.generate("the cat", FREE).text
    request = talk.submit("the cat", FREE)
    first = next(request.stream())
    assert first + "".join(request.stream()) == whole


def test_a_stop_word_ends_a_request_that_nobody_streams(talk):
    whole = talk.generate("the cat", FREE).text
    word = whole[5:8]
    request = talk.submit("the cat", SamplingParams(max_new_tokens=24, ignore_eos=True, stop=word))
    talk.run()
    found = request.result()
    assert (found.finish_reason, found.stop_reason, found.text) == ("stop", word, whole[: whole.index(word)])
    assert idle(talk)


def test_a_fork_streams_the_whole_answer(talk):
    parent = talk.submit("the cat", FREE)
    for _ in range(6):
        talk.step()
    child = talk.fork(parent)
    assert "".join(child.stream()) == "".join(parent.stream()) == parent.result().text


def test_a_cancelled_stream_ends_with_what_there_was(talk):
    request = talk.submit("the cat", FREE)
    stream = request.stream()
    pieces = [next(stream), next(stream)]
    request.cancel()
    assert "".join([*pieces, *stream]) == request.result().text == talk.decode(request.token_ids)


def test_a_failed_stream_raises(talk, monkeypatch):
    request = talk.submit("the cat", FREE)
    stream = request.stream()
    next(stream)

    def broken(step):
        raise RuntimeError("overflow")

    with monkeypatch.context() as patch, pytest.raises(RequestError, match="request 1 failed"):
        patch.setattr(talk._loop.backend.ranks, "run", broken)
        list(stream)
    assert talk.generate("the cat", FREE).text


# --- asyncio


def slowed(session, monkeypatch, seconds=0.01):
    run = session._loop.backend.ranks.run

    def slow(step):
        time.sleep(seconds)
        return run(step)

    monkeypatch.setattr(session._loop.backend.ranks, "run", slow)


async def text_of(request):
    return "".join([piece async for piece in request])


def test_two_requests_may_be_streamed_at_once_in_an_event_loop(talk):
    expected = [talk.generate(text, FREE).text for text in ("the cat", "日本")]

    async def both():
        return await asyncio.gather(*(text_of(talk.submit(text, FREE)) for text in ("the cat", "日本")))

    assert asyncio.run(both()) == expected and idle(talk)


def test_a_request_may_be_awaited(talk):
    expected = [talk.generate(text, FREE) for text in ("the cat", "日本", "é", "a")]

    async def all_of_them():
        requests = [talk.submit(text, FREE) for text in ("the cat", "日本", "é", "a")]
        return await asyncio.gather(*requests), await requests[0]

    found, again = asyncio.run(all_of_them())
    assert found == expected and again == expected[0]


def test_the_event_loop_goes_on_while_requests_run(talk, monkeypatch):
    """Its pauses stay below a step, though one request's text is taken while another's step runs."""
    slowed(talk, monkeypatch, 0.06)
    pauses = []

    async def tick():
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.002)
            pauses.append(time.perf_counter() - before)

    async def main():
        ticking = asyncio.create_task(tick())
        params = SamplingParams(max_new_tokens=8, ignore_eos=True)
        await asyncio.gather(
            *(text_of(talk.submit(text, params)) for text in ("the cat", "日本")), talk.submit("é", params)
        )
        ticking.cancel()

    asyncio.run(main())
    assert len(pauses) > 40
    assert sum(pause > 0.05 for pause in pauses) < 2, "it does not wait for steps"


def test_a_request_may_be_cancelled_from_the_event_loop(talk):
    async def main():
        first, second = talk.submit("the cat", FREE), talk.submit("日本", FREE)
        pieces = []
        async for piece in first:
            pieces.append(piece)
            if len(first.token_ids) > 4:
                first.cancel()
        return "".join(pieces), first, await second

    text, first, second = asyncio.run(main())
    assert first.status == "cancelled" and text == first.result().text and len(first.token_ids) < 24
    assert second == talk.generate("日本", FREE) and idle(talk)


def test_a_failed_request_raises_in_the_event_loop(talk, monkeypatch):
    def broken(step):
        raise RuntimeError("overflow")

    async def main(wait):
        request = talk.submit("the cat", FREE)
        await (request if wait else text_of(request))

    with monkeypatch.context() as patch:
        patch.setattr(talk._loop.backend.ranks, "run", broken)
        for wait in (True, False):
            with pytest.raises(RequestError, match="failed in step"):
                asyncio.run(main(wait))
    assert idle(talk)


def test_a_session_closed_meanwhile_ends_what_an_event_loop_waits_for(talk, monkeypatch):
    slowed(talk, monkeypatch)

    async def main():
        streamed, awaited = talk.submit("the cat", FREE), talk.submit("日本", FREE)
        work = asyncio.gather(text_of(streamed), awaited, return_exceptions=True)
        await asyncio.sleep(0.05)
        talk.close()
        return await work, awaited

    found, awaited = asyncio.run(main())
    assert [str(error)[:40] for error in found] == [
        "the session was closed while request 1 w",
        "the session was closed while request 2 w",
    ]
    assert awaited.status == "cancelled" and awaited.token_ids


def test_threads_may_wait_for_requests_of_one_session(talk):
    texts = ["the cat", "日本", "é", "a cat"]
    expected = [talk.generate(text, FREE) for text in texts]
    found = {}
    threads = [
        threading.Thread(target=lambda text=text: found.update({text: talk.submit(text, FREE).result()}))
        for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[text] for text in texts] == expected and idle(talk)


def test_the_cache_and_the_events_may_be_read_while_another_thread_steps(talk):
    requests, errors, done = [], [], threading.Event()

    def work():
        try:
            for text in ("the cat", "日本", "é", "a cat") * 3:
                requests.append(talk.submit(text, FREE))
            talk.run()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    reads = 0
    while not done.is_set():
        cache = talk.kv_cache
        assert 0 <= cache.shared <= cache.pool.num_blocks and cache.tokens >= 0 and cache.chains is not None
        assert len(cache.blocks) == cache.pool.num_blocks
        assert sum(1 for _ in talk.events) >= 0
        if len(talk.events):
            assert talk.events.blocks_after(-1) is not None
        reads += 1
    thread.join()
    assert not errors and reads > 3 and all(request.done for request in requests)


# --- beside a step of another thread


def test_submit_cancel_and_fork_return_while_another_thread_is_inside_a_forward_pass(talk, monkeypatch):
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    expected = talk.generate("the cat", params)
    running, dropped = talk.submit("the cat", params), talk.submit("a mat", params)
    talk.step()
    inside, leave, results = threading.Event(), threading.Event(), []
    run = talk._loop.backend.ranks.run

    def blocked(step):
        inside.set()
        assert leave.wait(20)
        return run(step)

    def meanwhile():
        results.append((talk.submit("the cat", params), talk.fork(running), dropped.cancel(), dropped.status))
        results.append((running.token_ids, running.status, talk.waiting))

    monkeypatch.setattr(talk._loop.backend.ranks, "run", blocked)
    stepping = threading.Thread(target=talk.step, daemon=True)
    stepping.start()
    assert inside.wait(20)
    thread = threading.Thread(target=meanwhile, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "submit, fork or cancel waits for the forward pass"
    leave.set()
    stepping.join(20)
    (late, child, cancelled, status), (token_ids, state, waiting) = results
    assert cancelled and (status, dropped.status) == ("running", "cancelled")
    assert (token_ids, state, waiting) == (expected.token_ids[:1], "running", 2)
    talk._loop.check_integrity()
    assert running.result() == late.result() == child.result() == expected
