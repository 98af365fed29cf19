"""What an algorithm is given of one decoder layer, and what it gives back. Knows no algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trtlab.config.model import ModelConfig
from trtlab.errors import QuantizeError
from trtlab.model.blocks import SITES, layer_plan
from trtlab.model.names import layer_name
from trtlab.model.scales import all_finite

GRAM_BLOCK = 384  # columns of a Gram matrix that are computed together: it is symmetric, one triangle of blocks will do


@dataclass(frozen=True)
class InputStatistics:
    """What calibration saw at the input ``[tokens, in]`` of a linear; each text counts alike in means.

    ``gram`` is the mean of ``x^T x`` over tokens ``[in, in]``, None unless the recipe searches with it; ``sample``
    holds rows of the input itself.
    """

    amax: Tensor  # [in]: max over tokens of |x|
    mean: Tensor  # [in]: mean over tokens of |x|
    sample: Tensor  # [rows, in]
    gram: Tensor | None = None


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration saw in one layer: inputs by ``LinearSite.reads``, outputs by linear, K and V as cached, by head.

    ``sampled`` are the outputs that belong to the rows of ``InputStatistics.sample``.
    """

    inputs: dict[str, InputStatistics]
    outputs: dict[str, Tensor]  # [out]: max over tokens of |y|
    sampled: dict[str, Tensor]  # [rows, out]: x W^T, without the bias
    keys: Tensor  # [kv_heads], after rotary
    values: Tensor  # [kv_heads]

    def input_of(self, linear: str) -> InputStatistics:
        """The statistics of the tensor that a linear reads."""
        return self.inputs[SITES[linear].reads]


@dataclass(frozen=True)
class CalibratedLayer:
    """One decoder layer in float32, by the names within a layer (``attention.qkv.weight``)."""

    config: ModelConfig
    index: int
    weights: dict[str, Tensor]
    statistics: LayerStatistics | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears that are quantized, without those excluded."""
        return tuple(part for part in layer_plan(self.config).parts if self.quantizes(part))

    def quantizes(self, linear: str) -> bool:
        """Whether a linear is quantized at all."""
        return self.config.quantization.algorithm_of(layer_name(self.index, linear)) is not None

    def weight(self, linear: str) -> Tensor:
        """The weight ``[out, in]``."""
        return self.weights[f"{linear}.weight"]

    def parts(self, linear: str) -> list[Tensor]:
        """The weight as the source had it: query, key and value rows apart ``[out, in]`` each."""
        return self.split(linear, self.weight(linear))

    def split(self, linear: str, rows: Tensor) -> list[Tensor]:
        """Something with a row an output, cut where query, key and value rows were put together."""
        if SITES[linear].split != "qkv":
            return [rows]
        heads, kv_heads, size = (
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.config.head_size,
        )
        return list(torch.split(rows, [heads * size, kv_heads * size, kv_heads * size]))

    @property
    def observed(self) -> LayerStatistics:
        """The statistics, which an algorithm that reads texts has."""
        assert self.statistics is not None, "a recipe that reads texts is given statistics"
        return self.statistics


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's new tensors by name; weights that stay as they are may be left out.

    ``smoothing`` is what each input channel is divided by before it is quantized ``[in]``, ``alphas`` the strength
    that was used, both by linear and for the report alone.
    """

    tensors: dict[str, Tensor]
    smoothing: dict[str, Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)


def require_finite(name: str, x: Tensor) -> None:
    """QuantizeError when a tensor holds NaN or infinity, which would poison every scale."""
    if not all_finite(x):
        bad = int((~torch.isfinite(x)).sum())
        raise QuantizeError(
            f"{name} holds {bad} values that are NaN or infinite",
            remedy="the source is damaged, or overflows in its dtype: nothing was written",
        )
