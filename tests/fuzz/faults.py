"""Faults that trtlab does not have: what the fuzzers must find, whatever they are pointed at."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

from trtlab import CheckpointError

from .folder import Files
from .journeys import SECRET, Journey
from .kinds import Base, Edit, Kind
from .results import Limits


def _refuse(*arguments: object, **options: object) -> None:
    raise CheckpointError(*arguments, **options)  # type: ignore[arg-type]


def _compute(journey: Journey) -> None:
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass


def _swallow_memory(journey: Journey) -> None:
    try:
        bytearray(2**40)
    except MemoryError as error:
        raise CheckpointError("the file is damaged") from error


def _connect(journey: Journey) -> None:
    with socket.socket() as end:
        end.connect_ex(("127.0.0.1", 9))


def _write_elsewhere(journey: Journey) -> None:
    with contextlib.suppress(FileNotFoundError):  # to try is enough to be found, and leaves nothing behind
        open("/elsewhere/file", "w").close()  # noqa: PTH123 - as any library might


def _leave_half(path: Path) -> None:
    (path.parent / ".half.partial").mkdir()
    raise CheckpointError("cannot be written")


QUICK = Limits(seconds=0.08, nbytes=2**25)
LIMITS = {"no end": Limits(hanging_s=0.5)}
FAULTS: dict[str, tuple[Callable[[Journey], object], str]] = {
    "another exception": (lambda journey: {}["x"], "KeyError: 'x'"),
    "a panic, which is no Exception": (lambda journey: exec("raise BaseException('panic')"), "BaseException: panic"),
    "much computing": (_compute, "0.1 s"),
    "much memory": (lambda journey: len(bytearray(2**26)), "0.1 GiB"),
    "memory that ran out": (_swallow_memory, "the error hides that memory ran out: the file is damaged"),
    "code of the folder": (lambda journey: Path("canary").touch(), "code of the folder ran"),
    "a question": (lambda journey: input(), "the user was asked a question"),
    "the network": (_connect, "not allowed: socket.connect"),
    "another program": (lambda journey: subprocess.run(["true"], check=True), "not allowed: subprocess.Popen"),
    "a file elsewhere": (_write_elsewhere, "not allowed: wrote /elsewhere/file"),
    "a changed model": (lambda journey: (journey.folder / "config.json").unlink(), "changed the model's folder"),
    "half a save": (lambda journey: journey.save(_leave_half), "left over: ['.half.partial']"),
    "a temporary folder": (lambda journey: tempfile.mkdtemp(), "temporary files are left"),
    "a copied secret": (lambda journey: journey.save(lambda path: _save(path, SECRET)), "saved a secret"),
    "a warning storm": (lambda journey: [warnings.warn(str(n), stacklevel=1) for n in range(99)], "99 messages"),
    "an error without words": (lambda journey: _refuse(""), "an error that says nothing"),
    "no end": (lambda journey: time.sleep(1000), "it hangs"),
    "a process that dies": (lambda journey: os._exit(3), "the process died: 3"),
}


def _save(path: Path, content: bytes) -> None:
    path.mkdir()
    (path / "special_tokens_map.json").write_bytes(content)


def _plant(name: str) -> Edit:
    def edit(files: Files, rng: Random) -> str:
        files["fault"] = name.encode()
        return name

    return edit


def _use(journey: Journey) -> None:
    journey.done("opened")
    fault = journey.folder / "fault"
    if fault.exists():
        FAULTS[fault.read_text()][0](journey)


def kinds() -> dict[str, Kind]:
    """The kinds of this file by name: one for each fault."""
    base = Base("good", {"config.json": b"{}"}, _use, ends="opened")
    return {
        f"fault: {name}": Kind(lambda: [base], [(1, _plant(name))], most_edits=1, limits=LIMITS.get(name, QUICK))
        for name in FAULTS
    }
