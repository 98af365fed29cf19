"""Checks that a plan can run: its file is whole, and its TensorRT and its GPU are those of this machine.

The only place that decides it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from trtlab.errors import EngineError, TrtlabError
from trtlab.storage.paths import reading, require_file
from trtlab.tensorrt.build.plan import PlanRecord
from trtlab.tensorrt.library import Capability, library

COPY_OR_BUILD = "copy the engine folder again, or build again"
BUILD_AGAIN = "build again with the TensorRT that is installed, or Engine.load(folder, plan=False) to run the weights"


def check_plan(record: PlanRecord, *, path: Path | None = None, gpu: Capability | None = None) -> None:
    """Check a plan against its record, the installed TensorRT and a GPU.

    Args:
        record: The record of the plan's build.
        path: The plan's file. It is read whole for its SHA-256, which takes time; None when that was done before.
        gpu: The compute capability that will run the plan; None when the engine may run from its weights instead, and
            then a missing TensorRT is not an error.

    Raises:
        EngineError: when the plan cannot run.
        MissingDependency: for a GPU without TensorRT.
    """
    if path is not None:
        _check_file(record, path)
    try:
        installed = library()
    except TrtlabError:  # missing, or too old
        if gpu is None:
            return
        raise
    if (record.flavour, record.version) != (installed.flavour, installed.version):
        raise EngineError(
            "the plan was built by another TensorRT",
            got=f"{record.flavour} {record.version}",
            expected=f"{installed.flavour} {installed.version}",
            remedy=BUILD_AGAIN,
        )
    if gpu is None:
        return
    name = f"{gpu[0]}.{gpu[1]}"
    if record.targets and name not in record.targets:
        raise EngineError(
            f"the plan was built for compute capability {', '.join(record.targets)}",
            got=f"a GPU of {name}",
            remedy=f'build with compute_capabilities=("{name}",)',
        )
    if not (verdict := installed.runs_on(gpu, record.dtypes)):
        raise EngineError(verdict.reason, remedy='use backend="torch"')


def _check_file(record: PlanRecord, path: Path) -> None:
    require_file(path, remedy=COPY_OR_BUILD, error=EngineError)
    with reading(path, error=EngineError), path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != record.digest:
        raise EngineError(
            f"{path.name} is damaged: its digest is not the build's",
            got=f"{path.stat().st_size} bytes, SHA-256 {digest[:12]}",
            expected=f"{record.plan_bytes} bytes, SHA-256 {record.digest[:12]}",
            remedy=COPY_OR_BUILD,
        )
