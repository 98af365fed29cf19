"""Holds an interrupt back over code that must not be cut: native callbacks, a wait for a thread, bookkeeping."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Held:
    """Whether an interrupt has come within the block."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, *_: object) -> None:
        """Take the place of the signal's handler."""
        self.asked = True


@contextmanager
def held_interrupts() -> Iterator[Held]:
    """Hold SIGINT back in a block; at its end the handler that was there before gets it, and usually raises.

    An exception that a handler raises within a callback of native code is lost there. Python runs handlers in the main
    thread only, so that in another thread there is nothing to hold back. Blocks may be nested; the outermost one
    delivers.
    """
    held = Held()
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():  # None: it is not Python's
        yield held
        return
    signal.signal(signal.SIGINT, held)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, handler)
        if held.asked:
            signal.raise_signal(signal.SIGINT)
