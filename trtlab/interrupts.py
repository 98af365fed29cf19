"""Holds an interrupt (SIGINT) back while shared state changes, and delivers it where nothing can break."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import ClassVar

Handler = Callable[[int, FrameType | None], object]


class hold_interrupts:
    """Context manager: an interrupt that arrives inside is delivered at its end, or by ``deliver_interrupt``.

    The handler that was installed before is called then, and is installed again afterwards: Python's own, which raises
    KeyboardInterrupt, or that of an event loop or a kernel. Python interrupts its main thread only, so the block does
    nothing in other threads, nor inside another such block. In a callback of native code an interrupt would be lost.

    Entering gives the outermost block; its ``pending`` tells whether an interrupt has arrived and not been delivered.

    Example:
        >>> with hold_interrupts():
        ...     balance = {"left": 1, "right": 1}
    """

    current: ClassVar[hold_interrupts | None] = None  # like the handler itself: one for the process

    def __init__(self) -> None:
        self._handler: Handler | None = None
        self.pending = False

    def __enter__(self) -> hold_interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        if hold_interrupts.current is None:
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):  # else an interrupt ends the process, or is ignored
                self._handler = handler
                signal.signal(signal.SIGINT, self._note)
                hold_interrupts.current = self  # after the line above: from there on no line can be interrupted
        return hold_interrupts.current or self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if hold_interrupts.current is self:
            hold_interrupts.current = None
            signal.signal(signal.SIGINT, self._handler)
            self._deliver()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.pending = True

    def _deliver(self) -> None:
        if self.pending:
            self.pending = False
            assert self._handler is not None, "an interrupt was noted without a handler"
            self._handler(signal.SIGINT, sys._getframe(1))


def deliver_interrupt() -> None:
    """Deliver an interrupt that is held back; called between the parts of a long computation.

    Raises:
        KeyboardInterrupt: from Python's own handler. Another handler decides for itself.
    """
    hold = hold_interrupts.current
    if hold is not None and hold.pending and threading.current_thread() is threading.main_thread():
        hold._deliver()
