"""Requests that nobody waits for any more, and sessions that are closed from within their own step."""

from __future__ import annotations

import asyncio
import gc
import math

import pytest

from trtlab import BuildConfig, Checkpoint, RequestError, SamplingParams

LONG = SamplingParams(max_new_tokens=80, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=3, ignore_eos=True)


@pytest.fixture
def session(talking_model):
    bounds = BuildConfig(max_seq_len=96, max_batch_size=2, tokens_per_block=8)
    with Checkpoint.from_hugging_face(talking_model).build(bounds, plan=False).session(device="cpu") as session:
        yield session


@pytest.fixture
def slow(session, monkeypatch):
    """Steps of a hundredth of a second, so that an answer of 80 tokens outlives every timeout here."""
    import time

    run = session._loop.backend.ranks.run

    def slowly(step):
        time.sleep(0.01)
        return run(step)

    monkeypatch.setattr(session._loop.backend.ranks, "run", slowly)


@pytest.mark.parametrize("read", ["result", "stream"])
@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_a_request_whose_task_ends_gives_its_slot_back(session, slow, read, how):
    async def wait(request):
        if read == "result":
            return await request
        return [piece async for piece in request]

    async def main():
        request = session.submit("the cat", LONG)
        task = asyncio.ensure_future(wait(request))
        if how == "timeout":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.1)
        else:
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        other = await session.submit("x", SHORT)  # after the step in which the request ends
        return request, other

    request, other = asyncio.run(main())
    assert request.status == "cancelled" and 0 < len(request.token_ids) < 80
    assert other.finish_reason == "length"
    assert session.running == session.waiting == session.kv_cache.used == 0


def test_a_request_that_another_task_awaits_goes_on(session, slow):
    async def main():
        request = session.submit("the cat", LONG)
        keeper = asyncio.ensure_future(asyncio.wait_for(request, 60))
        await asyncio.sleep(0.05)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(request, 0.05)
        return await keeper

    assert asyncio.run(main()).finish_reason == "length"


def test_a_request_that_was_only_submitted_runs_on(session):
    request = session.submit("the cat", SHORT)
    number = request.number
    del request
    gc.collect()
    events = session.run()
    assert [finish.reason for event in events for finish in event.finished if finish.request == number] == ["length"]


def test_a_deadline_is_forgotten_with_its_request(session):
    for _ in range(5):
        assert session.submit("x", SHORT, allotted_time_ms=1e9).result().finish_reason == "length"
    cancelled = session.submit("x", LONG, allotted_time_ms=1e9)
    cancelled.cancel()
    assert not session._loop._deadlines
    waiting = session.submit("x", LONG, allotted_time_ms=1e9)
    assert [request.number for request in session._loop._deadlines] == [waiting.number]
    assert waiting.state.deadline_s < math.inf


@pytest.mark.parametrize("awaited", [False, True])
def test_a_session_closed_within_its_own_step_closes_at_its_end(session, awaited, monkeypatch):
    """As when a callback of the user's, or the garbage collector, closes it there."""
    run = session._loop.backend.ranks.run

    def close_first(step):
        session.close()
        assert not session.closed
        return run(step)

    monkeypatch.setattr(session._loop.backend.ranks, "run", close_first)
    request = session.submit("the cat", LONG)

    async def main():
        return await request

    with pytest.raises(RequestError, match="closed while request 1 was under way"):
        asyncio.run(main()) if awaited else request.result()
    assert session.closed and len(request.token_ids) == 1  # the step's token was handed out
    session._loop.check_integrity()
    session.close()
