"""Lets one thread at a time change a session's requests, slots and blocks. Knows neither requests nor blocks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trtlab.errors import RequestError
from trtlab.interrupts import deliver_interrupt, hold_interrupts
from trtlab.runtime.inbox import Inbox, Message

POLL_S = 0.1  # how long a thread waits for another one's step before it looks for an interrupt
ABANDONED_S = 5.0  # a lock is taken over if its holder has not said for so long that it changes anything


class Exclusive:
    """A loop's lock. Whoever holds it carries out the messages that arrive meanwhile, at the latest at its end.

    The process is part of it: a fork copies the lock as it was, perhaps held by a thread that the child lacks.

    Args:
        inbox: The messages.
        carry_out: Carries out one message; called with the lock held.
        leave: Called with the lock held at the end of the outermost block, and the exception that ended it.
    """

    def __init__(
        self, inbox: Inbox, carry_out: Callable[[Message], None], leave: Callable[[BaseException | None], None]
    ) -> None:
        self._inbox = inbox
        self._carry_out = carry_out
        self._leave = leave
        self._lock = threading.RLock()
        self._holder: int | None = None  # the thread that changes the state, set and cleared with the lock held
        self._depth = 0  # above 0 the holder is changing the state: a message that its own thread posts must wait
        self._process = os.getpid()

    @property
    def in_own_process(self) -> bool:
        """Whether this is the process that opened the session, and no fork of it."""
        return os.getpid() == self._process

    def require_own_process(self) -> None:
        """Raise RequestError in a forked child of the process that opened the session."""
        if not self.in_own_process:
            raise RequestError(
                "this session was opened before the process was forked",
                got=f"process {os.getpid()}, a child of {self._process}",
                remedy='open it in the child, started by multiprocessing.get_context("spawn")',
            )

    @contextmanager
    def changes(self) -> Iterator[None]:
        """Hold the lock in a block. An interrupt is held back in it, and messages are carried out before and after."""
        self.require_own_process()
        error: BaseException | None = None
        with hold_interrupts():
            self._acquire()
            before = self._depth
            try:
                self._depth = before + 1
                self._holder = threading.get_ident()
                if not before and self._inbox.messages:
                    self.drain()
                yield
            except BaseException as raised:
                error = raised
                raise
            finally:
                try:
                    if not before:
                        self._leave(error)
                finally:
                    if not before:
                        self._holder = None
                    self._depth = before
                    self._lock.release()
                    if self._inbox.messages:
                        self.attend()

    def _acquire(self) -> None:
        """Wait for the lock; meanwhile interrupts are delivered.

        An exception that another thread raises in this one (PyThreadState_SetAsyncExc) can come just after the lock was
        taken, or just before it is released: nobody would release it. The state is whole then, and another lock serves.
        """
        idle = 0.0
        while not self._lock.acquire(timeout=POLL_S):
            deliver_interrupt()
            idle = idle + POLL_S if self._holder is None else 0.0
            if idle > ABANDONED_S:
                self._lock, self._depth = threading.RLock(), 0

    def drain(self) -> None:
        """Carry out all messages; the caller holds the lock."""
        self._inbox.drain(self._carry_out)

    def attend(self) -> None:
        """Carry out messages, unless another thread holds the lock: that thread looks again after it releases it."""
        while self._inbox.messages and self._lock.acquire(blocking=False):
            try:
                if self._depth:
                    return
                with self.changes():
                    pass
            finally:
                self._lock.release()
