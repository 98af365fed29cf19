"""Faster products on a CPU: large weights laid out once for oneDNN, and torch's packed kernels for weight-only ones.

The first changes no number beyond the order of a sum and is always on. The second takes BF16 activations and is opted
into; of its integers only INT8 ones are turned back, where many tokens share the work.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trtlab.model.quantized import WeightOnly, tensor_bytes
from trtlab.model.weights import Dense, Linear, ModelWeights, map_linears
from trtlab.ops.quantized import linear

INT4_GROUPS = (256, 128, 64, 32)  # what torch's kernel takes
INT4_ROWS = 16  # it wants a multiple of so many outputs
MANY = 32  # tokens; torch's INT8 kernel is made for few, and from here on turning the integers back costs less


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
    elif len(x) < MANY:
        y = torch.ops.aten._weight_int8pack_mm(x, weight.weight, weight.scale)
    else:
        wide = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
        y = F.linear(x.to(wide), weight.weight.to(wide)).to(x.dtype) * weight.scale
    return y if weight.bias is None else y + weight.bias


LARGE = 2**20  # elements; below this, oneDNN's layout saves less than its call costs


@dataclass(frozen=True)
class LaidOutDense:
    """A float32 linear layer whose weight lies in oneDNN's own layout, so that no call lays it out again."""

    name: str
    weight: Tensor
    shape: tuple[int, int]
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        elements = self.shape[0] * self.shape[1] + (0 if self.bias is None else self.shape[0])
        return elements * torch.float32.itemsize


@linear.register
def _laid_out(weight: LaidOutDense, x: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.weight, weight.bias, "none", [], "")
    return y


def laid_out(weights: ModelWeights) -> ModelWeights:
    """The same weights with every float32 linear layer on a CPU, the head among them, as its product reads it fastest.

    Large ones go into oneDNN's layout, small ones lie column by column.
    """
    return map_linears(weights, _lay_out)


def _lay_out(weight: Linear) -> Linear | LaidOutDense:
    if not isinstance(weight, Dense):
        return weight
    tensor = weight.weight
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return weight
    if tensor.numel() < LARGE or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return dataclasses.replace(weight, weight=tensor.t().contiguous().t())
    with torch.inference_mode(False), torch.no_grad():
        laid_out = torch.ops.mkldnn._reorder_linear_weight(tensor)
    return LaidOutDense(weight.name, laid_out, (tensor.shape[0], tensor.shape[1]), weight.bias)


def with_fast_kernels(weights: ModelWeights) -> ModelWeights:
    """The same weights with every weight-only linear that torch has a kernel for in that kernel's form."""
    return map_linears(weights, _fast)


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
