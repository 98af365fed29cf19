"""Follows a TensorRT build: receives the plan's bytes, progress, log messages and interrupts. Starts no build."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from trtlab.interrupts import hold_interrupts
from trtlab.progress import PATIENCE_S, progress

# A build that fails on a machine without a driver reports this as well; it is never the cause.
NO_DRIVER = re.compile(r"CUDA driver version is insufficient|CUDA initialization failure|cudaError 35")
LONGEST_CAUSE = 400


class Writer:
    """Writes the plan to a file piece by piece, and keeps its size and digest."""

    def __init__(self, trt: Any, stream: BinaryIO) -> None:
        self.bytes_written = 0
        self.digest = hashlib.sha256()
        self.error: OSError | None = None
        self._stream = stream
        self.native = native_writer(trt, self.write)

    def write(self, data: bytes) -> int:
        """Write one piece of the plan and return its bytes; fewer than it has tell TensorRT that writing failed."""
        try:
            self._stream.write(data)
        except OSError as error:  # a full disk, for example; the exception must not pass through TensorRT's own code
            self.error = error
            return 0
        self.digest.update(data)
        self.bytes_written += len(data)
        return len(data)


class Watch:
    """Counts the steps of a build and can cancel it."""

    def __init__(self, trt: Any) -> None:
        self.steps = 0
        self.total = 0
        self.cancelled = False
        self.native = native_monitor(trt, self)


class BuildLog:
    """Listener that keeps a build's errors, and its bytes of activations (one number per profile) and of weights."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.activation_bytes: list[int] = []
        self.weight_bytes = 0

    def __call__(self, level: int, message: str) -> None:
        if level >= logging.ERROR:
            self.errors.append(message)
        elif match := re.fullmatch(r"Total Activation Memory: (\d+) bytes", message.strip()):
            self.activation_bytes.append(int(match[1]))
        elif match := re.fullmatch(r"Total Weights Memory: (\d+) bytes", message.strip()):
            self.weight_bytes = int(match[1])

    def cause(self) -> str:
        """The first error that is not a consequence of a missing driver, on one line."""
        causes = [error for error in self.errors if not NO_DRIVER.search(error)] or self.errors or ["it gave no cause"]
        return " ".join(causes[0].split())[:LONGEST_CAUSE]


def run_watched(work: Callable[[], bool], watch: Watch, label: str) -> bool:
    """Run a build in its own thread, while this one draws the progress bar and waits for an interrupt.

    Python delivers an interrupt to the main thread only, and inside a callback of TensorRT it would be lost. The bar's
    clock also goes on while TensorRT calls nothing for a long time. This returns, or raises, when the build has ended.
    """
    outcome: list[bool | BaseException] = []
    ended = threading.Event()

    def guarded() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again below, on the caller's thread
            outcome.append(error)
        finally:
            ended.set()

    # No daemon: Python waits for this thread before it exits, as TensorRT calls back into it.
    thread = threading.Thread(target=guarded, name="trtlab-build")
    started = time.monotonic()
    with progress(label, 0, unit="step") as bar, hold_interrupts() as held:
        try:
            thread.start()
            # Not join(): after an exception in it, Python 3.11 takes a thread that runs for one that has ended.
            while not ended.wait(0.05):
                watch.cancelled = held.pending
                bar.total, bar.n = watch.total, watch.steps
                if time.monotonic() - started > PATIENCE_S:
                    bar.refresh()
        finally:
            watch.cancelled = not ended.is_set()
            if thread.is_alive():
                ended.wait()
        if outcome == [True]:
            bar.total = bar.n = max(watch.total, watch.steps)  # TensorRT skips steps that it announced
    (result,) = outcome
    if isinstance(result, BaseException):
        raise result
    return result


def native_writer(trt: Any, write: Callable[[bytes], int]) -> Any:
    """An ``IStreamWriter`` that passes each piece to ``write``."""

    class Forwarding(trt.IStreamWriter):  # type: ignore[misc]  # a base class known only at run time
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return write(data)

    return Forwarding()


def native_monitor(trt: Any, watch: Watch) -> Any:
    """An ``IProgressMonitor`` that updates ``watch``; TensorRT calls it from its own threads."""

    class Counting(trt.IProgressMonitor):  # type: ignore[misc]  # a base class known only at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.total += num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            watch.steps += 1
            return not watch.cancelled

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Counting()
