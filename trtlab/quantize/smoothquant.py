"""SmoothQuant (arXiv:2211.10438): moves part of the activations' range into the weights, then makes both INT8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtlab.config.algorithms import Algorithm
from trtlab.model.blocks import SITES, by_input
from trtlab.model.scales import INT8, INT8_SYMMETRIC, ToQuantized, amax, int_matmul, positive, quantize_rows, to_int
from trtlab.quantize.layer import CalibratedLayer, InputStatistics, QuantizedLayer

ALPHAS = tuple(step / 20 for step in range(21))
SMALLEST = 1e-5  # TensorRT-LLM's lower bound of a smoothing factor


def smoothing(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """The divisor of each input channel: ``x_max^alpha / w_max^(1 - alpha)``, both ``[in]``, at least 1e-5.

    A channel that is all zero in the texts or in the weights keeps 1: TensorRT-LLM's formula gives 1e-5 or infinity
    there, which is wrong for the first text that uses the channel.
    """
    s = x_max.pow(alpha) / w_max.pow(1 - alpha)
    dead = (x_max == 0) | (w_max == 0)
    return torch.where(dead, torch.ones_like(s), s.clamp(min=SMALLEST))


def int8_weight(parts: Sequence[Tensor], *, per_channel: bool) -> tuple[Tensor, ToQuantized]:
    """The parts of a fused weight to int8 ``[out, in]`` and their scales ``[out]``, in the range -127 to 127.

    Without ``per_channel`` each part (query, key, value) has one scale, repeated for its rows.
    """
    scales = []
    for part in parts:
        largest = amax(part, 1) if per_channel else amax(part).expand(part.shape[0])
        scales.append(INT8.high / positive(largest))
    scale = ToQuantized(torch.cat(scales))
    return to_int(torch.cat(list(parts)), ToQuantized(scale.value[:, None]), INT8_SYMMETRIC), scale


def search_alpha(
    inputs: InputStatistics, layer: CalibratedLayer, linears: Sequence[str], algorithm: Algorithm
) -> float:
    """The alpha of ALPHAS with the smallest squared error of the linears' outputs on sampled rows."""
    losses = {alpha: _loss(inputs, layer, linears, algorithm, alpha) for alpha in ALPHAS}
    return min(losses, key=losses.__getitem__)


def _loss(
    inputs: InputStatistics, layer: CalibratedLayer, linears: Sequence[str], algorithm: Algorithm, alpha: float
) -> float:
    s = smoothing(inputs.amax, column_max(layer, linears), alpha)
    x = inputs.sample / s
    if algorithm.per_token:
        q, x_scale = quantize_rows(x)
    else:
        static = ToQuantized(INT8.high / positive((inputs.amax / s).amax()))
        q, x_scale = to_int(x, static, INT8), static.inverse.value
    loss = 0.0
    for linear in linears:
        w, w_scale = int8_weight([part * s for part in layer.parts(linear)], per_channel=algorithm.per_channel)
        output = int_matmul(q, w) * x_scale / w_scale.value
        loss += float((output - layer.observed.sampled[linear]).square().mean())
    return loss


def column_max(layer: CalibratedLayer, linears: Sequence[str]) -> Tensor:
    """``max over outputs of |W|`` of all linears that share an input ``[in]``."""
    return torch.stack([amax(layer.weight(linear), 0) for linear in linears]).amax(0)


@dataclass(frozen=True)
class _Smoothed:
    """Linears that share an input, with their alpha and the smoothing ``[in]`` of that input."""

    linears: tuple[str, ...]
    alpha: float
    s: Tensor


def _smooth(layer: CalibratedLayer, linears: tuple[str, ...], algorithm: Algorithm) -> _Smoothed:
    inputs = layer.observed.input_of(linears[0])
    alpha = layer.config.quantization.smoothquant_val
    if alpha is None:
        alpha = search_alpha(inputs, layer, linears, algorithm)
    return _Smoothed(linears, alpha, smoothing(inputs.amax, column_max(layer, linears), alpha))


def quantize_layer(layer: CalibratedLayer) -> QuantizedLayer:
    """TensorRT-LLM's native form: smoothing is folded into the norm before the linear, or stored as ``smoother``.

    An excluded linear that shares a smoothed norm is multiplied by the same factors and stays in its dtype.
    """
    algorithm = layer.config.quantization.algorithm
    assert algorithm is not None, f"{layer.name} has no algorithm"
    result = QuantizedLayer({})
    for sites in by_input(layer.sites).values():
        linears = tuple(site.part for site in sites)
        if any(layer.quantizes(linear) for linear in linears):
            _quantize(layer, _smooth(layer, linears, algorithm), algorithm, result)
    return result


def _quantize(layer: CalibratedLayer, shared: _Smoothed, algorithm: Algorithm, result: QuantizedLayer) -> None:
    first = SITES[shared.linears[0]]
    s, dtype = shared.s, layer.config.torch_dtype
    if first.norm_before is not None:
        name = f"{first.norm_before}.weight"
        s, result.tensors[name] = fold(layer.weights[name], s, dtype)
        bias = f"{first.norm_before}.bias"
        if bias in layer.weights:
            result.tensors[bias] = (layer.weights[bias] / s).to(dtype)
    else:
        result.tensors[f"{first.part}.smoother"] = s[None]  # [1, in]
    x_scale = ToQuantized(INT8.high / positive((layer.observed.input_of(first.part).amax / s).amax()))
    if first.stores_input_scale(algorithm.per_token):
        result.tensors[first.input_scale] = torch.ones(1) if algorithm.per_token else x_scale.value.reshape(1)
    for linear in shared.linears:
        result.smoothing[linear], result.alphas[linear] = s, shared.alpha
        if layer.quantizes(linear):
            result.tensors.update(_int8_linear(layer, linear, s, x_scale, algorithm))
        else:
            result.tensors[f"{linear}.weight"] = (layer.weight(linear) * s).to(dtype)


def fold(gain: Tensor, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fold ``s`` into a norm's gain: the smoothing that the rounded gain applies, and ``gain / s`` in ``dtype``."""
    stored = (gain / s).to(dtype)
    real = gain / stored.float()
    return torch.where(torch.isfinite(real) & (real > 0), real, s), stored


def _int8_linear(
    layer: CalibratedLayer, linear: str, s: Tensor, x_scale: ToQuantized, algorithm: Algorithm
) -> dict[str, Tensor]:
    """Weight and output scales. TensorRT-LLM stores static scales as two factors: to the output's INT8, and back."""
    q, w_scale = int8_weight([part * s for part in layer.parts(linear)], per_channel=algorithm.per_channel)
    to_float = w_scale.inverse.value  # [out]
    tensors = {f"{linear}.weight": q}
    if not algorithm.per_token:
        y_max = positive(layer.observed.outputs[linear].amax())
        to_float = INT8.high / y_max / (x_scale.value * w_scale.value)
        tensors[f"{linear}.act_scale"] = (y_max / INT8.high).reshape(1, 1)
    one_scale = not algorithm.per_channel and SITES[linear].split != "qkv"
    tensors[f"{linear}.per_channel_scale"] = to_float[None, :1].clone() if one_scale else to_float[None]
    return tensors
