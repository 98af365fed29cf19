"""SmoothQuant (arXiv:2211.10438): part of the activations' range moves into the weights, then both become INT8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtlab.config.algorithms import Algorithm
from trtlab.model.blocks import SITES, layer_plan
from trtlab.model.scales import INT8, INT8_SYMMETRIC, ToQuantized, amax, int_matmul, positive, quantize_rows, to_int
from trtlab.quantize.layer import CalibratedLayer, InputStatistics, QuantizedLayer

ALPHAS = tuple(step / 20 for step in range(21))
SMALLEST = 1e-5  # TensorRT-LLM's floor of a smoothing factor


def smoothing(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """What each input channel is divided by: ``x_max^alpha / w_max^(1 - alpha)``, both ``[in]``, at least 1e-5.

    A channel that is all zero in the texts or in the weights keeps 1: TensorRT-LLM's formula gives 1e-5 or infinity
    there, and the first unseen text would pay for it.
    """
    s = x_max.pow(alpha) / w_max.pow(1 - alpha)
    dead = (x_max == 0) | (w_max == 0)
    return torch.where(dead, torch.ones_like(s), s.clamp(min=SMALLEST))


def int8_weight(parts: Sequence[Tensor], *, per_channel: bool) -> tuple[Tensor, ToQuantized]:
    """Weights that are one matrix product to int8 ``[out, in]`` and their scales ``[out]``.

    Without ``per_channel`` each part (query, key, value) has one scale, repeated along its rows. Range +-127.
    """
    scales = []
    for part in parts:
        largest = amax(part, 1) if per_channel else amax(part).expand(part.shape[0])
        scales.append(INT8.high / positive(largest))
    scale = ToQuantized(torch.cat(scales))
    return to_int(torch.cat(list(parts)), ToQuantized(scale.value[:, None]), INT8_SYMMETRIC), scale


def search_alpha(seen: InputStatistics, layer: CalibratedLayer, linears: Sequence[str], algorithm: Algorithm) -> float:
    """The alpha of ALPHAS with the smallest squared error of the linears' outputs on sampled rows."""
    losses = {alpha: _loss(seen, layer, linears, algorithm, alpha) for alpha in ALPHAS}
    return min(losses, key=losses.__getitem__)


def _loss(
    seen: InputStatistics, layer: CalibratedLayer, linears: Sequence[str], algorithm: Algorithm, alpha: float
) -> float:
    s = smoothing(seen.amax, column_max(layer, linears), alpha)
    x = seen.sample / s
    if algorithm.per_token:
        q, x_scale = quantize_rows(x)
    else:
        static = ToQuantized(INT8.high / positive((seen.amax / s).amax()))
        q, x_scale = to_int(x, static, INT8), static.inverse.value
    loss = 0.0
    for linear in linears:
        w, w_scale = int8_weight([part * s for part in layer.parts(linear)], per_channel=algorithm.per_channel)
        got = int_matmul(q, w) * x_scale / w_scale.value
        loss += float((got - layer.observed.sampled[linear]).square().mean())
    return loss


def column_max(layer: CalibratedLayer, linears: Sequence[str]) -> Tensor:
    """``max over outputs of |W|`` of all linears that share an input ``[in]``."""
    return torch.stack([amax(layer.weight(linear), 0) for linear in linears]).amax(0)


@dataclass(frozen=True)
class _Site:
    """Linears that share an input, with the alpha and the smoothing that they were given."""

    linears: tuple[str, ...]
    alpha: float
    s: Tensor


def _smooth_site(layer: CalibratedLayer, linears: tuple[str, ...], algorithm: Algorithm) -> _Site:
    seen = layer.observed.input_of(linears[0])
    wanted = layer.config.quantization.smoothquant_val
    alpha = wanted if wanted is not None else search_alpha(seen, layer, linears, algorithm)
    return _Site(linears, alpha, smoothing(seen.amax, column_max(layer, linears), alpha))


def quantize_layer(layer: CalibratedLayer) -> QuantizedLayer:
    """TensorRT-LLM's native form: smoothing goes into the norm in front, or beside the weight as ``smoother``.

    A linear that is excluded but shares a smoothed norm is multiplied by the same factors and stays in its dtype.
    """
    algorithm = layer.config.quantization.algorithm
    assert algorithm is not None, "SmoothQuant has an algorithm"
    result = QuantizedLayer({})
    for sites in layer_plan(layer.config).inputs.values():
        linears = tuple(site.part for site in sites)
        if any(layer.quantizes(linear) for linear in linears):
            site = _smooth_site(layer, linears, algorithm)
            _quantize_site(layer, site, algorithm, result)
    return result


def _quantize_site(layer: CalibratedLayer, site: _Site, algorithm: Algorithm, result: QuantizedLayer) -> None:
    first = SITES[site.linears[0]]
    s, dtype = site.s, layer.config.torch_dtype
    if first.norm_before is not None:
        name = f"{first.norm_before}.weight"
        s, result.tensors[name] = fold(layer.weights[name], s, dtype)
        bias = f"{first.norm_before}.bias"
        if bias in layer.weights:
            result.tensors[bias] = (layer.weights[bias] / s).to(dtype)
    else:
        result.tensors[f"{first.part}.smoother"] = s[None]  # [1, in]
    x_scale = ToQuantized(INT8.high / positive((layer.observed.input_of(first.part).amax / s).amax()))
    stored = torch.ones(1) if algorithm.per_token else x_scale.value.reshape(1)
    result.tensors[first.input_scale] = stored
    for linear in site.linears:
        result.smoothing[linear], result.alphas[linear] = s, site.alpha
        if layer.quantizes(linear):
            result.tensors.update(_int8_linear(layer, linear, s, x_scale, algorithm))
        else:
            result.tensors[f"{linear}.weight"] = (layer.weight(linear) * s).to(dtype)


def fold(gain: Tensor, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm's gain over ``s`` in its storage dtype, and the smoothing that the rounded gain really applies."""
    stored = (gain / s).to(dtype)
    real = gain / stored.float()
    return torch.where(torch.isfinite(real) & (real > 0), real, s), stored


def _int8_linear(
    layer: CalibratedLayer, linear: str, s: Tensor, x_scale: ToQuantized, algorithm: Algorithm
) -> dict[str, Tensor]:
    """Weight and output scales; static ones in two factors as TensorRT-LLM has them: to the output's INT8, and back."""
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
