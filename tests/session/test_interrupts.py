"""Real interrupts (SIGINT) at every place of a session's code: nothing leaks, nothing is lost, nothing hangs.

``TRTLAB_INTERRUPTS`` sets how many places are tried for each kind of use; the default keeps the suite short.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import trtlab
from trtlab import BuildConfig, Checkpoint, RequestError, SamplingParams
from trtlab.interrupts import hold_interrupts

HOME = str(Path(trtlab.__file__).parent)
PLACES = int(os.environ.get("TRTLAB_INTERRUPTS", "12"))
TEXTS = ["the cat", "日本 and more of it", "é"]
FREE = SamplingParams(max_new_tokens=7, ignore_eos=True)
STOPPED = SamplingParams(max_new_tokens=7, ignore_eos=True, stop=["never said"])


@pytest.fixture(scope="module")
def session(talking_model):
    bounds = BuildConfig(max_seq_len=96, max_batch_size=2, tokens_per_block=8)
    engine = Checkpoint.from_hugging_face(talking_model).build(bounds, plan=False)
    with engine.session(backend="torch", device="cpu") as session:
        yield session


@pytest.fixture(scope="module")
def expected(session):
    return [answer.text for answer in session.generate(TEXTS, FREE)]


class Lines:
    """Counts the lines of trtlab that run in this thread, and interrupts at one of them."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.count = 0
        self._interrupt_at = interrupt_at

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, argument):
        return self._line if frame.f_code.co_filename.startswith(HOME) else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.count += 1
            if self.count == self._interrupt_at:
                signal.raise_signal(signal.SIGINT)
        return self._line


def generate(session, expected):
    assert [answer.text for answer in session.generate(TEXTS, FREE)] == expected


def stream(session, expected):
    assert "".join(session.stream(TEXTS[1], STOPPED)) == expected[1]


def leave_a_stream(session, expected):
    pieces = session.stream(TEXTS[1], FREE)
    assert expected[1].startswith(next(pieces))
    pieces.close()


def submit(session, expected):
    request = session.submit(TEXTS[0], STOPPED, allotted_time_ms=1e9)
    assert request.result().text == expected[0]


def fork_and_cancel(session, expected):
    parent = session.submit(TEXTS[2], FREE)
    session.step()
    child = session.fork(parent)
    session.step()
    assert parent.cancel()
    assert child.result().text == expected[2]


def await_requests(session, expected):
    async def main():
        return [answer.text for answer in await asyncio.gather(*(session.submit(text, FREE) for text in TEXTS))]

    assert asyncio.run(main()) == expected


def look_at_logits(session, expected):
    assert session.logits(session.encode(TEXTS[1])).shape[0] == len(session.encode(TEXTS[1]))


def drop_the_cache(session, expected):
    session.kv_cache.clear()


USES: list[Callable] = [
    generate,
    stream,
    leave_a_stream,
    submit,
    fork_and_cancel,
    await_requests,
    look_at_logits,
    drop_the_cache,
]


def check_idle(session, expected):
    """After an interrupt: what nobody waits for ends by itself, and the session is as good as new."""
    session.run()
    loop = session._loop
    loop.check_integrity()
    assert session.running == session.waiting == session.kv_cache.used == 0 and not loop._deadlines
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and hold_interrupts.current is None


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_an_interrupt_at_any_line_leaves_the_session_whole(session, expected, use):
    use(session, expected)
    with Lines() as lines:
        use(session, expected)
    dice = random.Random(use.__name__)
    places = dice.sample(range(1, lines.count + 1), min(PLACES, lines.count))
    for number, place in enumerate(places):
        try:
            with Lines(place):
                use(session, expected)
        except KeyboardInterrupt:
            assert threading.main_thread() is threading.current_thread()
        check_idle(session, expected)
        if number % 4 == 0:
            generate(session, expected)
    generate(session, expected)


def test_a_stream_that_was_interrupted_goes_on_where_it_was_read(session, expected):
    def read(request, pieces):
        for piece in request.stream():
            pieces.append(piece)

    with Lines() as lines:
        read(session.submit(TEXTS[1], FREE), [])
    dice = random.Random(5)
    interrupted = 0
    for place in dice.sample(range(1, lines.count + 1), min(4 * PLACES, lines.count)):
        pieces: list[str] = []
        request = session.submit(TEXTS[1], FREE)
        try:
            with Lines(place):
                read(request, pieces)
        except KeyboardInterrupt:
            interrupted += 1
        read(request, pieces)
        assert "".join(pieces) == expected[1] == request.result().text
        check_idle(session, expected)
    assert interrupted > PLACES


def test_an_interrupt_ends_a_long_forward_pass_between_two_layers(session, monkeypatch):
    """Not at its end only: a prompt of a large model takes minutes."""
    from trtlab.ops.cpu.ops import CpuOps

    reached = []
    attention = CpuOps.self_attention

    def interrupted(self, index, *arguments, **more):
        reached.append(index)
        signal.raise_signal(signal.SIGINT)
        return attention(self, index, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(CpuOps, "self_attention", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.generate(TEXTS, FREE)
    assert reached == [0]
    check_idle(session, [])


@pytest.mark.parametrize("kind", ["result", "stream"])
def test_who_waits_for_another_threads_step_can_be_interrupted_and_loses_nothing(session, expected, kind, monkeypatch):
    inside, leave = threading.Event(), threading.Event()
    run = session._loop.backend.ranks.run

    def slow(step):
        inside.set()
        assert leave.wait(20)
        return run(step)

    request = session.submit(TEXTS[1], FREE)
    with monkeypatch.context() as patch:
        patch.setattr(session._loop.backend.ranks, "run", slow)
        stepping = threading.Thread(target=session.run)
        stepping.start()
        assert inside.wait(20)
        main = threading.main_thread().ident
        timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            request.result() if kind == "result" else list(request.stream())
        timer.join()
        leave.set()
        stepping.join()
    assert "".join(request.stream()) == expected[1] == request.result().text
    check_idle(session, expected)


def test_an_exception_from_another_thread_ends_the_session_with_a_clear_error(talking_model):
    """Places are found by counting lines, as above; the thread that steps is not the main one, so nothing is held."""
    bounds = BuildConfig(max_seq_len=96, max_batch_size=2, tokens_per_block=8)
    engine = Checkpoint.from_hugging_face(talking_model).build(bounds, plan=False)
    dice, outcomes = random.Random(3), set()
    for _ in range(2 * PLACES):
        with engine.session(backend="torch", device="cpu") as session:
            requests = [session.submit(text, FREE) for text in TEXTS]
            place, raised = dice.randrange(1, 1500), []

            def step(session=session, place=place, raised=raised):
                lines = Lines()

                def line(frame, event, argument):
                    lines.count += event == "line"
                    if lines.count == place:
                        lines.count += 1
                        ident = ctypes.c_ulong(threading.get_ident())
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))
                    return line

                lines._line = line
                try:
                    with lines:
                        session.run()
                except BaseException as error:  # noqa: BLE001 - looked at below
                    raised.append(error)

            thread = threading.Thread(target=step)
            thread.start()
            thread.join(60)
            assert not thread.is_alive()
            session._loop.check_integrity()
            if session.closed:
                outcomes.add("ended")
                with pytest.raises(RequestError, match="the session ended in step"):
                    session.generate(TEXTS[0], FREE)
                assert session.kv_cache.used == 0 and not any(request.status == "running" for request in requests)
            else:
                outcomes.add("went on")
                session.run()
                assert len({request.status for request in requests}) == 1
    assert outcomes == {"ended", "went on"}


def test_interrupts_at_random_times_of_a_script(tmp_path, talking_model):
    """As a user's Ctrl-C: a process of its own, with no tracing, that is interrupted again and again."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, random, signal, sys, threading, time
            from trtlab import BuildConfig, Checkpoint, SamplingParams

            folder, times = sys.argv[1], int(sys.argv[2])
            bounds = BuildConfig(max_seq_len=96, max_batch_size=2, tokens_per_block=8)
            session = Checkpoint.from_hugging_face(folder).build(bounds, plan=False).session(device="cpu")
            params, texts = SamplingParams(max_new_tokens=24, ignore_eos=True), ["the cat", "more of it", "x"]
            expected = [answer.text for answer in session.generate(texts, params)]
            dice, hits = random.Random(1), 0
            for number in range(times):
                timer = threading.Timer(dice.random() * 0.03, signal.raise_signal, (signal.SIGINT,))
                try:
                    timer.start()
                    until = time.monotonic() + 0.06
                    while time.monotonic() < until:
                        if number % 2:
                            assert [answer.text for answer in session.generate(texts, params)] == expected
                        else:
                            assert "".join(session.stream(texts[0], params)) == expected[0]
                except KeyboardInterrupt:
                    hits += 1
                timer.join()
                session.run()
                session._loop.check_integrity()
                assert session.running == session.waiting == session.kv_cache.used == 0
            assert [answer.text for answer in session.generate(texts, params)] == expected
            session.close()
            print(hits)
            """
        )
    )
    command = [sys.executable, str(script), str(talking_model), str(2 * PLACES)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "TRTLAB_BACKEND": "torch"}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > PLACES
