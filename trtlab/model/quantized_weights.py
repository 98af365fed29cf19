"""The typed weights of quantized linears and caches that op sets receive. Knows no files and no arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trtlab.config.algorithms import Algorithm
from trtlab.config.quant import QuantConfig
from trtlab.model.blocks import SITES
from trtlab.model.scales import FLOAT8, ToOriginal, ToQuantized, unpack_int4


def tensor_bytes(part: object) -> int:
    """Bytes of all tensors in a weight, with its scales and bias."""
    if isinstance(part, Tensor):
        return part.nbytes
    if not dataclasses.is_dataclass(part):
        return 0
    return sum(tensor_bytes(getattr(part, field.name)) for field in dataclasses.fields(part))


class _Sized:
    """Shape and bytes of a quantized linear."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the integers, all scales and the bias."""
        return tensor_bytes(self)


@dataclass(frozen=True)
class WeightOnly(_Sized):
    """Integer weight with scales and an unquantized input: ``y = (x * prequant) W^T + b``.

    ``weight`` is int8 ``[out, in]``, or uint8 ``[ceil(out / 2), in]`` with two INT4 rows a byte; ``scale`` is
    ``[out, groups]`` to the original; ``prequant`` ``[in]`` is AWQ's factor on the input, None for other algorithms.
    """

    name: str
    weight: Tensor
    scale: ToOriginal
    bias: Tensor | None = None
    prequant: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, unpacked."""
        return self.scale.value.shape[0], self.weight.shape[1]

    @property
    def integers(self) -> Tensor:
        """int8 ``[out, in]``, unpacked."""
        return unpack_int4(self.weight, self.scale.value.shape[0]) if self.weight.dtype == torch.uint8 else self.weight


@dataclass(frozen=True)
class Int8Linear(_Sized):
    """INT8 weight and INT8 input: the INT32 product times ``output_scale`` ``[out]`` or ``[1]``.

    The input is divided by ``smoother`` or multiplied by ``prequant`` ``[in]`` and then quantized with
    ``input_scale``. With ``input_scale=None`` each token gets its own scale at run time, which multiplies the product
    too.
    """

    name: str
    weight: Tensor  # int8 [out, in]
    output_scale: ToOriginal
    input_scale: ToOriginal | ToQuantized | None = None
    bias: Tensor | None = None
    smoother: Tensor | None = None
    prequant: Tensor | None = None


@dataclass(frozen=True)
class Float8Linear(_Sized):
    """E4M3 weight ``[out, in]`` and E4M3 input, with one scale for each of the two."""

    name: str
    weight: Tensor
    weight_scale: ToOriginal
    input_scale: ToOriginal
    bias: Tensor | None = None


@dataclass(frozen=True)
class Int4Float8Linear(_Sized):
    """AWQ's INT4 groups, converted to E4M3 with ``weight_scale``; the input times ``prequant`` is E4M3 too."""

    name: str
    groups: WeightOnly
    weight_scale: ToOriginal
    input_scale: ToOriginal
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, unpacked."""
        return self.groups.shape


Quantized = WeightOnly | Int8Linear | Float8Linear | Int4Float8Linear


@dataclass(frozen=True)
class KvScales:
    """Storage of one layer's K and V: ``dtype`` int8 or E4M3, and scales ``[1]`` or ``[kv_heads]``."""

    dtype: torch.dtype
    keys: ToOriginal
    values: ToOriginal


@dataclass(frozen=True)
class _LinearTensors:
    """One linear's tensors: ``own(suffix)`` belongs to the linear, ``layer(name)`` to the layer."""

    name: str
    linear: str
    layer: Callable[[str], Tensor]
    bias: Tensor | None

    def own(self, suffix: str) -> Tensor:
        return self.layer(f"{self.linear}.{suffix}")

    def integers(self, algorithm: Algorithm) -> Tensor:
        """The weight; packed INT4, which files store under the dtype int8, as uint8."""
        stored = self.own("weight")
        return stored.view(torch.uint8) if algorithm.packed else stored


def quantized_linear(
    algorithm: Algorithm, linear: str, name: str, layer: Callable[[str], Tensor], bias: Tensor | None
) -> Quantized:
    """The typed weight of one linear; ``layer`` gives a tensor by its name within the layer, or the head's."""
    return _LINEARS[algorithm.family](algorithm, _LinearTensors(name, linear, layer, bias))


def _weight_only(algorithm: Algorithm, tensors: _LinearTensors) -> Quantized:
    scale = tensors.own("per_channel_scale")
    by_group = ToOriginal(scale[:, None] if scale.dim() == 1 else scale)  # [out, groups]: a group a rank
    return WeightOnly(tensors.name, tensors.integers(algorithm), by_group, tensors.bias)


def _smoothquant(algorithm: Algorithm, tensors: _LinearTensors) -> Quantized:
    to_float = tensors.own("per_channel_scale")[0]
    static = None if algorithm.per_token else ToQuantized(tensors.layer(SITES[tensors.linear].input_scale))
    if not algorithm.per_token:
        to_float = to_float * tensors.own("act_scale")[0]
    smoother = None if SITES[tensors.linear].norm_before is not None else tensors.own("smoother")[0]
    return Int8Linear(tensors.name, tensors.own("weight"), ToOriginal(to_float), static, tensors.bias, smoother)


def _smoothquant_modelopt(algorithm: Algorithm, tensors: _LinearTensors) -> Quantized:
    activation = tensors.own("activation_scaling_factor")
    return Int8Linear(
        tensors.name,
        tensors.own("weight"),
        ToOriginal(activation * tensors.own("weights_scaling_factor")),
        ToOriginal(activation),
        tensors.bias,
        prequant=tensors.own("prequant_scaling_factor"),
    )


def _fp8(algorithm: Algorithm, tensors: _LinearTensors) -> Quantized:
    return Float8Linear(
        tensors.name,
        tensors.own("weight"),
        ToOriginal(tensors.own("weights_scaling_factor")),
        ToOriginal(tensors.own("activation_scaling_factor")),
        tensors.bias,
    )


def _awq(algorithm: Algorithm, tensors: _LinearTensors) -> WeightOnly:
    scale = ToOriginal(tensors.own("weights_scaling_factor"))
    prequant = tensors.own("prequant_scaling_factor")
    return WeightOnly(tensors.name, tensors.integers(algorithm), scale, tensors.bias, prequant)


def _awq_fp8(algorithm: Algorithm, tensors: _LinearTensors) -> Quantized:
    return Int4Float8Linear(
        tensors.name,
        dataclasses.replace(_awq(algorithm, tensors), bias=None),
        ToOriginal(tensors.own("weights_scaling_factor_2")),
        ToOriginal(tensors.own("activation_scaling_factor")),
        tensors.bias,
    )


_LINEARS: dict[str, Callable[[Algorithm, _LinearTensors], Quantized]] = {
    "weight_only": _weight_only,
    "smoothquant": _smoothquant,
    "smoothquant_modelopt": _smoothquant_modelopt,
    "fp8": _fp8,
    "awq": _awq,
    "awq_fp8": _awq_fp8,
}


def kv_cache_scales(quant: QuantConfig, layer: Callable[[str], Tensor]) -> KvScales | None:
    """The scales of one layer's cache; ``layer`` gives a tensor by its name within the layer."""
    algorithm = quant.kv_algorithm
    if algorithm is None:
        return None
    scales = [ToOriginal(layer(name)) for name in algorithm.tensors]  # one for both, or one each
    return KvScales(torch.int8 if quant.kv_cache_quant_algo == "INT8" else FLOAT8, scales[0], scales[-1])
