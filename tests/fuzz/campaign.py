"""Runs cases in processes that may die, and counts what became of them."""

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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .results import Job, Result

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TRTLAB_BACKEND": "torch",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONHASHSEED": "0",
}


@dataclass
class Tally:
    """What became of the cases of one kind; ``failures`` has the first case of each distinct failure."""

    kind: str
    cases: int = 0
    seconds: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    failed: int = 0
    slowest: float = 0.0
    largest: int = 0
    failures: dict[str, Result] = field(default_factory=dict)

    def add(self, result: Result) -> bool:
        """Count one result; returns whether it is the first of a failure."""
        self.cases += 1
        self.stages.update(set(result.stages))
        self.slowest, self.largest = max(self.slowest, result.seconds), max(self.largest, result.peak)
        self.failed += bool(result.failure)
        self.refused += bool(result.refused) and not result.failure
        signature = f"{re.sub('[0-9]+', 'N', result.failure)[:60]} at {result.where}"
        first = bool(result.failure) and signature not in self.failures
        if first:
            self.failures[signature] = result
        return first

    @property
    def row(self) -> tuple[str, ...]:
        """The cells under ``HEADS``."""
        opened, rate = self.stages["opened"] / max(self.cases, 1), self.cases / max(self.seconds, 1e-9)
        numbers = (self.kind, f"{self.cases:,}", f"{rate:.0f}/s", f"{opened:.0%}", f"{self.stages['ran']:,}")
        limits = (f"{self.slowest:.2f} s", f"{self.largest / 2**20:.0f} MiB")
        return (*numbers, f"{self.refused:,}", f"{self.failed:,}", *limits)


HEADS = ("kind", "cases", "rate", "opened", "ran", "refused", "failed", "slowest", "largest")


def line(cells: Sequence[str]) -> str:
    """One line of the table."""
    return f"{cells[0]:<12}" + "".join(f"{cell:>10}" for cell in cells[1:])


def results(jobs: Sequence[Job], seed: int) -> Iterator[Result]:
    """The results of all jobs in order; a process that dies is replaced, and its death is the result of its case."""
    left = list(jobs)
    while left:
        died = None
        for result in _of_one_process(left, seed):
            died = result if not result.edits else None
            while left and left[0].kind != result.kind:
                left.pop(0)
            left[0] = Job(result.kind, result.number + 1, left[0].stop, left[0].only)
            yield result
        left = [job for job in left if job.first < job.stop] if died else []


def _of_one_process(jobs: Sequence[Job], seed: int) -> Iterator[Result]:
    task = {"jobs": [asdict(job) for job in jobs], "seed": seed}
    environment, nothing = {**os.environ, **ENVIRONMENT}, subprocess.DEVNULL
    started = None
    with tempfile.TemporaryFile("w+") as errors, scratch_folder() as scratch:
        command = [sys.executable, "-m", "tests.fuzz.worker", json.dumps({**task, "scratch": scratch})]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=nothing, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        try:
            for text in process.stdout:
                values = json.loads(text)
                started = values.get("started")
                if started is None:
                    yield Result(**values)
            process.wait()
        finally:
            process.kill()  # where the reader stopped before the end
            process.stdout.close()
            process.wait()
        errors.seek(0)
        said = errors.read()[-3000:]
    if started is not None:
        failure = "it hangs" if "Timeout (" in said else f"the process died: {process.returncode}"
        yield Result(*started, failure=failure, where=_last_line_of_trtlab(said), trace=said)
    elif process.returncode != 0:
        raise RuntimeError(f"no case ran: the process ended with {process.returncode}:\n{said}")


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for the cases of a process that may die: in memory where it can be, for they write many small files."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="trtlab-fuzz-", dir=shared if os.access(shared, os.W_OK) else None)


def _last_line_of_trtlab(said: str) -> str:
    """The innermost place in trtlab of a stack that faulthandler printed, newest call first."""
    place = re.search(rf'File "{re.escape(str(ROOT))}/(trtlab/[^"]+)", line (\d+)', said)
    return f"{place[1]}:{place[2]}" if place else ""


def run(jobs: Sequence[Job], seed: int) -> Iterator[tuple[Tally, Result | None]]:
    """Count results: gives the first of each failure as it comes, and each kind's tally, with None, when it is done."""
    tally, began = Tally(jobs[0].kind), time.monotonic()
    for result in results(jobs, seed):
        if result.kind != tally.kind:
            tally.seconds = time.monotonic() - began
            yield tally, None
            tally, began = Tally(result.kind), time.monotonic()
        if tally.add(result):
            yield tally, result
    tally.seconds = time.monotonic() - began
    yield tally, None


def case_command(result: Result, seed: int) -> str:
    """The command that runs one case again."""
    words = ["python", "-m", "tests.fuzz", "--kind", result.kind, "--seed", str(seed), "--case", str(result.number)]
    return shlex.join(words + (["--edits", ",".join(map(str, result.only))] if result.only else []))
