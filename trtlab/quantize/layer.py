"""Input and output of a quantization algorithm for one decoder layer, or for the head. Knows no algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trtlab.config.model import ModelConfig
from trtlab.errors import QuantizeError
from trtlab.model.blocks import LM_HEAD, SITES, LinearSite, layer_plan
from trtlab.model.names import layer_name
from trtlab.model.scales import all_finite

GRAM_BLOCK = 192  # columns of a Gram matrix computed together; it is symmetric, so one triangle of blocks is enough


@dataclass(frozen=True)
class InputStatistics:
    """Calibration statistics of a linear's input ``[tokens, in]``; every text has the same weight in means.

    ``gram`` is the mean of ``x^T x`` over tokens ``[in, in]``, None unless the recipe's search needs it; ``sample``
    holds some rows of the input.
    """

    amax: Tensor  # [in]: max over tokens of |x|
    mean: Tensor  # [in]: mean over tokens of |x|
    sample: Tensor  # [rows, in]
    gram: Tensor | None = None


@dataclass(frozen=True)
class LayerStatistics:
    """Calibration statistics of one layer: inputs by ``LinearSite.reads``, outputs by linear, cached K and V by head.

    ``sampled`` are the outputs for the rows of ``InputStatistics.sample``. The head has no K and V: theirs are empty.
    """

    inputs: dict[str, InputStatistics]
    outputs: dict[str, Tensor]  # [out]: max over tokens of |y|
    sampled: dict[str, Tensor]  # [rows, out]: x W^T, without the bias
    keys: Tensor  # [kv_heads]: max of |k| after rotary
    values: Tensor  # [kv_heads]: max of |v|

    def input_of(self, linear: str) -> InputStatistics:
        """The statistics of a linear's input."""
        return self.inputs[SITES[linear].reads]


@dataclass(frozen=True)
class CalibratedLayer:
    """One decoder layer's weights in float32, by their names within a layer (``attention.qkv.weight``).

    With ``index`` None it is the head (``lm_head.weight``), which is quantized as a layer of one linear.
    """

    config: ModelConfig
    index: int | None
    weights: dict[str, Tensor]
    statistics: LayerStatistics | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears that are quantized, without those that ``exclude_modules`` names."""
        return tuple(site.part for site in self.sites if self.quantizes(site.part))

    @property
    def sites(self) -> tuple[LinearSite, ...]:
        """All linears, in execution order."""
        return (LM_HEAD,) if self.index is None else layer_plan(self.config).linears

    @property
    def name(self) -> str:
        """``layer 3`` or ``the head``."""
        return "the head" if self.index is None else f"layer {self.index}"

    def quantizes(self, linear: str) -> bool:
        """Whether a linear is quantized."""
        return self.config.quantization.algorithm_of(layer_name(self.index, linear)) is not None

    def weight(self, linear: str) -> Tensor:
        """The weight ``[out, in]``."""
        return self.weights[f"{linear}.weight"]

    def parts(self, linear: str) -> list[Tensor]:
        """The weight before fusion: query, key and value rows separately, each ``[out, in]``."""
        return self.split(linear, self.weight(linear))

    def split(self, linear: str, rows: Tensor) -> list[Tensor]:
        """A tensor with one row for each output, split into query, key and value rows if the linear is fused."""
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
        """The calibration statistics, for an algorithm that needs them."""
        assert self.statistics is not None, f"{self.name} has no calibration statistics"
        return self.statistics


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's new tensors by name; unchanged weights may be missing.

    ``smoothing`` is the divisor ``[in]`` of each input channel before it is quantized, ``alphas`` the strength that
    was used. Both are by linear, and only the report reads them.
    """

    tensors: dict[str, Tensor]
    smoothing: dict[str, Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)


def require_finite(name: str, x: Tensor) -> None:
    """Raise QuantizeError when a tensor holds NaN or infinity, because no scale can be computed from it."""
    if not all_finite(x):
        count = int((~torch.isfinite(x)).sum())
        raise QuantizeError(
            f"{name} holds {count} values that are NaN or infinite",
            remedy="the source is damaged, or overflows in its dtype; nothing was written",
        )
