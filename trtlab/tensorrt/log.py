"""Forwards TensorRT's log to Python's, logger ``trtlab.tensorrt``. A build listens for errors and memory sizes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

logger = logging.getLogger("trtlab.tensorrt")

Listener = Callable[[int, str], None]


class Log:
    """Forwards TensorRT's messages to Python's logging; with a listener, it gets the errors and logging does not."""

    def __init__(self, trt: Any) -> None:
        self.listeners: list[Listener] = []
        self._listening = threading.Lock()
        severity = trt.ILogger.Severity
        self.levels = {
            severity.INTERNAL_ERROR: logging.ERROR,
            severity.ERROR: logging.ERROR,
            severity.WARNING: logging.WARNING,
            severity.INFO: logging.INFO,
            severity.VERBOSE: logging.DEBUG,
        }
        self.native = native_logger(trt, self.write)

    def write(self, severity: Any, message: str) -> None:
        """Forward one message; TensorRT calls it from any of its threads."""
        level = self.levels[severity]
        for listener in tuple(self.listeners):
            listener(level, message)
        # A listener raises an exception with the error in it; logging it as well would print it twice.
        quiet = level == logging.ERROR and self.listeners
        logger.log(logging.DEBUG if quiet else level, message)

    @contextmanager
    def forwarded_to(self, listener: Listener) -> Iterator[None]:
        """Send every message to ``listener`` as well, within a ``with`` block.

        A second thread waits for the first: TensorRT does not say which build a message comes from.
        """
        with self._listening:
            self.listeners.append(listener)
            try:
                yield
            finally:
                self.listeners.remove(listener)


@cache
def log(trt: Any) -> Log:
    """The log of a TensorRT module, one per process: the library keeps the first logger that it gets."""
    return Log(trt)


def native_logger(trt: Any, write: Callable[[Any, str], None]) -> Any:
    """An ``ILogger`` that calls ``write(severity, message)``."""

    class Forwarding(trt.ILogger):  # type: ignore[misc]  # a base class known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Forward a message; TensorRT calls it."""
            write(severity, message)

    return Forwarding()
