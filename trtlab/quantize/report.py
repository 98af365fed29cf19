"""The error of each quantized linear, and how many bits each cache scale uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trtlab.card import Shown
from trtlab.config.calls import public
from trtlab.config.quant import QuantConfig
from trtlab.model.blocks import SITES
from trtlab.model.names import layer_name
from trtlab.model.quantized_weights import (
    Float8Linear,
    Int4Float8Linear,
    Int8Linear,
    Quantized,
    WeightOnly,
    quantized_linear,
)
from trtlab.model.scales import FLOAT8, FLOAT8_MAX, dequantize
from trtlab.ops.quantized_linear import linear as run_linear
from trtlab.quantize.kv_cache import effective_bits
from trtlab.quantize.layer import CalibratedLayer, QuantizedLayer


@dataclass(frozen=True)
class LinearReport:
    """Scales, errors and bytes of one linear.

    ``snr_db`` and ``cosine`` compare its output with the original's on sampled calibration rows, or the weights if
    there are no texts. ``saturation`` is the share of weights at the ends of the integer range. The outlier ratios are
    the largest input channel over the median one, before and after smoothing. ``bytes_before`` is 0 for the head of a
    tied model: its table stays for the lookup.
    """

    name: str
    scale_min: float
    scale_median: float
    scale_max: float
    snr_db: float
    cosine: float
    saturation: float
    outliers_before: float | None
    outliers_after: float | None
    alpha: float | None
    bytes_before: int
    bytes_after: int

    @property
    def bytes_saved(self) -> int:
        """Bytes of the original weight minus the bytes of all tensors that replace it."""
        return self.bytes_before - self.bytes_after


@dataclass(frozen=True)
class CacheReport:
    """One layer's cache: scales (largest over heads), and how many of eight bits K and V use (fewest over heads)."""

    layer: int
    k_scale: float
    v_scale: float
    k_bits: float | None
    v_bits: float | None


@public
@dataclass(frozen=True, repr=False)
class QuantizationReport(Shown):
    """One row for each quantized linear and one for each layer's cache, in the model's order."""

    config: QuantConfig
    linears: tuple[LinearReport, ...]
    caches: tuple[CacheReport, ...]

    def worst(self, count: int = 5) -> tuple[LinearReport, ...]:
        """The linears with the lowest signal-to-noise ratio, worst first: candidates for ``exclude_modules``."""
        return tuple(sorted(self.linears, key=lambda row: row.snr_db)[:count])

    @property
    def bytes_saved(self) -> int:
        """Bytes that are saved over all linears."""
        return sum(row.bytes_saved for row in self.linears)


def report_linears(layer: CalibratedLayer, result: QuantizedLayer) -> list[LinearReport]:
    """The reports of one layer's quantized linears."""
    return [_row(layer, result, linear) for linear in layer.linears]


def _row(layer: CalibratedLayer, result: QuantizedLayer, linear: str) -> LinearReport:
    weight = typed_linear(layer, result, linear)
    expected, got = _outputs(layer, result, linear, weight)
    signal, noise, power, both = _products(expected, got)
    stored = [tensor for name, tensor in result.tensors.items() if name.startswith(f"{linear}.")]
    s = result.smoothing.get(linear)
    channels = None if layer.statistics is None else layer.statistics.input_of(linear).amax
    scale = _scale(weight)
    return LinearReport(
        name=layer_name(layer.index, linear),
        scale_min=float(scale.min()),
        scale_median=float(scale.median()),
        scale_max=float(scale.max()),
        snr_db=10 * math.log10(signal / noise) if signal and noise else math.inf,
        cosine=both / math.sqrt(signal * power) if signal and power else 0.0,
        saturation=_saturation(weight),
        outliers_before=None if channels is None else outlier_ratio(channels),
        outliers_after=None if channels is None else outlier_ratio(channels if s is None else channels / s),
        alpha=result.alphas.get(linear),
        bytes_before=_bytes_before(layer, linear),
        bytes_after=sum(tensor.nbytes for tensor in stored),
    )


def _bytes_before(layer: CalibratedLayer, linear: str) -> int:
    if layer.index is None and layer.config.tie_word_embeddings:
        return 0
    return layer.weight(linear).numel() * layer.config.torch_dtype.itemsize


def _products(expected: Tensor, got: Tensor) -> tuple[float, float, float, float]:
    """The sums of squares of ``expected``, of the error and of ``got``, and the sum of ``expected * got``."""
    error, a, b = (expected - got).flatten(), expected.flatten(), got.flatten()  # [tokens * out] each
    return float(a @ a), float(error @ error), float(b @ b), float(a @ b)


def outlier_ratio(channels: Tensor) -> float:
    """The largest magnitude of all channels ``[in]`` over the median one; infinite when most are zero."""
    median = float(channels.median())
    return float(channels.max()) / median if median else math.inf


def typed_linear(layer: CalibratedLayer, result: QuantizedLayer, linear: str) -> Quantized:
    """One linear's quantized tensors as the typed weight that op sets receive."""
    algorithm = layer.config.quantization.algorithm
    assert algorithm is not None, f"{linear} has no algorithm"

    def tensor(name: str) -> Tensor:
        stored = result.tensors[name]
        return stored.float() if stored.dtype == layer.config.torch_dtype else stored

    return quantized_linear(algorithm, linear, layer_name(layer.index, linear), tensor, None)


def _outputs(layer: CalibratedLayer, result: QuantizedLayer, linear: str, weight: Quantized) -> tuple[Tensor, Tensor]:
    """The outputs of the original linear and of the quantized one, without bias; the weights if there are no texts."""
    if layer.statistics is None:
        assert isinstance(weight, WeightOnly), f"{type(weight).__name__} of {linear} needs calibration statistics"
        return layer.weight(linear), dequantize(weight.integers, weight.scale.value)
    x = layer.statistics.input_of(linear).sample
    folded = SITES[linear].norm_before is not None and isinstance(weight, Int8Linear) and weight.prequant is None
    smoothed = x / result.smoothing[linear] if folded else x  # there the norm before the linear already divides
    return layer.statistics.sampled[linear], run_linear(weight, smoothed)


def _scale(weight: Quantized) -> Tensor:
    if isinstance(weight, Int8Linear):
        return weight.output_scale.value
    if isinstance(weight, Int4Float8Linear):
        return weight.groups.scale.value
    return weight.weight_scale.value if isinstance(weight, Float8Linear) else weight.scale.value


def _saturation(weight: Quantized) -> float:
    numbers, end = stored_numbers(weight)
    if numbers.dtype == FLOAT8:  # without the sign bit, larger numbers have larger bit patterns
        numbers, end = numbers.view(torch.int8) & 0x7F, int(torch.tensor(float(end)).to(FLOAT8).view(torch.int8))
    beyond = torch.count_nonzero(numbers >= end) + torch.count_nonzero(numbers <= -end)
    return float(beyond / numbers.numel())


def stored_numbers(weight: Quantized) -> tuple[Tensor, int]:
    """The integers or E4M3 numbers that a linear stores ``[out, in]``, and the largest number of its format."""
    if isinstance(weight, Float8Linear):
        return weight.weight, int(FLOAT8_MAX)
    groups = weight.groups if isinstance(weight, Int4Float8Linear) else weight
    q = groups.integers if isinstance(groups, WeightOnly) else groups.weight
    return q, 7 if isinstance(groups, WeightOnly) and groups.weight.dtype == torch.uint8 else 127


def report_kv(layer: CalibratedLayer, result: QuantizedLayer) -> list[CacheReport]:
    """The report of one layer's cache; an empty list if the cache is not quantized."""
    algorithm = layer.config.quantization.kv_algorithm
    if algorithm is None or layer.index is None:
        return []
    scales = [result.tensors[name] for name in algorithm.tensors]
    k_scale, v_scale = scales[0], scales[-1]
    int8 = layer.config.quantization.kv_cache_quant_algo == "INT8"
    statistics = layer.statistics if int8 else None
    return [
        CacheReport(
            layer.index,
            float(k_scale.max()),
            float(v_scale.max()),
            None if statistics is None else _fewest_bits(statistics.keys, k_scale),
            None if statistics is None else _fewest_bits(statistics.values, v_scale),
        )
    ]


def _fewest_bits(largest: Tensor, scale: Tensor) -> float:
    pairs = zip(largest.tolist(), scale.expand_as(largest).tolist(), strict=True)
    return min(effective_bits(head, step) for head, step in pairs)
