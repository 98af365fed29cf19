"""Reads and writes the quantization section of a TensorRT-LLM config.json. Knows no tensors."""

from __future__ import annotations

from typing import Any, ClassVar

from trtlab.config.algorithms import check_supported
from trtlab.config.quant import QuantConfig
from trtlab.errors import CheckpointError, ConfigError
from trtlab.storage.json_files import Listed, StoredObject


class StoredQuantization(StoredObject):
    """The section under TensorRT-LLM's names. Zero points and clamps are not supported: they must be absent or null."""

    neutral: ClassVar[frozenset[str]] = frozenset({"pre_quant_scale"})  # follows from the algorithm
    passes_empty: ClassVar[bool] = True

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    group_size: int | None = None
    smoothquant_val: float | None = None
    exclude_modules: Listed[str] | None = None

    def to_quant_config(self, kv_cache_scales: str) -> QuantConfig:
        """The inverse of ``quantization_to_json``.

        Args:
            kv_cache_scales: How many scales a layer's cache has; TensorRT-LLM's keys do not say.

        Raises:
            CheckpointError: For an unknown algorithm, or a setting that it does not allow.
        """
        values = self.stored_values()
        if not self.group_size:
            values.pop("group_size", None)
        if self.kv_cache_quant_algo is not None:
            values["kv_cache_scales"] = kv_cache_scales
        try:
            quant = QuantConfig(**{**values, "exclude_modules": self.exclude_modules or ()})
            check_supported(quant.algorithm)
        except ConfigError as error:
            raise CheckpointError(
                f"the checkpoint's quantization is not supported: {error}",
                remedy="quantize the source again with trtlab",
            ) from error
        return quant


def quantization_to_json(quant: QuantConfig) -> dict[str, Any]:
    """TensorRT-LLM's keys, without those that the algorithm does not use."""
    algorithm = quant.algorithm
    stored: dict[str, Any] = {"quant_algo": quant.quant_algo, "kv_cache_quant_algo": quant.kv_cache_quant_algo}
    if algorithm is not None:
        stored["exclude_modules"] = list(quant.exclude_modules)
        if algorithm.grouped:
            stored |= {"group_size": quant.group_size, "has_zero_point": False, "pre_quant_scale": True}
        if algorithm.family.startswith("smoothquant"):
            stored["smoothquant_val"] = quant.smoothquant_val
    return stored


def quantization_extras(quant: QuantConfig) -> dict[str, Any]:
    """The settings that TensorRT-LLM has no key for: how many scales a layer's cache has."""
    return {"kv_cache_scales": quant.kv_cache_scales} if quant.kv_cache_quant_algo is not None else {}
