"""The typed weights of quantized linears and caches, as op sets meet them. Knows no files and no arithmetic."""

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
    """Bytes of all tensors in a weight, its scales and bias among them."""
    if isinstance(part, Tensor):
        return part.nbytes
    if not dataclasses.is_dataclass(part):
        return 0
    return sum(tensor_bytes(getattr(part, field.name)) for field in dataclasses.fields(part))


class _Sized:
    """What every quantized linear tells of its size."""

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
    """Integers and scales; activations stay as they are: ``y = (x * prequant) W^T + b``.

    ``weight`` is int8 ``[out, in]``, or uint8 ``[ceil(out / 2), in]`` with two INT4 rows a byte; ``scale`` is
    ``[out, groups]`` to the original; ``prequant`` ``[in]`` belongs to AWQ.
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

    The input is divided by ``smoother`` or multiplied by ``prequant`` ``[in]`` and quantized with ``input_scale``;
    with None each token has its own scale at run time, and multiplies the product too.
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
    """E4M3 weight ``[out, in]`` and E4M3 input, one scale each."""

    name: str
    weight: Tensor
    weight_scale: ToOriginal
    input_scale: ToOriginal
    bias: Tensor | None = None


@dataclass(frozen=True)
class Int4Float8Linear(_Sized):
    """AWQ's INT4 groups, read as E4M3 with ``weight_scale``; the input, times ``prequant``, is E4M3 too."""

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
    """How one layer's K and V are stored: ``dtype`` int8 or E4M3, scales ``[1]`` or ``[kv_heads]``."""

    dtype: torch.dtype
    keys: ToOriginal
    values: ToOriginal


@dataclass(frozen=True)
class _Found:
    """One linear's tensors: ``of(suffix)`` is its own, ``layer(name)`` one that it shares with its layer."""

    name: str
    linear: str
    layer: Callable[[str], Tensor]
    bias: Tensor | None

    def of(self, suffix: str) -> Tensor:
        return self.layer(f"{self.linear}.{suffix}")


def quantized_linear(
    algorithm: Algorithm, linear: str, name: str, layer: Callable[[str], Tensor], bias: Tensor | None
) -> Quantized:
    """The typed weight of one linear; ``layer`` gives a tensor by its name within the layer."""
    return _LINEARS[algorithm.family](algorithm, _Found(name, linear, layer, bias))


def _weight_only(algorithm: Algorithm, found: _Found) -> Quantized:
    scale = ToOriginal(found.of("per_channel_scale")[:, None])
    return WeightOnly(found.name, found.of("weight"), scale, found.bias)


def _smoothquant(algorithm: Algorithm, found: _Found) -> Quantized:
    to_float = found.of("per_channel_scale")[0]
    static = None if algorithm.per_token else ToQuantized(found.layer(SITES[found.linear].input_scale))
    if not algorithm.per_token:
        to_float = to_float * found.of("act_scale")[0]
    smoother = None if SITES[found.linear].norm_before is not None else found.of("smoother")[0]
    return Int8Linear(found.name, found.of("weight"), ToOriginal(to_float), static, found.bias, smoother)


def _smoothquant_modelopt(algorithm: Algorithm, found: _Found) -> Quantized:
    activation = found.of("activation_scaling_factor")
    return Int8Linear(
        found.name,
        found.of("weight"),
        ToOriginal(activation * found.of("weights_scaling_factor")),
        ToOriginal(activation),
        found.bias,
        prequant=found.of("prequant_scaling_factor"),
    )


def _fp8(algorithm: Algorithm, found: _Found) -> Quantized:
    return Float8Linear(
        found.name,
        found.of("weight"),
        ToOriginal(found.of("weights_scaling_factor")),
        ToOriginal(found.of("activation_scaling_factor")),
        found.bias,
    )


def _awq(algorithm: Algorithm, found: _Found) -> WeightOnly:
    scale = ToOriginal(found.of("weights_scaling_factor"))
    return WeightOnly(found.name, found.of("weight"), scale, found.bias, found.of("prequant_scaling_factor"))


def _awq_fp8(algorithm: Algorithm, found: _Found) -> Quantized:
    return Int4Float8Linear(
        found.name,
        dataclasses.replace(_awq(algorithm, found), bias=None),
        ToOriginal(found.of("weights_scaling_factor_2")),
        ToOriginal(found.of("activation_scaling_factor")),
        found.bias,
    )


_LINEARS: dict[str, Callable[[Algorithm, _Found], Quantized]] = {
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
