"""Reads the config.json of an engine folder. Opens no weights and no plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationInfo, model_validator

from trtlab.config.build import BuildConfig
from trtlab.convert.folder_kinds import ENGINE, refuse_other_kind
from trtlab.convert.trtllm_config import TrtllmConfig
from trtlab.errors import EngineError
from trtlab.storage.json_files import ByFields, Count, Listed, OpenObject, read_model
from trtlab.tensorrt.build.plan import PlanRecord

REMEDY = "build the engine again with this version, or load it with the one that built it"


class EngineProvenance(OpenObject):
    """The weights that the engine was built from."""

    source: str | None = None
    fingerprints: Listed[str] | None = None
    """Of three rows of each tensor, one for each rank."""
    digests: Listed[dict[str, str]] | None = None
    """Of each whole tensor by its name, one dict for each rank."""


class _WithPlans(EngineProvenance):
    plans: Listed[Annotated[PlanRecord, ByFields()]] | None = None


class EngineFile(OpenObject):
    """config.json of an engine folder, without the records of its plans."""

    pretrained_config: TrtllmConfig
    build_config: Annotated[BuildConfig, ByFields(max_input_len=Count, max_seq_len=Count)]
    trtlab: EngineProvenance | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, raw: dict[str, Any], info: ValidationInfo[str]) -> dict[str, Any]:
        if not isinstance(raw.get("build_config"), dict) or not isinstance(raw.get("pretrained_config"), dict):
            refuse_other_kind(raw, ENGINE, info.context, error=EngineError)
            raise EngineError(
                f"{info.context} is not the config.json of an engine folder",
                remedy="Checkpoint.load() opens a checkpoint; build() it first",
            )
        return raw

    @property
    def provenance(self) -> EngineProvenance:
        """The weights that the engine was built from; empty where the file does not say."""
        return self.trtlab or EngineProvenance()

    @property
    def plans(self) -> tuple[PlanRecord, ...]:
        """The record of each rank's plan; empty for a file that was read without them."""
        return (self.trtlab.plans or ()) if isinstance(self.trtlab, _WithPlans) else ()


class _EngineFileWithPlans(EngineFile):
    trtlab: _WithPlans | None = None


def read_engine_file(engine_dir: Path, *, plans: bool) -> EngineFile:
    """Read config.json of an engine folder; without ``plans`` their records are not read and may be of another version.

    Raises:
        EngineError: The file is missing or damaged, or the folder is not an engine folder.
        CheckpointError: ``pretrained_config`` was written by another program, or by a later trtlab.
        ConfigError: ``build_config`` contradicts itself.
    """
    kind = _EngineFileWithPlans if plans else EngineFile
    return read_model(engine_dir / "config.json", kind, remedy=REMEDY, error=EngineError)
