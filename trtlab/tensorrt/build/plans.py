"""The plans of an engine, one a rank: built to files, saved with the engine, and checked when they are opened."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import weakref
from collections import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.errors import EngineError, TrtlabError
from trtlab.storage.lazy import LazyTensor
from trtlab.tensorrt.build.plan import PlanRecord, build_plan
from trtlab.tensorrt.library import Verdict, library
from trtlab.tensorrt.run.plan_runner import check_plan

BUILD_AGAIN = "build again with the TensorRT that is installed, or Engine.load(folder, plan=False) to run the weights"


def plan_file(rank: int) -> str:
    """The file name of one rank's plan."""
    return f"rank{rank}.engine"


class Scratch:
    """A temporary folder that goes when it is closed, or when nothing refers to it any more."""

    def __init__(self) -> None:
        self.folder = Path(mkdtemp(prefix="trtlab-plan-"))
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Plans:
    """Records and files, in rank order. ``scratch`` is the temporary folder of plans that were not saved yet."""

    records: tuple[PlanRecord, ...]
    files: tuple[Path, ...]
    scratch: Scratch | None = None

    @classmethod
    def build(
        cls, config: ModelConfig, build: BuildConfig, mapping: Mapping, ranks: Sequence[abc.Mapping[str, LazyTensor]]
    ) -> Plans:
        """Compile every rank, one after the other; an error or an interrupt leaves nothing behind."""
        library()  # says what is missing before a weight is read
        scratch = Scratch()
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
        return cls(tuple(records), tuple(files), scratch)

    @classmethod
    def load(cls, folder: Path, records: Sequence[PlanRecord]) -> Plans:
        """Open the plans of an engine folder; EngineError when one is missing, damaged or of another TensorRT."""
        plans = cls(tuple(records), tuple(folder / plan_file(rank) for rank in range(len(records))))
        for record, path in zip(plans.records, plans.files, strict=True):
            _check_file(record, path)
        _check_library(plans.records[0])
        return plans

    def save(self, folder: Path) -> None:
        """Copy the plans into a folder."""
        for path in self.files:
            shutil.copyfile(path, folder / path.name)

    def to_json(self) -> list[dict[str, Any]]:
        """The records as config.json keeps them."""
        return [dataclasses.asdict(record) for record in self.records]

    def run_on(self, device: torch.device) -> Verdict:
        """Whether these plans run on a GPU, and why."""
        if len(self.records) > 1:
            return Verdict(False, "plans of several ranks do not run in one process yet")
        try:
            check_plan(self.files[0].read_bytes(), self.records[0], torch.cuda.get_device_capability(device))
        except TrtlabError as refusal:
            return Verdict(False, str(refusal))
        return Verdict(True, f"{self.records[0].flavour} {self.records[0].version} runs the plan on this GPU")

    @property
    def nbytes(self) -> int:
        """Bytes of all plans."""
        return sum(record.plan_bytes for record in self.records)

    def close(self) -> None:
        """Delete plans that were never saved."""
        if self.scratch is not None:
            self.scratch.close()


def _check_file(record: PlanRecord, path: Path) -> None:
    if not path.is_file():
        raise EngineError(f"{path.name} is missing", remedy="copy the engine folder again, or build again")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != record.digest:
        raise EngineError(
            f"{path.name} is damaged: its digest is not the build's",
            got=f"{path.stat().st_size} bytes, SHA-256 {digest[:12]}",
            expected=f"{record.plan_bytes} bytes, SHA-256 {record.digest[:12]}",
            remedy="copy the engine folder again, or build again",
        )


def _check_library(record: PlanRecord) -> None:
    """A plan opens in the very TensorRT that built it; where there is none, only its weights can run anyway."""
    try:
        found = library()
    except TrtlabError:
        return
    if (record.flavour, record.version) != (found.flavour, found.version):
        raise EngineError(
            "the plan was built by another TensorRT",
            got=f"{record.flavour} {record.version}",
            expected=f"{found.flavour} {found.version}",
            remedy=BUILD_AGAIN,
        )
