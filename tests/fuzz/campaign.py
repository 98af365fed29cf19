"""Runs cases in processes that may die, gathers what failed, and reduces each failure to the edits that cause it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TRTLAB_BACKEND": "torch",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
}
Line = dict[str, Any]


@dataclass
class Tally:
    """What became of the cases of one kind; ``failures`` has the first case of each distinct failure."""

    kind: str
    cases: int = 0
    seconds: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    slowest: Line = field(default_factory=lambda: {"seconds": 0.0})
    largest: Line = field(default_factory=lambda: {"peak": 0})
    failures: dict[str, Line] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, result: Line) -> None:
        """Count one result."""
        self.cases += 1
        self.stages.update(set(result["stages"]))
        self.slowest = max(self.slowest, result, key=lambda line: line["seconds"])
        self.largest = max(self.largest, result, key=lambda line: line["peak"])
        if result["failure"]:
            signature = re.sub(r"\d+", "N", result["failure"].split(":")[0][:80]) + f" at {result['where']}"
            self.failed[signature] += 1
            self.failures.setdefault(signature, result)
        elif result["refused"]:
            self.refused[result["refused"].split(":")[0]] += 1

    def __str__(self) -> str:
        """One line of the table."""
        opened, ran = self.stages["opened"], self.stages["ran"]
        return (
            f"{self.kind:<12} {self.cases:>7,} {self.cases / max(self.seconds, 1e-9):>7.0f}/s "
            f"{opened / max(self.cases, 1):>7.0%} {ran:>7,} {sum(self.refused.values()):>8,} "
            f"{sum(self.failed.values()):>7,} {self.slowest['seconds']:>7.2f} s {self.largest['peak'] / 2**20:>6.0f} MiB"
        )


HEAD = f"{'kind':<12} {'cases':>7} {'rate':>9} {'opened':>7} {'ran':>7} {'refused':>8} {'failed':>7} {'slowest':>9} {'largest':>10}"  # noqa: E501


def run_kind(kind: str, seed: int, first: int, count: int, on_failure: Callable[[Line], None] | None = None) -> Tally:
    """Run ``count`` cases of a kind from number ``first``; a process that dies is replaced after its case."""
    tally, number, stop, began = Tally(kind), first, first + count, time.monotonic()
    while number < stop:
        for result in _lines(kind, seed, number, stop):
            seen = set(tally.failures)
            tally.add(result)
            number = result["number"] + 1
            for signature in tally.failures.keys() - seen:
                if on_failure is not None:
                    on_failure(tally.failures[signature])
    tally.seconds = time.monotonic() - began
    return tally


def _lines(kind: str, seed: int, first: int, stop: int, only: Sequence[int] | None = None) -> Iterator[Line]:
    """The results of one process; its death is the result of the case in which it died."""
    command = [sys.executable, "-m", "tests.fuzz.worker", kind, str(seed), str(first), str(stop)]
    command += [] if only is None else [",".join(map(str, only))]
    started = None
    with tempfile.TemporaryFile("w+") as errors:
        environment, nothing = {**os.environ, **ENVIRONMENT}, subprocess.DEVNULL
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=nothing, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert process.stdout is not None
            for text in process.stdout:
                line = json.loads(text)
                if "started" in line:
                    started = line["started"]
                else:
                    started = None
                    yield line
            process.wait()
        finally:
            process.kill()  # where the reader stopped before the end
            process.wait()
        errors.seek(0)
        said = errors.read()[-3000:]
    if started is not None:
        hung = "Timeout (" in said
        yield {
            "kind": kind, "number": started, "seconds": 0.0, "wall": 0.0, "peak": 0, "stages": [], "refused": "", "edits": [],
            "failure": "hangs" if hung else f"the process died: {process.returncode}", "where": _last_line_of_trtlab(said),
            "trace": said,
        }  # fmt: skip
    elif process.returncode != 0:
        raise RuntimeError(f"the worker of {kind} ended with {process.returncode}:\n{said}")


def _last_line_of_trtlab(said: str) -> str:
    """The innermost place in trtlab of a stack that faulthandler printed, newest call first."""
    for line in said.splitlines():
        if "/trtlab/" in line and "site-packages" not in line:
            return line.strip().removeprefix(f'File "{ROOT}/').replace('", line ', ":").split(" ")[0]
    return ""


def case_command(result: Line, seed: int) -> str:
    """The command that runs one case again."""
    parts = [
        "python",
        "-m",
        "tests.fuzz",
        "--kind",
        result["kind"],
        "--seed",
        str(seed),
        "--case",
        str(result["number"]),
    ]
    only = result.get("only")
    return shlex.join(parts + ([] if only is None else ["--edits", ",".join(map(str, only))]))
