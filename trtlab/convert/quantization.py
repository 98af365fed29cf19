"""The quantization part of a TensorRT-LLM config.json, both ways. Knows no tensors."""

from __future__ import annotations

from collections import abc
from typing import Any

from trtlab.config.quant import QuantConfig
from trtlab.errors import CheckpointError, ConfigError

KNOWN = (
    "quant_algo",
    "kv_cache_quant_algo",
    "group_size",
    "smoothquant_val",
    "exclude_modules",
    "has_zero_point",
    "pre_quant_scale",
    "clamp_val",
)


def quantization_to_json(quant: QuantConfig) -> dict[str, Any]:
    """TensorRT-LLM's keys; what an algorithm does not use is left out."""
    recipe = quant.recipe
    stored: dict[str, Any] = {"quant_algo": quant.quant_algo, "kv_cache_quant_algo": quant.kv_cache_quant_algo}
    if recipe is not None:
        stored["exclude_modules"] = list(quant.exclude_modules)
        if recipe.grouped:
            stored |= {"group_size": quant.group_size, "has_zero_point": False, "pre_quant_scale": True}
        if recipe.family.startswith("smoothquant"):
            stored["smoothquant_val"] = quant.smoothquant_val
    return stored


def quantization_extras(quant: QuantConfig) -> dict[str, Any]:
    """What TensorRT-LLM's keys cannot say: how many scales a layer's cache has."""
    return {"kv_cache_scales": quant.kv_cache_scales} if quant.kv_cache_quant_algo is not None else {}


def quantization_from_json(raw: abc.Mapping[str, Any], ours: abc.Mapping[str, Any]) -> QuantConfig:
    """The inverse; ``ours`` is the config's ``trtlab`` part. A cache whose part does not say is merged.

    Raises CheckpointError for a key that changes the numbers and is not understood, or an unknown algorithm.
    """
    unknown = sorted(key for key, value in raw.items() if key not in KNOWN and value)
    refused = [key for key in ("has_zero_point", "clamp_val") if raw.get(key)]
    if unknown or refused:
        raise CheckpointError(
            f"the checkpoint's quantization has {', '.join(unknown + refused)}, which is not supported",
            expected=" | ".join(KNOWN),
        )
    values: dict[str, Any] = {key: raw.get(key) for key in ("quant_algo", "kv_cache_quant_algo")}
    if raw.get("group_size"):
        values["group_size"] = raw["group_size"]
    if "smoothquant_val" in raw:
        values["smoothquant_val"] = raw["smoothquant_val"]
    if values["kv_cache_quant_algo"] is not None:
        values["kv_cache_scales"] = ours.get("kv_cache_scales", "merged")
    try:
        return QuantConfig(**values, exclude_modules=tuple(raw.get("exclude_modules") or ()))
    except ConfigError as error:
        raise CheckpointError(
            f"the checkpoint's quantization is not supported: {error}", remedy="quantize the source again with trtlab"
        ) from error
