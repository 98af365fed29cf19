"""Weight-only INT8 and INT4: one scale for each output channel, largest magnitude over 128 or 8. Reads no texts."""

from __future__ import annotations

import torch
from torch import Tensor

from trtlab.model.scales import INT4, INT8, IntRange, ToOriginal, amax, half_away, pack_int4, positive, to_int
from trtlab.quantize.layer import CalibratedLayer, QuantizedLayer

RANGES: dict[int, IntRange] = {8: INT8, 4: INT4}


def weight_only(weight: Tensor, bits: int) -> tuple[Tensor, ToOriginal]:
    """``[out, in]`` to int8 storage ``[out, in]`` and scales ``[out]`` in float32.

    ``scale = amax / 2^(bits - 1)``, ties away from zero. A largest magnitude that is positive saturates one step below
    its value; a negative one is exact. Source: TensorRT-LLM's ``symmetric_quantize``.
    """
    scale = positive(amax(weight.float(), 1)) * 2.0 ** (1 - bits)
    q = to_int(weight.float(), ToOriginal(scale[:, None]), RANGES[bits], half_away)
    return q, ToOriginal(scale)


def quantize_layer(layer: CalibratedLayer) -> QuantizedLayer:
    """Each linear as ``weight`` and ``per_channel_scale`` in the model's dtype.

    Integers are computed with the float32 scale; the stored scale is then rounded to the model's dtype.
    """
    tensors: dict[str, Tensor] = {}
    algorithm = layer.config.quantization.algorithm
    assert algorithm is not None, f"layer {layer.index} has no algorithm"
    for linear in layer.linears:
        q, scale = weight_only(layer.weight(linear), algorithm.weight_bits)
        tensors[f"{linear}.weight"] = pack_int4(q).view(torch.int8) if algorithm.packed else q
        tensors[f"{linear}.per_channel_scale"] = scale.stored(layer.config.torch_dtype)
    return QuantizedLayer(tensors)
