"""report.json beside a quantized checkpoint's config.json: the report without the recipe, which config.json holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from trtlab.config.quant import QuantConfig
from trtlab.quantize.report import CacheReport, LinearReport, QuantizationReport
from trtlab.storage.json_files import ByFields, Listed, StoredObject, read_model

REPORT = "report.json"
REMEDY = "delete the file; the checkpoint works without it"


class StoredReport(StoredObject):
    """The content of report.json. A ratio without noise is infinite."""

    linears: Listed[Annotated[LinearReport, ByFields(allow_inf_nan=True)]]
    caches: Listed[Annotated[CacheReport, ByFields(allow_inf_nan=True)]]


def write_report(folder: Path, report: QuantizationReport) -> None:
    """Write a report's rows; an infinite ratio is written as ``Infinity``, as Python's json does."""
    stored = {
        "linears": [dataclasses.asdict(row) for row in report.linears],
        "caches": [dataclasses.asdict(row) for row in report.caches],
    }
    (folder / REPORT).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def read_report(folder: Path, quant: QuantConfig) -> QuantizationReport | None:
    """The report of a folder whose config.json holds the recipe ``quant``; None if there is no report.json.

    Raises CheckpointError if the fields of the file are not those that this version writes.
    """
    file = folder / REPORT
    if not file.exists():
        return None
    stored = read_model(file, StoredReport, remedy=REMEDY)
    return QuantizationReport(quant, stored.linears, stored.caches)
