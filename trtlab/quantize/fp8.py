"""FP8 E4M3: one scale for a weight and one for its input, each the largest magnitude over 448."""

from __future__ import annotations

from torch import Tensor

from trtlab.model.scales import FLOAT8_MAX, ToOriginal, amax, positive, to_float8
from trtlab.quantize.layer import CalibratedLayer, QuantizedLayer


def float8_scale(largest: Tensor) -> ToOriginal:
    """``amax / 448``."""
    return ToOriginal(positive(largest) / FLOAT8_MAX)


def float8_weight(weight: Tensor) -> tuple[Tensor, ToOriginal]:
    """``[out, in]`` to E4M3 and one scale.

    Query, key and value share one matrix product, so the fused weight has one scale, the largest of the three.
    """
    scale = float8_scale(amax(weight.float()))
    return to_float8(weight.float(), scale), scale


def quantize_layer(layer: CalibratedLayer) -> QuantizedLayer:
    """Each linear as ``weight``, ``weights_scaling_factor`` and ``activation_scaling_factor``."""
    tensors: dict[str, Tensor] = {}
    for linear in layer.linears:
        q, scale = float8_weight(layer.weight(linear))
        activation = float8_scale(layer.observed.input_of(linear).amax.amax())
        tensors[f"{linear}.weight"] = q
        tensors[f"{linear}.weights_scaling_factor"] = scale.value.reshape(1)
        tensors[f"{linear}.activation_scaling_factor"] = activation.value.reshape(1)
    return QuantizedLayer(tensors)
