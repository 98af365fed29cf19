"""Scales of a quantized KV cache: TensorRT-LLM's merged scale, one each for K and V, or one for each head."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trtlab.config.algorithms import MERGED_KV_SCALE
from trtlab.model.scales import INT8, ToOriginal, positive
from trtlab.quantize.layer import LayerStatistics


def kv_scales(algorithm: str, granularity: str, statistics: LayerStatistics | None) -> dict[str, Tensor]:
    """A layer's scale tensors by name, each to the original.

    ``merged`` takes the largest magnitude of Q, K and V before rotary, as TensorRT-LLM does. Q counts although it is
    never cached, and rotary can still raise an element of K by up to the square root of 2. ``split`` and ``per_head``
    take K and V as they are cached, and store the largest of their scales as the merged one beside them, for
    TensorRT-LLM: it is finer than TensorRT-LLM's own where Q is the largest, and no cached number saturates under it.
    FP8 scales are always 1.

    Args:
        algorithm: ``"INT8"`` or ``"FP8"``.
        granularity: ``"merged"``, ``"split"`` or ``"per_head"``.
        statistics: The layer's calibration statistics, which INT8 needs.
    """
    if algorithm == "FP8":
        return {MERGED_KV_SCALE: torch.ones(1)}
    assert statistics is not None, "an INT8 cache needs calibration statistics"
    return {name: scale.value for name, scale in _INT8[granularity](statistics).items()}


def int8_scale(largest: Tensor) -> ToOriginal:
    """``amax / 127``."""
    return ToOriginal(positive(largest) / INT8.high)


def effective_bits(largest: float, scale: float) -> float:
    """How many of the eight bits numbers up to ``largest`` use: log2 of the levels from ``-largest`` to ``largest``."""
    levels = 2 * min(largest / scale, float(INT8.high)) + 1
    return math.log2(levels)


def _merged(statistics: LayerStatistics) -> dict[str, ToOriginal]:
    return {MERGED_KV_SCALE: int8_scale(statistics.outputs["attention.qkv"].amax().reshape(1))}


def _split(statistics: LayerStatistics) -> dict[str, ToOriginal]:
    return _two(statistics.keys.amax().reshape(1), statistics.values.amax().reshape(1))


def _per_head(statistics: LayerStatistics) -> dict[str, ToOriginal]:
    return _two(statistics.keys, statistics.values)


def _two(keys: Tensor, values: Tensor) -> dict[str, ToOriginal]:
    k_scale, v_scale = int8_scale(keys), int8_scale(values)
    return {
        MERGED_KV_SCALE: largest_scale(k_scale.value, v_scale.value),
        "attention.k_cache_scaling_factor": k_scale,
        "attention.v_cache_scaling_factor": v_scale,
    }


def largest_scale(keys: Tensor, values: Tensor) -> ToOriginal:
    """One scale ``[1]`` under which neither K nor V saturates, from their own scales."""
    return ToOriginal(torch.maximum(keys.amax(), values.amax()).reshape(1))


_INT8: dict[str, Callable[[LayerStatistics], dict[str, ToOriginal]]] = {
    "merged": _merged,
    "split": _split,
    "per_head": _per_head,
}
