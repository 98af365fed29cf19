"""Weight-only products by torch's packed CPU kernels: BF16 activations, integers never turned back. Opted into."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trtlab.model.quantized import WeightOnly, tensor_bytes
from trtlab.model.weights import LayerWeights, Linear, ModelWeights
from trtlab.ops.quantized import linear
from trtlab.quantize.recipes import LINEARS

INT4_GROUPS = (256, 128, 64, 32)  # what torch's kernel takes
INT4_ROWS = 16  # it wants a multiple of so many outputs


@dataclass(frozen=True)
class PackedLinear:
    """INT8 ``[out, in]`` with a BF16 scale a row, or INT4 in the kernel's layout with ``[groups, out, 2]`` of BF16.

    ``group_size`` is 0 for INT8.
    """

    name: str
    weight: Tensor
    scale: Tensor
    group_size: int
    shape: tuple[int, int]
    bias: Tensor | None = None
    prequant: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the integers, all scales and the bias."""
        return tensor_bytes(self)


@linear.register
def _packed(weight: PackedLinear, x: Tensor) -> Tensor:
    if weight.prequant is not None:
        x = x * weight.prequant
    if weight.group_size:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.weight, weight.group_size, weight.scale)
    else:
        y = torch.ops.aten._weight_int8pack_mm(x, weight.weight, weight.scale)
    return y if weight.bias is None else y + weight.bias


def with_fast_kernels(weights: ModelWeights) -> ModelWeights:
    """The same weights with every weight-only linear that torch has a kernel for in that kernel's form."""
    return dataclasses.replace(weights, layers=tuple(_layer(layer) for layer in weights.layers))


def _layer(layer: LayerWeights) -> LayerWeights:
    places = [name.split(".")[1] for name in LINEARS]
    changes: dict[str, Any] = {place: _fast(getattr(layer, place)) for place in places}
    return dataclasses.replace(layer, **changes)


def _fast(weight: Linear) -> Linear | PackedLinear:
    if not isinstance(weight, WeightOnly):
        return weight
    rows, width = weight.shape
    groups = weight.scale.value.shape[1]
    if weight.weight.dtype == torch.int8:
        scale = weight.scale.value[:, 0].to(torch.bfloat16)
        return PackedLinear(weight.name, weight.weight, scale, 0, weight.shape, weight.bias, weight.prequant)
    sizes = [size for size in INT4_GROUPS if (width // groups) % size == 0]
    if not sizes or rows % INT4_ROWS:
        return weight
    unsigned = weight.integers.to(torch.int32) + 8  # 0 to 15
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    scale = weight.scale.value.repeat_interleave(width // groups // sizes[0], 1)  # [out, in / size]
    pairs = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).to(torch.bfloat16).contiguous()
    return PackedLinear(weight.name, packed, pairs, sizes[0], weight.shape, weight.bias, weight.prequant)
