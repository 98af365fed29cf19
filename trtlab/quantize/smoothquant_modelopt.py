"""SmoothQuant in ModelOpt's form (W8A8_SQ_PER_CHANNEL): each linear stores its smoothing, and no norm changes."""

from __future__ import annotations

import torch
from torch import Tensor

from trtlab.model.blocks import by_input
from trtlab.model.scales import INT8, ToOriginal, amax, positive, to_int
from trtlab.quantize.layer import CalibratedLayer, QuantizedLayer
from trtlab.quantize.smoothquant import search_alpha

LIMITS = (1e-4, 1e4)


def prequant_scale(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """The factor on each input channel: ``w_max^(1 - alpha) / x_max^alpha``, between 1e-4 and 1e4.

    A channel that is all zero in the texts or in the weights keeps 1.
    """
    scale = (w_max.pow(1 - alpha) / x_max.pow(alpha)).clamp(*LIMITS)
    return torch.where((x_max == 0) | (w_max == 0), torch.ones_like(scale), scale)


def int8_rows(weight: Tensor) -> tuple[Tensor, ToOriginal]:
    """``[out, in]`` to int8 and scales ``[out]``: ``amax / 127``, ties to even."""
    scale = ToOriginal(positive(amax(weight, 1)) / INT8.high)
    return to_int(weight, ToOriginal(scale.value[:, None]), INT8), scale


def quantize_layer(layer: CalibratedLayer) -> QuantizedLayer:
    """Each linear with ``prequant_``, ``activation_`` and ``weights_scaling_factor``.

    Query, key and value share an input, and so do fc and gate. Their prequant scales are averaged, as in ModelOpt's
    export, and the weights are divided by the average.
    """
    quant = layer.config.quantization
    assert quant.algorithm is not None, f"{layer.name} has no algorithm"
    result = QuantizedLayer({})
    for sites in by_input(layer.sites).values():
        linears = [site.part for site in sites if layer.quantizes(site.part)]
        if not linears:
            continue
        inputs = layer.observed.input_of(linears[0])
        alpha = quant.smoothquant_val
        if alpha is None:
            alpha = search_alpha(inputs, layer, linears, quant.algorithm)
        parts = [part for linear in linears for part in layer.parts(linear)]
        prequant = torch.stack([prequant_scale(inputs.amax, amax(part, 0), alpha) for part in parts]).mean(0)
        stored = prequant.to(layer.config.torch_dtype)
        prequant = stored.float()  # the weight is divided by the rounded factor that will multiply the input
        activation = positive((inputs.amax * prequant).amax()) / INT8.high
        for linear in linears:
            q, scale = int8_rows(layer.weight(linear) / prequant)
            result.tensors[f"{linear}.weight"] = q
            result.tensors[f"{linear}.weights_scaling_factor"] = scale.value
            result.tensors[f"{linear}.activation_scaling_factor"] = activation.reshape(1)
            result.tensors[f"{linear}.prequant_scaling_factor"] = stored
            result.smoothing[linear], result.alphas[linear] = 1 / prequant, alpha
    return result
