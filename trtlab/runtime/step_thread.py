"""Runs a session's steps for an event loop, in one thread beside it. Knows no requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from trtlab.interrupts import hold_interrupts

T = TypeVar("T")


class StepThread:
    """A thread that starts at its first work and ends with ``close``."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._ident: int | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """The result of ``work``, run in the thread after all earlier work."""
        with hold_interrupts():
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, "trtlab-step", initializer=self._note_ident)
            future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        return await future

    def _note_ident(self) -> None:
        self._ident = threading.get_ident()

    def close(self) -> None:
        """End the thread and wait for it, unless the caller is that thread; a second call does nothing."""
        if self._executor is not None:
            self._executor.shutdown(wait=self._ident != threading.get_ident())
