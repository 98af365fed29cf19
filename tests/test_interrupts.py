"""An interrupt within a block comes to the handler that was there before, when the block has ended."""

from __future__ import annotations

import signal
import threading

import pytest

from trtlab.interrupts import held_interrupts


@pytest.fixture
def calls():
    """Install a handler that counts its calls, and put the old one back."""
    counted = []
    before = signal.signal(signal.SIGINT, lambda *_: counted.append(1))
    yield counted
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end_of_the_block():
    reached = False
    with pytest.raises(KeyboardInterrupt), held_interrupts() as held:
        assert not held.asked
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached = held.asked
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handler_that_was_there_gets_it_once_and_stays(calls):
    mine = signal.getsignal(signal.SIGINT)
    with held_interrupts():
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert calls == []
    assert calls == [1]
    assert signal.getsignal(signal.SIGINT) is mine
    with held_interrupts():
        pass
    assert calls == [1]


def test_an_ignored_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_in_the_block_is_the_context_of_the_interrupt():
    with pytest.raises(KeyboardInterrupt) as caught, held_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("in the block")
    assert isinstance(caught.value.__context__, ValueError)


def test_in_another_thread_nothing_is_held(calls):
    answers = []

    def work():
        with held_interrupts() as held:
            answers.append((held.asked, signal.getsignal(signal.SIGINT)))

    mine = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [(False, mine)]
