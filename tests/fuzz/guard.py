"""What a case must not do beside failing: run code, use the network, ask, write elsewhere, warn a hundred times."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trtlab

MOST_MESSAGES = 8  # warnings and log lines of one case
FORBIDDEN = (
    "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "os.forkpty", "pty.spawn", "webbrowser.open", "ftplib.connect", "urllib.Request",
)  # fmt: skip
OWN = Path(trtlab.__file__).parent
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Broken(Exception):
    """A case broke a rule though no exception that trtlab does not own came out of it."""


def require(condition: object, what: str) -> None:
    """Raise Broken when a rule does not hold."""
    if not condition:
        raise Broken(what)


class Guard:
    """Watches one process: ``with guard.case(folder)`` raises Broken after a case that broke a rule."""

    def __init__(self) -> None:
        self._writable: Path | None = None  # the only folder that may be written now; None between cases
        self._broken: list[str] = []
        self._messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self._messages.append(f"{record.name}: {record.msg!s:.100}")  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._writable is None:
            return
        if event in FORBIDDEN and not _starts_own_script(event, arguments):
            self._broken.append(f"{event}{arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str) and arguments[2] & WRITES:
            path = os.path.abspath(arguments[0])  # noqa: PTH100 - links are not followed
            if (
                not path.startswith((str(self._writable), "/dev/null", "/dev/shm", "/proc/"))
                and "__pycache__" not in path
            ):
                self._broken.append(f"wrote {path}")

    @contextlib.contextmanager
    def case(self, folder: Path, canary: Path) -> Iterator[None]:
        """Only ``folder`` may be written; ``canary`` is the file that planted code would write."""
        self._broken.clear()
        self._messages.clear()
        answers, before = _Answers(), sys.stdin
        sys.stdin, self._writable = answers, folder
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = lambda message, kind, *_: self._messages.append(
                    f"{kind.__name__}: {message!s:.100}"
                )
                yield
        finally:
            sys.stdin, self._writable = before, None
        require(not canary.exists(), "code of the folder ran")
        require(not answers.asked, "the user was asked a question")
        require(not self._broken, f"not allowed: {'; '.join(sorted(set(self._broken))[:3])}")
        require(len(self._messages) <= MOST_MESSAGES, f"{len(self._messages)} messages: {self._messages[:2]}")


def _starts_own_script(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether this is Python that runs a file of trtlab, as chat templates do."""
    command = [str(word) for word in arguments[1]] if event == "subprocess.Popen" else []
    return command[:1] == [sys.executable] and any(word.startswith(str(OWN)) for word in command[1:])


class _Answers(io.TextIOBase):
    """Standard input of a user who says yes to everything."""

    asked = False

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]
        self.asked = True
        return "y\n"


class Meter:
    """CPU seconds and bytes of resident memory that one case takes from here on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._before, self._cpu = _peak(), _cpu_seconds()

    def stop(self) -> tuple[float, int]:
        """CPU seconds and bytes since the start."""
        return _cpu_seconds() - self._cpu, max(0, _peak() - self._before)


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
