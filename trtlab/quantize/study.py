"""A study of a quantization: the result of every alpha and every cache scale, computed in advance.

Keeps small tables and no weights: one layer is in memory at a time, as when the model was quantized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trtlab.config.algorithms import KV_SCALES, Algorithm, KvScales
from trtlab.config.quant import QuantConfig
from trtlab.model.names import layer_name
from trtlab.model.scales import amax, by_group, positive
from trtlab.progress import progress
from trtlab.quantize.layer import CalibratedLayer, QuantizedLayer
from trtlab.quantize.report import CacheReport, LinearReport, report_kv, report_linears, stored_numbers, typed_linear
from trtlab.quantize.run import Quantization, quantize_layer
from trtlab.quantize.smoothquant import ALPHAS

BINS = 65  # of a histogram from minus to plus the largest magnitude; an odd number, so that one bin is for zero
CHANNELS = 128  # points of a curve over input channels, for any number of channels


@dataclass(frozen=True)
class Spread:
    """The distribution of the numbers at one linear.

    ``weights`` and ``activations`` are histograms: the share of numbers in each bin from -1 to 1, where 1 is the
    largest number that the scale must represent. ``channels`` are the largest magnitudes of the input channels over
    their median, sorted by the original magnitudes, largest first. Without texts ``activations`` and
    ``channels`` are None.
    """

    weights: tuple[float, ...]
    activations: tuple[float, ...] | None
    channels: tuple[float, ...] | None


@dataclass(frozen=True)
class Trial:
    """One linear under one setting: its row of the report and the distribution of its numbers."""

    row: LinearReport
    after: Spread


@dataclass(frozen=True)
class LinearStudy:
    """One linear: the original distribution, and one trial for each alpha (``None`` is the searched alpha).

    ``layer`` is None for the head.
    """

    layer: int | None
    linear: str
    before: Spread
    trials: Mapping[float | None, Trial]

    @property
    def name(self) -> str:
        """The full name, which ``exclude_modules`` takes."""
        return layer_name(self.layer, self.linear)


@dataclass(frozen=True)
class Study:
    """All linears, with those that the recipe excludes, and the caches by granularity; ``quant`` is the recipe."""

    quant: QuantConfig
    linears: tuple[LinearStudy, ...]
    caches: Mapping[str, tuple[CacheReport, ...]]

    @property
    def alphas(self) -> tuple[float | None, ...]:
        """The alphas that were tried; only one if the algorithm has no alpha."""
        return tuple(self.linears[0].trials) if self.linears else (self.quant.smoothquant_val,)

    @property
    def excluded(self) -> frozenset[str]:
        """The linears that the recipe excludes, by full name."""
        if self.quant.algorithm is None:
            return frozenset()
        return frozenset(study.name for study in self.linears if self.quant.algorithm_of(study.name) is None)


def study(quantization: Quantization) -> Study:
    """Try every setting of a quantization, layer by layer. Each setting takes about as long as one quantization.

    Excluding a linear does not change the figures of the others, except with AWQ, which averages the scales of linears
    that share an input: its figures are those of a model without exclusions.
    """
    quant = quantization.config.quantization
    settings = _settings(quant)
    linears: list[LinearStudy] = []
    caches: dict[KvScales, list[CacheReport]] = {
        scales: [] for scales in KV_SCALES if quant.kv_cache_quant_algo == "INT8"
    }
    with (
        torch.inference_mode(),
        progress("trying every setting", len(settings) * quantization.steps, unit="trial") as bar,
    ):
        for layer in quantization.layers():
            if quant.algorithm is not None:
                linears += _try_linears(layer, quant.algorithm, settings, bar)
            else:
                bar.update(1)
            for scales, rows in caches.items():
                trial = _with(layer, dataclasses.replace(quant, quant_algo=None, kv_cache_scales=scales))
                rows += report_kv(trial, quantize_layer(trial))
                del trial
            del layer  # before the next layer is read
    return Study(quant, tuple(linears), {scales: tuple(rows) for scales, rows in caches.items()})


def _settings(quant: QuantConfig) -> dict[float | None, QuantConfig]:
    """A recipe for each alpha, in order, the recipe's own included; none excludes a linear or quantizes the cache."""
    unrestricted = dataclasses.replace(quant, exclude_modules=(), kv_cache_quant_algo=None)
    if quant.algorithm is None or not quant.algorithm.family.startswith("smoothquant"):
        return {quant.smoothquant_val: unrestricted}
    numbers = {*ALPHAS, *([] if quant.smoothquant_val is None else [quant.smoothquant_val])}
    alphas: list[float | None] = [None, *sorted(numbers)]
    return {alpha: dataclasses.replace(unrestricted, smoothquant_val=alpha) for alpha in alphas}


def _with(layer: CalibratedLayer, quant: QuantConfig) -> CalibratedLayer:
    return dataclasses.replace(layer, config=layer.config.replace(quantization=quant))


def _try_linears(
    layer: CalibratedLayer, algorithm: Algorithm, settings: Mapping[float | None, QuantConfig], bar: Any
) -> list[LinearStudy]:
    trials: dict[str, dict[float | None, Trial]] = {site.part: {} for site in layer.sites}
    for alpha, quant in settings.items():
        trial = _with(layer, quant)
        result = quantize_layer(trial)
        for linear, row in zip(trial.linears, report_linears(trial, result), strict=True):
            trials[linear][alpha] = Trial(row, _after(trial, result, linear))
        bar.update(1)
    first = _with(layer, next(iter(settings.values())))
    return [
        LinearStudy(layer.index, linear, _before(first, algorithm, linear), trials[linear]) for linear in first.linears
    ]


def _before(layer: CalibratedLayer, algorithm: Algorithm, linear: str) -> Spread:
    """The distribution of the original numbers, relative to the largest one that an unsmoothed scale represents."""
    weight = layer.weight(linear)
    if algorithm.grouped:
        groups = by_group(weight, weight.shape[1] // layer.config.quantization.group_size)
        shares = groups / positive(amax(groups, -1, keepdim=True))
    elif algorithm.per_channel:
        shares = weight / positive(amax(weight, 1, keepdim=True))
    else:
        shares = torch.cat([part / positive(amax(part)) for part in layer.parts(linear)])
    return Spread(_histogram(shares), *_inputs(layer, linear, None))


def _after(layer: CalibratedLayer, result: QuantizedLayer, linear: str) -> Spread:
    """The distribution of the stored numbers, relative to the format's largest, and of the input before rounding."""
    numbers, end = stored_numbers(typed_linear(layer, result, linear))
    return Spread(_histogram(numbers.float() / end), *_inputs(layer, linear, result.smoothing.get(linear)))


def _inputs(
    layer: CalibratedLayer, linear: str, s: Tensor | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Histogram and channel curve of the input divided by ``s`` ``[in]``; None for both without texts."""
    if layer.statistics is None:
        return None, None
    inputs = layer.statistics.input_of(linear)
    x, largest = (inputs.sample, inputs.amax) if s is None else (inputs.sample / s, inputs.amax / s)
    order = inputs.amax.argsort(descending=True)
    places = torch.linspace(0, len(order) - 1, CHANNELS).round().long()
    curve = (largest / positive(largest.median()))[order][places]
    return _histogram(x / positive(largest.amax())), tuple(curve.tolist())


def _histogram(shares: Tensor) -> tuple[float, ...]:
    places = ((shares.clamp(-1, 1) + 1) * ((BINS - 1) / 2)).round().long().flatten()
    return tuple((torch.bincount(places, minlength=BINS) / places.numel()).tolist())
