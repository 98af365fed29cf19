"""Reads the config.json of an engine folder. Opens no weights and no plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationInfo, model_validator

from trtlab.config.build import BuildConfig
from trtlab.convert.trtllm_config import TrtllmConfig
from trtlab.errors import EngineError
from trtlab.storage.json_files import ByFields, Count, Listed, OpenObject, read_model
from trtlab.tensorrt.build.plan import PlanRecord

REMEDY = "build the engine again with this version, or load it with the one that built it"


class EngineProvenance(OpenObject):
    """What the engine was built from."""

    source: str | None = None
    fingerprints: Listed[str] | None = None
    """One a rank, in rank order."""


class _WithPlans(EngineProvenance):
    plans: Listed[Annotated[PlanRecord, ByFields()]] | None = None


class EngineFile(OpenObject):
    """config.json of an engine folder, without what it says of plans."""

    pretrained_config: TrtllmConfig
    build_config: Annotated[BuildConfig, ByFields(max_input_len=Count, max_seq_len=Count)]
    trtlab: EngineProvenance | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, raw: dict[str, Any], info: ValidationInfo[str]) -> dict[str, Any]:
        if not isinstance(raw.get("build_config"), dict) or not isinstance(raw.get("pretrained_config"), dict):
            raise EngineError(
                f"{info.context} is not of an engine folder",
                remedy="Checkpoint.load() opens a checkpoint; build() it first",
            )
        return raw

    @property
    def provenance(self) -> EngineProvenance:
        """What the engine was built from, as far as the file tells."""
        return self.trtlab or EngineProvenance()

    @property
    def plans(self) -> tuple[PlanRecord, ...]:
        """What the build told of each rank's plan; none for a file that was read without them."""
        return (self.trtlab.plans or ()) if isinstance(self.trtlab, _WithPlans) else ()


class _EngineFileWithPlans(EngineFile):
    trtlab: _WithPlans | None = None


def read_engine_file(engine_dir: Path, *, plans: bool) -> EngineFile:
    """config.json of an engine folder; without ``plans`` what it says of them may be of another version.

    Raises:
        EngineError: The file is missing or damaged, or of a folder of another kind.
        CheckpointError: ``pretrained_config`` was written by another program, or by a later trtlab.
        ConfigError: ``build_config`` contradicts itself.
    """
    kind = _EngineFileWithPlans if plans else EngineFile
    return read_model(engine_dir / "config.json", kind, remedy=REMEDY, error=EngineError)
