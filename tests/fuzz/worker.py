"""Runs cases in this process and prints a line for each: the program that ``campaign`` starts."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch

from trtlab import TrtlabError

from .folder import Files, write
from .guard import Broken, Guard, Meter, require
from .journeys import SECRET, Journey, check_error
from .kinds import Base
from .registry import find_kind
from .results import Job, Result

ADDRESS_SPACE = 6 * 2**30  # beyond what the process has when it is ready
TEMPORARY = "temporary"  # where this process's temporary files go, so that those left behind are seen
ROOT = Path(__file__).parents[2]


class Worker:
    """Runs cases; a case is a kind, a seed and a number, and nothing else decides what it does."""

    def __init__(self, seed: int, scratch: Path) -> None:
        self.seed, self.scratch = seed, scratch
        self.guard = Guard()
        self._bases: dict[str, list[Base]] = {}

    def bases(self, kind: str) -> list[Base]:
        """The folders that cases of a kind start from. Each opens and runs; else the cases would prove nothing."""
        if kind not in self._bases:
            self._bases[kind] = find_kind(kind).make_bases()
            for base in self._bases[kind]:
                result = Result(kind, -1)
                self._measure(result, base, dict(base.files), Random(0), deep=True)
                fault = result.failure or result.refused
                assert not fault, f"{kind}, {base.name}: {fault}\n{result.trace}"
                assert base.ends in result.stages, f"{kind}, {base.name} ended at {result.stages}"
        return self._bases[kind]

    def run(self, kind: str, number: int, only: Sequence[int] | None = None) -> Result:
        """Run one case; ``only`` names the edits to keep."""
        rng, result = self._rng(kind, number), Result(kind, number)
        base = rng.choice(self.bases(kind))
        files = dict(base.files)
        deep = rng.random() < find_kind(kind).deep
        result.edits = [base.name, *self._edit(files, kind, number, rng, only)]
        self._run(result, base, files, rng, deep=deep)
        return result

    def reduced(self, result: Result) -> Result:
        """A failed case with one of its edits alone, if that fails in the same place."""
        for place in range(len(result.edits) - 1):
            alone = self.run(result.kind, result.number, [place])
            if alone.failure and alone.where == result.where:
                alone.only = [place]
                return alone
        return result

    def _edit(self, files: Files, kind: str, number: int, rng: Random, only: Sequence[int] | None) -> list[str]:
        """Change the files; returns what each edit did. Each has numbers of its own, so that it works alone too."""
        edits, weights = [edit for _, edit in find_kind(kind).edits], [weight for weight, _ in find_kind(kind).edits]
        count = 1 + sum(rng.random() < 0.4 for _ in range(find_kind(kind).most_edits - 1))
        done = []
        for place in range(count):
            edit_rng = self._rng(kind, number, place)
            (edit,) = edit_rng.choices(edits, weights)
            if only is None or place in only:
                done.append(edit(files, edit_rng))
        return done

    def _rng(self, *case: object) -> Random:
        return Random("/".join(map(str, (self.seed, *case))))

    def _run(self, result: Result, base: Base, files: Files, rng: Random, *, deep: bool) -> None:
        """Run one case; one that took too long runs again, for the first run may have compiled the loops of a dtype."""
        state, limits = rng.getstate(), find_kind(result.kind).limits
        self._measure(result, base, files, rng, deep=deep)
        if not result.failure and result.seconds >= limits.seconds:
            rng.setstate(state)
            self._measure(result, base, files, rng, deep=deep)
        with _described(result):
            require(result.peak < limits.nbytes, f"{result.peak / 2**30:.1f} GiB")
            require(result.seconds < limits.seconds, f"{result.seconds:.1f} s")

    def _measure(self, result: Result, base: Base, files: Files, rng: Random, *, deep: bool) -> None:
        folder, canary = self.scratch / "case", self.scratch / "canary"
        outside = folder / "outside"
        write(outside, {"secret.json": SECRET, "model.safetensors": b"0"}, outside)
        write(folder / "model", files, outside)
        journey = Journey(folder, folder / "model" / base.at, rng, deep)
        result.stages = journey.stages
        meter = Meter()
        with _described(result), self.guard.case(self.scratch, canary):
            try:
                base.use(journey)
            except TrtlabError as error:
                result.refused = f"{type(error).__name__}: {error!s:.300}"
                check_error(error)
            journey.check()
            left = sorted(path.name for path in (self.scratch / TEMPORARY).iterdir())
            require(not left, f"temporary files are left: {left[:3]}")
        result.seconds, result.peak = meter.stop()
        canary.unlink(missing_ok=True)
        for used in (folder, self.scratch / TEMPORARY):
            shutil.rmtree(used)
        (self.scratch / TEMPORARY).mkdir()


@contextlib.contextmanager
def _described(result: Result) -> Iterator[None]:
    """Note any exception within the block in the result, by the innermost line of trtlab that it came from."""
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - that is what is looked for; a panic of Rust is no Exception
        if result.failure:  # the first one counts
            return
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename.startswith(f"{ROOT}/trtlab/")] or frames
        result.failure, result.where = f"{type(error).__name__}: {error!s:.300}", f"{own[-1].filename}:{own[-1].lineno}"
        if isinstance(error, Broken):
            result.failure, result.where = str(error), f"{result.kind}, after {(result.stages or ['nothing'])[-1]}"
        result.where = result.where.removeprefix(f"{ROOT}/")
        result.trace = "".join(traceback.format_exception(error))[-3000:]


def run(jobs: Sequence[Job], seed: int, scratch: Path) -> Iterator[dict[str, object]]:
    """Run cases in a folder; before each ``{"started": [kind, number]}``, after it its result."""
    torch.set_num_threads(1)
    os.chdir(scratch)  # planted code writes to the relative path "canary"
    tempfile.tempdir = str(scratch / TEMPORARY)
    (scratch / TEMPORARY).mkdir()
    failed = set[str]()
    worker = Worker(seed, scratch)
    for job in jobs:
        worker.bases(job.kind)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for job in jobs:
        for number in range(job.first, job.stop):
            yield {"started": [job.kind, number]}
            faulthandler.dump_traceback_later(find_kind(job.kind).limits.hanging_s, exit=True)
            result = worker.run(job.kind, number, job.only)
            if result.failure and job.only is None and result.where not in failed:
                failed.add(result.where)
                result = worker.reduced(result)
            faulthandler.cancel_dump_traceback_later()
            yield asdict(result)
            if number % 200 == 0:
                gc.collect()


def main() -> None:
    """The argument is JSON: jobs, seed, and an empty folder."""
    task = json.loads(sys.argv[1])
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what trtlab and others print is not the result
    jobs = [Job(**job) for job in task["jobs"]]
    for line in run(jobs, task["seed"], Path(task["scratch"])):
        lines.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
