"""Completes the config.json of a ModelOpt export: under transformers 5 it lacks the rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from trtlab.config.model import ModelConfig, dtype_name
from trtlab.convert.folder_kinds import HUGGING_FACE, open_folder
from trtlab.convert.hugging_face_config import REMEDY, HuggingFaceConfig
from trtlab.convert.rope_scaling import scaling_to_json
from trtlab.errors import CheckpointError
from trtlab.storage.foreign_objects import check_unknown_keys
from trtlab.storage.json_files import naming, parse_model, read_object
from trtlab.storage.paths import PathLike, absolute_path
from trtlab.validation import shorten


class TransformersConfig(Protocol):
    """A config of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """The object in its config.json."""


HfConfig = PathLike | Mapping[str, Any] | TransformersConfig
SAME = (  # in both files; ModelOpt may pad the vocabulary
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


def hugging_face_object(hf_config: HfConfig) -> dict[str, Any]:
    """A Hugging Face config.json as an object in memory.

    Args:
        hf_config: The model's folder, its config.json, the object in it, or a config of transformers.

    Raises:
        CheckpointError: It is none of these, or cannot be read.
    """
    if hasattr(hf_config, "to_dict"):
        return hf_config.to_dict()
    if isinstance(hf_config, Mapping):
        return dict(hf_config)
    path = absolute_path(hf_config)
    file = path if path.suffix == ".json" else open_folder(path, HUGGING_FACE) / "config.json"
    return read_object(file, remedy=REMEDY)


def complete_config(raw: Mapping[str, Any], hf_raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``raw`` with the keys of the rotary embedding and of the attention window that it lacks.

    Args:
        raw: config.json of a checkpoint.
        hf_raw: The Hugging Face config of its model.
        where: The name of ``raw`` in errors.

    Raises:
        CheckpointError: The two are of different models, or ``hf_raw`` is not supported.
    """
    model = _model_config(hf_raw, raw)
    for name in SAME:
        if raw.get(name) not in (None, getattr(model, name)):
            raise CheckpointError(
                f"hf_config is of another model than {where}: {name} is {getattr(model, name)}",
                expected=shorten(raw[name]),
                remedy="give the config of the model that was exported",
            )
    scaling = None if model.rotary_scaling is None else scaling_to_json(model.rotary_scaling)
    stored = {"rotary_base": model.rotary_base, "rotary_scaling": scaling, "sliding_window": model.sliding_window}
    base = raw.get("rotary_base")
    if base not in (None, model.rotary_base):
        raise CheckpointError(
            f"{where} and hf_config have different rotary bases",
            got=f"{shorten(base)} and {model.rotary_base:g}",
            remedy="leave hf_config out, or correct the wrong one",
        )
    return {**raw, **{key: value for key, value in stored.items() if raw.get(key) is None}}


def _model_config(hf_raw: Mapping[str, Any], raw: Mapping[str, Any]) -> ModelConfig:
    stored = parse_model(dict(hf_raw), HuggingFaceConfig, "hf_config", remedy=REMEDY)
    check_unknown_keys(stored, "hf_config", allow_unknown=True)
    with naming("hf_config", remedy=REMEDY):
        return stored.to_model_config(dtype_name(str(raw.get("dtype", "float32"))))
