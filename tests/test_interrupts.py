"""An interrupt that is held back arrives exactly once, at a place of our choice, at the handler that was there."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from trtlab.interrupts import deliver_interrupt, hold_interrupts


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def handler():
    """A handler that only counts, installed for one test."""
    calls = []

    def count(signum, frame):
        calls.append(signum)

    before = signal.signal(signal.SIGINT, count)
    yield count, calls
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_arrives_when_the_block_ends():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with hold_interrupts():
            interrupt()
            done.append("after the interrupt")
        done.append("after the block")
    assert done == ["after the interrupt"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and hold_interrupts.current is None


def test_several_interrupts_in_a_block_are_one(handler):
    count, calls = handler
    with hold_interrupts():
        interrupt()
        interrupt()
        assert not calls
    assert calls == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is count


def test_it_can_be_delivered_within_the_block(handler):
    _, calls = handler
    deliver_interrupt()
    with hold_interrupts():
        deliver_interrupt()
        assert not calls
        interrupt()
        deliver_interrupt()
        deliver_interrupt()
        assert len(calls) == 1
    assert len(calls) == 1


def test_an_inner_block_leaves_the_interrupt_to_the_outer_one(handler):
    _, calls = handler
    with hold_interrupts() as outer:
        with hold_interrupts() as inner:
            assert not inner.pending
            interrupt()
            assert inner.pending
        assert outer.pending and not calls
    assert len(calls) == 1


def test_an_error_of_the_block_is_kept_beside_the_interrupt():
    with pytest.raises(KeyboardInterrupt) as raised, hold_interrupts():
        interrupt()
        raise ValueError("the block's own")
    assert isinstance(raised.value.__context__, ValueError)


@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
def test_where_no_python_handler_is_installed_nothing_changes(disposition):
    before = signal.signal(signal.SIGINT, disposition)
    try:
        with hold_interrupts():
            assert signal.getsignal(signal.SIGINT) == disposition
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_hold_nothing(handler):
    count, calls = handler
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with hold_interrupts():
            inside.set()
            leave.wait(20)
            deliver_interrupt()

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(20)
    interrupt()
    assert len(calls) == 1 and signal.getsignal(signal.SIGINT) is count
    leave.set()
    thread.join()
    with hold_interrupts():
        interrupt()
        other = threading.Thread(target=deliver_interrupt)  # not its interrupt to take
        other.start()
        other.join()
        assert len(calls) == 1
    assert len(calls) == 2


def test_an_event_loops_own_handler_cancels_its_task_as_ever():
    steps = []

    async def main():
        with hold_interrupts():
            interrupt()
            steps.append("held")
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            steps.append("cancelled")
            raise

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert steps == ["held", "cancelled"]
