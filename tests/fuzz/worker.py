"""Runs cases in this process and prints one JSON line for each; ``python -m tests.fuzz.worker``."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from trtlab import TrtlabError

from .folder import Files, Link, write
from .guard import Broken, Guard, Meter, require
from .journeys import SECRET, Journey, check_error
from .kinds import Base, Kind
from .registry import all_kinds

MOST_SECONDS = 5.0  # of CPU time of one case
MOST_BYTES = 2 * 2**30  # of resident memory
HANGING_S = 60.0  # after which the process gives up and prints its stack
ADDRESS_SPACE = 6 * 2**30  # beyond what the process has when it is ready
TEMPORARY = "temporary"  # where this process's temporary files go, so that those left behind are seen
ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    """What became of one case."""

    kind: str
    number: int
    seconds: float = 0.0
    wall: float = 0.0
    peak: int = 0
    stages: list[str] = field(default_factory=list)
    refused: str = ""
    failure: str = ""
    where: str = ""
    trace: str = ""
    edits: list[str] = field(default_factory=list)
    only: list[int] | None = None  # the single edit that fails alone


class Worker:
    """Runs cases; a case is a kind, a seed and a number, and nothing else decides what it does."""

    def __init__(self, seed: int, scratch: Path) -> None:
        self.seed, self.scratch = seed, scratch
        self.guard = Guard()
        self._bases: dict[str, list[Base]] = {}
        self._kinds = all_kinds()

    def bases(self, kind: str) -> list[Base]:
        """The folders that cases of a kind start from. Each opens and runs; else the cases would prove nothing."""
        if kind not in self._bases:
            self._bases[kind] = self._kinds[kind].make_bases()
            for base in self._bases[kind]:
                result = Result(kind, -1)
                self._run(result, base, dict(base.files), Random(0), deep=True)
                assert not result.failure and not result.refused, (
                    f"{kind}, {base.name}: {result.failure or result.refused}\n{result.trace}"
                )  # noqa: E501
                assert base.ends in result.stages, f"{kind}, {base.name} ended at {result.stages}"
        return self._bases[kind]

    def run(self, kind: str, number: int, only: Sequence[int] | None = None) -> Result:
        """Run one case; ``only`` names the edits to keep."""
        bases, result = self.bases(kind), Result(kind, number)
        rng = self._rng(kind, number)
        base = rng.choice(bases)
        files, result.edits = self.make(self._kinds[kind], base, rng, (kind, number), only)
        deep = rng.random() < self._kinds[kind].deep
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

    def make(
        self, kind: Kind, base: Base, rng: Random, case: tuple[str, int], only: Sequence[int] | None
    ) -> tuple[Files, list[str]]:
        """The edited folder, and what was done to it."""
        files, done = dict(base.files), [base.name]
        count = 1 + sum(rng.random() < 0.4 for _ in range(kind.most_edits - 1))
        for place in range(count):
            edit_rng = self._rng(*case, place)
            (edit,) = edit_rng.choices([edit for _, edit in kind.edits], [weight for weight, _ in kind.edits])
            if only is None or place in only:
                done.append(edit(files, edit_rng))
        return files, done

    def _rng(self, *case: object) -> Random:
        return Random("/".join(map(str, (self.seed, *case))))

    def _run(self, result: Result, base: Base, files: Files, rng: Random, *, deep: bool) -> None:
        """Run one case; one that took too long runs again, for the first run may have compiled the loops of a dtype."""
        state = rng.getstate()
        self._measure(result, base, files, rng, deep=deep)
        if not result.failure and result.seconds >= MOST_SECONDS:
            rng.setstate(state)
            self._measure(result, base, files, rng, deep=deep)
        if not result.failure:
            try:
                require(result.seconds < MOST_SECONDS, f"{result.seconds:.1f} s")
                require(result.peak < MOST_BYTES, f"{result.peak / 2**30:.1f} GiB")
            except Broken as broken:
                _describe(result, broken)

    def _measure(self, result: Result, base: Base, files: Files, rng: Random, *, deep: bool) -> None:
        folder = self.scratch / "case"
        outside = folder / "outside"
        write(outside, {"secret.json": SECRET, "evil.py": b"", "model.safetensors": b"0"}, outside)
        write(folder / "model", files, outside)
        journey = Journey(folder, folder / "model" / base.at, rng, deep)
        meter = Meter()
        try:
            with self.guard.case(self.scratch, self.scratch / "canary"):
                try:
                    base.use(journey)
                except TrtlabError as error:
                    result.refused = f"{type(error).__name__}: {error!s:.300}"
                    check_error(error)
                journey.check()
                left = sorted((self.scratch / TEMPORARY).iterdir())
                require(not left, f"temporary files are left: {[path.name for path in left[:3]]}")
        except BaseException as error:  # noqa: BLE001 - that is what is looked for; Rust's panics are no Exception
            result.stages = journey.stages
            _describe(result, error)
        result.seconds, result.wall, result.peak = meter.stop()
        result.stages = journey.stages
        (self.scratch / "canary").unlink(missing_ok=True)
        shutil.rmtree(folder)
        for left in (self.scratch / TEMPORARY).iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _describe(result: Result, error: BaseException) -> None:
    """Where a failure came from: its class, and the innermost line of trtlab, by which failures are told apart."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/trtlab/" in f.filename and "site-packages" not in f.filename] or frames
    result.failure = f"{type(error).__name__}: {error!s:.300}" if not isinstance(error, Broken) else str(error)
    place = f"{ours[-1].filename.removeprefix(str(ROOT) + '/')}:{ours[-1].lineno}" if ours else ""
    result.where = (
        place if not isinstance(error, Broken) else f"{result.kind}, after {(result.stages or ['nothing'])[-1]}"
    )
    result.trace = "".join(traceback.format_exception(error))[-3000:]


def scratch_root() -> Path:
    """A folder for cases: in memory where the system has one, for thousands of small files are written."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="trtlab-fuzz-", dir=shared if os.access(shared, os.W_OK) else None))


def main(arguments: Sequence[str]) -> None:
    """``worker KIND SEED FIRST STOP [EDITS]``: run cases FIRST to STOP - 1 and print their results."""
    kind, seed, first, stop = arguments[0], int(arguments[1]), int(arguments[2]), int(arguments[3])
    only = [int(place) for place in arguments[4].split(",")] if len(arguments) > 4 else None
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what trtlab and others print is not the result
    torch.set_num_threads(1)
    scratch = scratch_root()
    os.chdir(scratch)  # planted code writes to the relative path "canary"
    tempfile.tempdir = str(scratch / TEMPORARY)
    Path(tempfile.tempdir).mkdir()
    try:
        worker = Worker(seed, scratch)
        worker.bases(kind)
        soft = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
        failed = set[str]()
        for number in range(first, stop):
            lines.write(json.dumps({"started": number}) + "\n")
            faulthandler.dump_traceback_later(HANGING_S, exit=True)
            result = worker.run(kind, number, only)
            if result.failure and only is None and result.where not in failed:
                failed.add(result.where)
                result = worker.reduced(result)
            faulthandler.cancel_dump_traceback_later()
            lines.write(json.dumps(asdict(result)) + "\n")
            if number % 200 == 0:
                gc.collect()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
