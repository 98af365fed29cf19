"""The plans of an engine, one per rank: builds them to files, saves them with the engine, checks them when opened."""

from __future__ import annotations

import dataclasses
import os
import shutil
import weakref
from collections import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.errors import EngineError, TrtlabError
from trtlab.storage.lazy import LazyTensor
from trtlab.storage.scratch import FolderLock, scratch_folder
from trtlab.tensorrt.build.plan import PlanRecord, build_plan
from trtlab.tensorrt.build.plan_check import COPY_OR_BUILD, check_plan
from trtlab.tensorrt.library import Verdict, library

FileState = tuple[int, int, int]


def _state(path: Path) -> FileState:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def plan_file(rank: int) -> str:
    """The file name of one rank's plan."""
    return f"rank{rank}.engine"


class Scratch:
    """A temporary folder that is deleted by ``close``, or when nothing refers to it any more.

    One that a killed process left is deleted by the next build.
    """

    def __init__(self) -> None:
        self.folder, lock = scratch_folder(Path(gettempdir()), "trtlab-plan-")
        self.close = weakref.finalize(self, _remove, self.folder, lock, os.getpid())


def _remove(folder: Path, lock: FolderLock, owner: int) -> None:
    if os.getpid() == owner:  # a forked child ends with what its parent still uses
        shutil.rmtree(folder, ignore_errors=True)
    lock.close()


@dataclass(frozen=True)
class Plans:
    """Records and files of an engine's plans, in rank order.

    ``states`` are size, time and inode of the files when they were checked: an unchanged file need not be hashed again.
    ``scratch`` is the temporary folder of plans that were not saved yet.
    """

    records: tuple[PlanRecord, ...]
    files: tuple[Path, ...]
    states: tuple[FileState, ...]
    scratch: Scratch | None = None

    @classmethod
    def build(
        cls, config: ModelConfig, build: BuildConfig, mapping: Mapping, ranks: Sequence[abc.Mapping[str, LazyTensor]]
    ) -> Plans:
        """Compile every rank, one after the other; after an error or an interrupt no file is left."""
        library()  # raises if TensorRT is missing, before any weight is read
        try:
            scratch = Scratch()
        except OSError as cause:
            raise EngineError(
                f"no plan can be built, as there is no folder for temporary files: {cause.strerror}",
                remedy="set TMPDIR to a folder with room for the plan",
            ) from cause
        try:
            records, files = [], []
            for rank, tensors in enumerate(ranks):
                path = scratch.folder / plan_file(rank)
                with path.open("wb") as stream:
                    weights = {name: tensor.read() for name, tensor in tensors.items()}
                    records.append(build_plan(config, build, mapping, rank, weights, stream))
                files.append(path)
        except BaseException:
            scratch.close()
            raise
        return cls(tuple(records), tuple(files), tuple(map(_state, files)), scratch)

    @classmethod
    def load(cls, folder: Path, records: Sequence[PlanRecord]) -> Plans:
        """Open the plans of an engine folder; EngineError when a plan is missing, damaged or of another TensorRT."""
        files = tuple(folder / plan_file(rank) for rank in range(len(records)))
        for record, path in zip(records, files, strict=True):
            check_plan(record, path=path)
        return cls(tuple(records), files, tuple(map(_state, files)))

    def read(self, rank: int) -> bytes:
        """Read one rank's plan; EngineError when its file is gone, or has changed since it was checked."""
        return self._unchanged(rank).read_bytes()

    def save(self, folder: Path) -> None:
        """Copy the plans into a folder; EngineError as for ``read``."""
        for rank, path in enumerate(self.files):
            shutil.copyfile(self._unchanged(rank), folder / path.name)

    def _unchanged(self, rank: int) -> Path:
        path = self.files[rank]
        if not path.is_file():
            raise EngineError(f"{path} is gone since the engine was opened", remedy=COPY_OR_BUILD)
        if _state(path) != self.states[rank]:
            raise EngineError(f"{path} has changed since the engine was opened", remedy=COPY_OR_BUILD)
        return path

    def to_json(self) -> list[dict[str, Any]]:
        """The records in the form of config.json."""
        return [dataclasses.asdict(record) for record in self.records]

    def run_on(self, device: torch.device) -> Verdict:
        """Whether these plans run on the given GPU, and the reason."""
        if len(self.records) > 1:
            return Verdict(False, "plans of several ranks do not run in one process yet")
        try:
            check_plan(self.records[0], gpu=torch.cuda.get_device_capability(device))
        except TrtlabError as refusal:
            return Verdict(False, str(refusal))
        return Verdict(True, f"{self.records[0].flavour} {self.records[0].version} runs the plan on this GPU")

    @property
    def nbytes(self) -> int:
        """Bytes of all plans."""
        return sum(record.plan_bytes for record in self.records)

    def close(self) -> None:
        """Delete the temporary files of plans that were never saved."""
        if self.scratch is not None:
            self.scratch.close()
