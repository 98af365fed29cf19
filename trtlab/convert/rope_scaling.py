"""The keys under which Hugging Face and TensorRT-LLM store the scaling of rotary frequencies."""

from __future__ import annotations

import dataclasses
from typing import Any

from trtlab.config.model import NotNegativeFloat32, PositiveFloat32, RotaryScaling
from trtlab.storage.foreign_objects import ForeignObject
from trtlab.storage.json_files import Count


class StoredScaling(ForeignObject):
    """A scaling under its names in config.json; keys that a kind does not use are absent or null."""

    rope_type: str | None = None
    type: str | None = None
    """``rope_type`` in the oldest files."""
    factor: PositiveFloat32 | None = None
    original_max_position_embeddings: Count | None = None
    low_freq_factor: PositiveFloat32 | None = None
    high_freq_factor: PositiveFloat32 | None = None
    beta_fast: PositiveFloat32 | None = None
    beta_slow: PositiveFloat32 | None = None
    attention_factor: PositiveFloat32 | None = None
    mscale: NotNegativeFloat32 | None = None
    mscale_all_dim: NotNegativeFloat32 | None = None
    truncate: bool | None = True


def scaling_to_json(scaling: RotaryScaling) -> dict[str, Any]:
    """The keys of a scaling in config.json, without the fields that are None.

    The oldest versions of TensorRT-LLM read the kind of a linear scaling, which they have, from ``type``.
    """
    fields = dataclasses.asdict(scaling)
    kind = fields.pop("kind")
    kinds = {"type": kind, "rope_type": kind} if kind == "linear" else {"rope_type": kind}
    return {**kinds, **{key: value for key, value in fields.items() if value is not None}}
