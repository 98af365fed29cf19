"""TensorRT's log as Python's: logger ``trtlab.tensorrt``. A build listens to it for causes and memory figures."""

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
    """Hands TensorRT's messages to Python's logging; while someone listens, errors go to the listener alone."""

    def __init__(self, trt: Any) -> None:
        self.listeners: list[Listener] = []
        self._turn = threading.Lock()
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
        """One message from TensorRT, from whichever of its threads."""
        level = self.levels[severity]
        for listener in tuple(self.listeners):
            listener(level, message)
        # An error that a listener takes comes out in an exception; printing it as well would say it twice.
        quiet = level == logging.ERROR and self.listeners
        logger.log(logging.DEBUG if quiet else level, message)

    @contextmanager
    def heard_by(self, listener: Listener) -> Iterator[None]:
        """Send every message to ``listener`` as well, for the length of a with block.

        A second thread waits for its turn: TensorRT does not say which build a message comes from.
        """
        with self._turn:
            self.listeners.append(listener)
            try:
                yield
            finally:
                self.listeners.remove(listener)


@cache
def log(trt: Any) -> Log:
    """The one log of a TensorRT module: the library keeps the first logger it is given for the whole process."""
    return Log(trt)


def native_logger(trt: Any, write: Callable[[Any, str], None]) -> Any:
    """An ``ILogger`` that calls ``write(severity, message)``."""

    class Forwarding(trt.ILogger):  # type: ignore[misc]  # a base class known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT."""
            write(severity, message)

    return Forwarding()
