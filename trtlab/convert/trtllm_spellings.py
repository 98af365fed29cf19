"""Puts the keys of an older or flatter TensorRT-LLM config.json in the places where version 0.13 writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtlab.errors import CheckpointError
from trtlab.validation import shorten

OTHER_NAMES = {  # of a key, in other versions and in the exporters of other programs
    "num_kv_heads": "num_key_value_heads",
    "rotary_embedding_base": "rotary_base",
    "rope_theta": "rotary_base",
}
INNER_PLACES = {  # of a key that stands at the top in flat files: its object, and its name there
    "world_size": ("mapping", "world_size"),
    "tp_size": ("mapping", "tp_size"),
    "pp_size": ("mapping", "pp_size"),
    "moe_num_experts": ("moe", "num_experts"),
}
INSIDE_SCALING = {"rope_theta": "rotary_base", "partial_rotary_factor": "rotary_pct"}
QWEN_CLASSES = ("QWenForCausalLM", "QWenLMHeadModel")  # one class upstream; qwen_type says which model it is
QWEN_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM"}


def current_spelling(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The object with the keys of version 0.13; values are not checked.

    Args:
        raw: config.json.
        where: Its name in errors.

    Raises:
        CheckpointError: Two spellings of one key have different values.
    """
    config = dict(raw)
    for old, name in OTHER_NAMES.items():
        if old in config:
            _move(config, name, old, config.pop(old), where)
    for old, (place, name) in INNER_PLACES.items():
        inner = config.get(place)
        if old in config and isinstance(inner, dict | None):
            inner = dict(inner or {})
            _move(inner, name, old, config.pop(old), where)
            config[place] = inner
    _take_out_of_scaling(config, where)
    if config.get("architecture") in QWEN_CLASSES:
        config["architecture"] = QWEN_ARCHITECTURES.get(str(config.get("qwen_type")), config["architecture"])
    if config.get("num_key_value_heads") is None and "num_attention_heads" in config:
        config["num_key_value_heads"] = config["num_attention_heads"]
    return config


def _take_out_of_scaling(config: dict[str, Any], where: str) -> None:
    """A converter under transformers 5 copies ``rope_parameters``, which also hold the base and may scale nothing."""
    scaling = config.get("rotary_scaling")
    if not isinstance(scaling, dict):
        return
    scaling = dict(scaling)
    for inner, name in INSIDE_SCALING.items():
        if inner in scaling:
            _move(config, name, f"rotary_scaling.{inner}", scaling.pop(inner), where)
    kinds = [scaling[key] for key in ("type", "rope_type") if key in scaling]
    nothing = bool(kinds) and all(kind == "default" for kind in kinds)
    config["rotary_scaling"] = None if nothing else scaling


def _move(place: dict[str, Any], name: str, old: str, value: object, where: str) -> None:
    """Set a key from another spelling of it."""
    if place.get(name) is None:
        place[name] = value
    elif value is not None and value != place[name]:
        raise CheckpointError(
            f"{where}: {old}={shorten(value)} and {name}={shorten(place[name])} contradict each other",
            remedy="take out the wrong one",
        )
