"""Scales of a quantized KV cache: TensorRT-LLM's merged one, K and V apart, or one a head."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trtlab.model.scales import INT8, ToOriginal, positive
from trtlab.quantize.layer import LayerStatistics


def kv_scales(algorithm: str, granularity: str, seen: LayerStatistics | None) -> dict[str, Tensor]:
    """A layer's scale tensors by name, each to the original; INT8 needs what calibration saw.

    ``merged`` takes the largest of Q, K and V before rotary, as TensorRT-LLM does: Q is never cached, yet counts, and
    rotary may still raise an element of K by up to the square root of 2. ``split`` and ``per_head`` look at K and V
    as they are cached. FP8 always takes 1.
    """
    if algorithm == "FP8":
        return {"attention.kv_cache_scaling_factor": torch.ones(1)}
    assert seen is not None, "INT8 caches are calibrated"
    return {name: scale.value for name, scale in _INT8[granularity](seen).items()}


def int8_scale(largest: Tensor) -> ToOriginal:
    """``amax / 127``."""
    return ToOriginal(positive(largest) / INT8.high)


def effective_bits(largest: float, scale: float) -> float:
    """How many of the eight bits numbers up to ``largest`` use: log2 of the levels from ``-amax`` to ``amax``."""
    levels = 2 * min(largest / scale, float(INT8.high)) + 1
    return math.log2(levels)


def _merged(seen: LayerStatistics) -> dict[str, ToOriginal]:
    return {"attention.kv_cache_scaling_factor": int8_scale(seen.outputs["attention.qkv"].amax().reshape(1))}


def _split(seen: LayerStatistics) -> dict[str, ToOriginal]:
    return _two(seen.keys.amax().reshape(1), seen.values.amax().reshape(1))


def _per_head(seen: LayerStatistics) -> dict[str, ToOriginal]:
    return _two(seen.keys, seen.values)


def _two(keys: Tensor, values: Tensor) -> dict[str, ToOriginal]:
    return {
        "attention.k_cache_scaling_factor": int8_scale(keys),
        "attention.v_cache_scaling_factor": int8_scale(values),
    }


_INT8: dict[str, Callable[[LayerStatistics], dict[str, ToOriginal]]] = {
    "merged": _merged,
    "split": _split,
    "per_head": _per_head,
}
