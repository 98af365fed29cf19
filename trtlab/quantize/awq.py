"""AWQ (arXiv:2306.00978) as ModelOpt computes it: INT4 by groups, with important channels scaled up first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from trtlab.model.blocks import by_input
from trtlab.model.scales import INT4, ToOriginal, amax, by_group, pack_int4, positive, to_int
from trtlab.quantize.fp8 import float8_scale
from trtlab.quantize.layer import GRAM_BLOCK, CalibratedLayer, InputStatistics, QuantizedLayer

ALPHAS = tuple(step / 10 for step in range(11))
LIMITS = (1e-4, 1e4)
CHUNK = 2**18  # elements of a weight whose errors are computed together: 1 MiB, which fits a processor's cache
CHUNKS = 4  # of each weight, at least: what is left of a weight when an alpha is given up is not computed


def group_scales(weight: Tensor, group_size: int) -> ToOriginal:
    """``[out, in]`` to scales ``[out, in / group_size]``: the group's largest magnitude over 7."""
    grouped = by_group(weight, weight.shape[1] // group_size)
    return ToOriginal(positive(amax(grouped, -1)) / INT4.high)


def int4_groups(weight: Tensor, scale: ToOriginal) -> Tensor:
    """int8 storage ``[out, in]`` of integers -8 to 7, ties to even; ``scale`` is ``[out, groups]``."""
    grouped = by_group(weight, scale.value.shape[1])
    return to_int(grouped, ToOriginal(scale.value[..., None]), INT4).flatten(1)


def importance(weight: Tensor, group_size: int) -> Tensor:
    """The magnitude of each input channel's weights relative to their group's largest, mean over outputs ``[in]``."""
    grouped = by_group(weight.abs(), weight.shape[1] // group_size)
    tiny = torch.finfo(torch.float32).tiny
    return (grouped / (grouped.amax(-1, keepdim=True) + tiny)).flatten(1).mean(0)


def awq_scale(x_mean: Tensor, w_mean: Tensor, alpha: float) -> Tensor:
    """The factor on each weight column: ``x_mean^alpha / w_mean^(1 - alpha)``, with its extremes centred on 1."""
    tiny = torch.finfo(torch.float32).tiny
    scale = (x_mean.pow(alpha) / (w_mean.pow(1 - alpha) + tiny)).clamp(*LIMITS)
    return scale / (scale.amax() * scale.amin()).sqrt()


def search_scale(weight: Tensor, inputs: InputStatistics, group_size: int) -> tuple[float, Tensor]:
    """The alpha of ALPHAS with the smallest mean squared output error, and its ``awq_scale`` ``[in]``.

    With the Gram matrix ``G`` of the inputs the error over all tokens is ``sum(D G * D)``, where ``D`` is the error of
    the weight, so no token is read again for another alpha. Each row of ``D`` adds a part that is never negative.
    So only the alpha whose sum is the smallest so far goes on with its next rows, and the first one that has all rows
    is the best. Rows with large weights come first, because they add the most.
    """
    assert inputs.gram is not None, "AWQ's search needs the Gram matrix of the inputs"
    w_mean = importance(weight, group_size)
    scales = {alpha: awq_scale(inputs.mean, w_mean, alpha) for alpha in ALPHAS}
    ordered = weight[weight.square().sum(1).argsort(descending=True)]
    chunks = ordered.chunk(max(CHUNKS, -(-weight.numel() // CHUNK)))
    sums = [(0.0, alpha, 0) for alpha in ALPHAS]  # a heap of loss so far, alpha and number of chunks in the loss
    while True:
        loss, alpha, number = sums[0]
        if number == len(chunks):
            return alpha, scales[alpha]
        error = _error(chunks[number], scales[alpha], group_size)
        heapq.heapreplace(sums, (loss + _loss(error, inputs.gram), alpha, number + 1))


def _error(weight: Tensor, s: Tensor, group_size: int) -> Tensor:
    """The error of a weight that is multiplied by ``s``, rounded and divided by ``s`` again ``[out, in]``."""
    scaled = weight * s
    scale = group_scales(scaled, group_size).value[..., None]  # [out, groups, 1]
    grouped = by_group(scaled, scale.shape[1])  # a view
    grouped.div_(scale).round_().clamp_(INT4.low, INT4.high).mul_(scale)
    return scaled.div_(s).sub_(weight)


def _loss(error: Tensor, gram: Tensor) -> float:
    """``sum(error gram * error)``; ``gram`` is symmetric, so its upper blocks count twice and halve the work."""
    loss = 0.0
    for start in range(0, error.shape[1], GRAM_BLOCK):
        block = slice(start, start + GRAM_BLOCK)
        product = (error[:, block] @ gram[block, block]).addmm_(error[:, :start], gram[:start, block], alpha=2)
        loss += float(product.mul_(error[:, block]).sum())
    return loss


def quantize_layer(layer: CalibratedLayer) -> QuantizedLayer:
    """Each linear packed along out, with ``weights_scaling_factor`` by group and ``prequant_scaling_factor``.

    Query, key and value are searched separately, and so are fc and gate. Their prequant scales are averaged because
    they read one input, and every weight is divided by the average.
    """
    result = QuantizedLayer({})
    dtype = layer.config.torch_dtype
    for sites in by_input(layer.sites).values():
        linears = [site.part for site in sites if layer.quantizes(site.part)]
        if not linears:
            continue
        prequant = _shared_prequant(layer, linears, result).to(dtype).float()  # as it is stored
        for linear in linears:
            weight = layer.weight(linear) / prequant
            scale = group_scales(weight, layer.config.quantization.group_size)
            result.tensors[f"{linear}.weight"] = pack_int4(int4_groups(weight, scale)).view(torch.int8)
            result.tensors[f"{linear}.weights_scaling_factor"] = scale.value
            result.tensors[f"{linear}.prequant_scaling_factor"] = prequant.to(dtype)
            result.smoothing[linear] = 1 / prequant
    return result


def quantize_layer_fp8(layer: CalibratedLayer) -> QuantizedLayer:
    """W4A8: as ``quantize_layer``, with FP8 scales for the dequantized INT4 weight and for the input."""
    result = quantize_layer(layer)
    for linear in layer.linears:
        prequant = result.tensors[f"{linear}.prequant_scaling_factor"].float()
        largest = (layer.observed.input_of(linear).amax * prequant).amax()
        weight = amax(layer.weight(linear) / prequant)
        result.tensors[f"{linear}.weights_scaling_factor_2"] = float8_scale(weight).value.reshape(1)
        result.tensors[f"{linear}.activation_scaling_factor"] = float8_scale(largest).value.reshape(1)
    return result


def _shared_prequant(layer: CalibratedLayer, linears: Sequence[str], result: QuantizedLayer) -> Tensor:
    group_size = layer.config.quantization.group_size
    prequants: list[Tensor] = []
    alphas: list[float] = []
    for linear in linears:
        inputs = layer.observed.input_of(linear)
        for part in layer.parts(linear):
            alpha, scale = search_scale(part, inputs, group_size)
            alphas.append(alpha)
            prequants.append(1 / scale)
    for linear in linears:
        result.alphas[linear] = sum(alphas) / len(alphas)
    return torch.stack(prequants).mean(0)
