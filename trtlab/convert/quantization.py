"""Reads and writes the quantization section of a TensorRT-LLM config.json. Knows no tensors."""

from __future__ import annotations

import fnmatch
from typing import Any, ClassVar

from trtlab.config.algorithms import ALGORITHMS, Algorithm, check_supported
from trtlab.config.quant import HEAD_MODULE, QuantConfig
from trtlab.errors import CheckpointError, ConfigError
from trtlab.model.blocks import LAYER_SITES
from trtlab.storage.json_files import Listed, StoredObject

LINEARS = frozenset(site.name for site in LAYER_SITES.values())
NEVER_QUANTIZED = (
    HEAD_MODULE,
    "router",
    "vocab_embedding",
    "position_embedding",
    "block_embedding",
    "shared_expert_gate",
)
"""TensorRT-LLM's default of ``exclude_modules``: the last part of the modules' names."""


class StoredQuantization(StoredObject):
    """The section under TensorRT-LLM's names. Zero points and clamps are not supported: they must be absent or null."""

    neutral: ClassVar[frozenset[str]] = frozenset({"pre_quant_scale"})  # follows from the algorithm
    passes_empty: ClassVar[bool] = True

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    group_size: int | None = None
    smoothquant_val: float | None = None
    exclude_modules: Listed[str] | None = None

    def to_quant_config(
        self, kv_cache_scales: str, scale_ranks: int, *, quantize_lm_head: bool, own: bool
    ) -> QuantConfig:
        """The inverse of ``quantization_to_json``.

        Args:
            kv_cache_scales: How many scales a layer's cache has; TensorRT-LLM's keys do not say.
            scale_ranks: How many scales a row of a weight-only linear has where its input is cut over ranks.
            quantize_lm_head: Whether trtlab's own section says that the head is quantized.
            own: Whether trtlab wrote the file.

        Raises:
            CheckpointError: For an unknown algorithm, or a setting that it does not allow.
        """
        values = self.stored_values()
        algorithm = ALGORITHMS.get(self.quant_algo or "")
        if not self.group_size or (algorithm is not None and not algorithm.grouped):
            values.pop("group_size", None)
        if self.kv_cache_quant_algo is not None:
            values["kv_cache_scales"] = kv_cache_scales
        if algorithm is not None and algorithm.has_plain_form:
            values["scale_ranks"] = scale_ranks
        values["quantize_lm_head"] = quantize_lm_head or (not own and self._quantizes_head_later(algorithm))
        try:
            quant = QuantConfig(**{**values, "exclude_modules": self._excluded_linears(own=own)})
            check_supported(quant.algorithm)
        except ConfigError as error:
            raise CheckpointError(
                f"the checkpoint's quantization is not supported: {error}",
                remedy="quantize the source again with trtlab",
            ) from error
        return quant

    def _excluded_linears(self, *, own: bool) -> tuple[str, ...]:
        """The patterns over the linears of the layers.

        A list replaces TensorRT-LLM's default, which is ``NEVER_QUANTIZED``; an absent or empty one is the default. Up
        to version 0.13 a pattern may be the bare name of a module, such as ``dense``.
        """
        patterns = self.exclude_modules or ()
        twins = {_of_weight(pattern) for pattern in patterns}
        return tuple(
            f"*.{pattern}" if pattern in LINEARS and not own else pattern
            for pattern in patterns
            if pattern not in twins and not _is_never_quantized(pattern)
        )

    def _quantizes_head_later(self, algorithm: Algorithm | None) -> bool:
        """Whether TensorRT-LLM quantizes the head when it loads the plain form: a list of its own leaves it out."""
        patterns = self.exclude_modules or ()
        excludes = any(fnmatch.fnmatchcase(HEAD_MODULE, pattern) for pattern in patterns)
        return algorithm is not None and algorithm.has_plain_form and bool(patterns) and not excludes


def quantization_to_json(quant: QuantConfig) -> dict[str, Any]:
    """TensorRT-LLM's keys, without those that the algorithm does not use."""
    algorithm = quant.algorithm
    stored: dict[str, Any] = {"quant_algo": quant.quant_algo, "kv_cache_quant_algo": quant.kv_cache_quant_algo}
    if algorithm is not None:
        stored["exclude_modules"] = _exclusions_to_json(quant)
        if algorithm.grouped:
            stored |= {"group_size": quant.group_size, "has_zero_point": False, "pre_quant_scale": True}
        if algorithm.family.startswith("smoothquant"):
            stored["smoothquant_val"] = quant.smoothquant_val
    return stored


def _exclusions_to_json(quant: QuantConfig) -> list[str] | None:
    """The patterns, and TensorRT-LLM's default, which a list replaces; None is the default itself.

    A list without ``lm_head`` says that the head is quantized. An empty list is the default in its older versions, and
    excludes nothing in the later ones.

    W8A16 and W4A16 are quantized when TensorRT-LLM loads them; there its later versions compare the patterns with the
    names of weights, so that each pattern stands there for the weight too.
    """
    patterns = [pattern for pattern in quant.exclude_modules if not _is_never_quantized(pattern)]
    if not patterns and not quant.quantizes_head:
        return None
    weights = [_of_weight(pattern) for pattern in patterns] if quant.has_plain_form else []
    head, *others = NEVER_QUANTIZED  # the head stands at the top, where its name is its path
    return [*patterns, *weights, *([] if quant.quantizes_head else [head]), *(f"*{name}" for name in others)]


def _of_weight(pattern: str) -> str:
    return f"{pattern}.weight"


def _is_never_quantized(pattern: str) -> bool:
    return pattern.rpartition(".")[2].lstrip("*") in NEVER_QUANTIZED


def quantization_extras(quant: QuantConfig) -> dict[str, Any]:
    """What TensorRT-LLM has no key for: a quantized head, and how many scales a layer's cache and a cut row have."""
    head = {"quantize_lm_head": True} if quant.quantizes_head else {}
    cache = {"kv_cache_scales": quant.kv_cache_scales} if quant.kv_cache_quant_algo is not None else {}
    return head | cache | ({"scale_ranks": quant.scale_ranks} if quant.has_plain_form else {})
