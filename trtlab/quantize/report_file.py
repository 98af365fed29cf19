"""report.json beside a quantized checkpoint's config.json: the report without the recipe, which config.json holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trtlab.config.model import ModelConfig
from trtlab.errors import CheckpointError
from trtlab.model.tensor_specs import tensor_specs
from trtlab.quantize.report import CacheReport, LinearReport, QuantizationReport
from trtlab.storage.json_files import ByFields, Listed, StoredObject, read_model
from trtlab.storage.paths import has_file
from trtlab.validation import shorten

Size = Annotated[int, Field(ge=0)]
REPORT = "report.json"
REMEDY = "delete the file; the checkpoint works without it"


class StoredReport(StoredObject):
    """The content of report.json. A ratio without noise is infinite."""

    linears: Listed[Annotated[LinearReport, ByFields(allow_inf_nan=True, bytes_before=Size, bytes_after=Size)]]
    caches: Listed[Annotated[CacheReport, ByFields(allow_inf_nan=True, layer=Size)]]


def write_report(folder: Path, report: QuantizationReport) -> None:
    """Write a report's rows; an infinite ratio is written as ``Infinity``, as Python's json does."""
    stored = {
        "linears": [dataclasses.asdict(row) for row in report.linears],
        "caches": [dataclasses.asdict(row) for row in report.caches],
    }
    (folder / REPORT).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def read_report(folder: Path, config: ModelConfig) -> QuantizationReport | None:
    """The report of a folder whose config.json holds ``config``; None if there is no report.json.

    Raises CheckpointError if the fields of the file are not those that this version writes, or are of another model.
    """
    file = folder / REPORT
    if not has_file(file):
        return None
    stored = read_model(file, StoredReport, remedy=REMEDY)
    tensors, layers = tensor_specs(config), config.num_hidden_layers
    foreign = [row.name for row in stored.linears if f"{row.name}.weight" not in tensors]
    foreign += [f"layer {row.layer}" for row in stored.caches if row.layer >= layers]
    if foreign:
        raise CheckpointError(f"{file} is of another model: {shorten(foreign[0])} is not in this one", remedy=REMEDY)
    return QuantizationReport(config.quantization, stored.linears, stored.caches)
