"""Weight-only INT8 and INT4: one scale for each output channel, largest magnitude over 128 or 8. Reads no texts.

A folder stores it in one of two forms. ``plain`` has the unquantized weights, which TensorRT-LLM quantizes when it
builds; ``integers`` has the integers and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from trtlab.config.model import ModelConfig
from trtlab.errors import CheckpointError
from trtlab.model.blocks import SITES
from trtlab.model.names import source_name, split_layer_name
from trtlab.model.quantized_specs import weight_only_ranks
from trtlab.model.scales import INT4, INT8, IntRange, ToOriginal, amax, half_away, pack_int4, positive, to_int
from trtlab.model.tensor_specs import plain_linears, quantized_linears, tensor_specs
from trtlab.quantize.layer import CalibratedLayer, QuantizedLayer, require_finite
from trtlab.storage.lazy import LazyTensor

RANGES: dict[int, IntRange] = {8: INT8, 4: INT4}


def weight_only(weight: Tensor, bits: int) -> tuple[Tensor, ToOriginal]:
    """``[out, in]`` to int8 storage ``[out, in]`` and scales ``[out]`` in float32.

    ``scale = amax / 2^(bits - 1)``, ties away from zero. A largest magnitude that is positive saturates one step below
    its value; a negative one is exact. Source: TensorRT-LLM's ``symmetric_quantize``.
    """
    scale = positive(amax(weight.float(), 1)) * 2.0 ** (1 - bits)
    q = to_int(weight.float(), ToOriginal(scale[:, None]), RANGES[bits], half_away)
    return q, ToOriginal(scale)


def quantize_layer(layer: CalibratedLayer) -> QuantizedLayer:
    """Each linear as ``weight`` and ``per_channel_scale`` in the model's dtype.

    Integers are computed with the float32 scale; the stored scale is then rounded to the model's dtype. With
    ``scale_ranks`` the parts of a row that ranks hold are quantized each on its own.
    """
    tensors: dict[str, Tensor] = {}
    for linear in layer.linears:
        stored = _stored(layer.config, linear, layer.weight(linear))
        tensors[f"{linear}.weight"], tensors[f"{linear}.per_channel_scale"] = stored
    return QuantizedLayer(tensors)


def _stored(config: ModelConfig, linear: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and scales of one linear as they are stored; ``linear`` is its name within the layer."""
    algorithm = config.quantization.algorithm
    assert algorithm is not None and algorithm.has_plain_form, config.quantization
    ranks = weight_only_ranks(config, SITES[linear])
    parts = [weight_only(part, algorithm.weight_bits) for part in weight.chunk(ranks, 1)]
    q = torch.cat([integers for integers, _ in parts], 1)
    scale = ToOriginal(torch.stack([scale.value for _, scale in parts], 1)).stored(config.torch_dtype)
    return pack_int4(q).view(torch.int8) if algorithm.packed else q, scale[:, 0] if ranks == 1 else scale


def from_plain(config: ModelConfig, plain: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of a weight-only model from its plain form; a linear is quantized each time that it is read.

    Args:
        config: The weight-only model.
        plain: Its tensors with unquantized linears.
    """
    specs = tensor_specs(config)
    tensors = {name: plain[name] for name in specs if name in plain}
    for name in quantized_linears(config):
        for place, suffix in enumerate(("weight", "per_channel_scale")):
            spec = specs[f"{name}.{suffix}"]
            weight = f"{name}.weight"
            read = partial(_read_stored, config, weight, plain[source_name(weight, plain)], place)
            tensors[f"{name}.{suffix}"] = LazyTensor(spec.shape, spec.dtype or config.torch_dtype, read)
    return {name: tensors[name] for name in specs}


def _part(name: str) -> str:
    """``mlp.fc`` of a linear's full name, or of its weight's; the head has the same name everywhere."""
    place = split_layer_name(name)
    return (name if place is None else place[1]).removesuffix(".weight")


def _read_stored(config: ModelConfig, name: str, weight: LazyTensor, place: int) -> Tensor:
    values = weight.read().float()
    require_finite(name, values)
    return _stored(config, _part(name), values)[place]


def to_plain(
    config: ModelConfig, tensors: Mapping[str, LazyTensor], source: Mapping[str, LazyTensor] | None
) -> dict[str, LazyTensor]:
    """The plain form: the quantized linears as they are in ``source``, all else as in ``tensors``.

    Dequantized integers would not do: quantized again they give other integers and other scales.

    Args:
        config: The weight-only model.
        tensors: Its tensors, with integers.
        source: The unquantized tensors; None where they are not at hand.

    Raises:
        CheckpointError: There is no source.
    """
    if source is None:
        raise CheckpointError(
            "the plain form needs the unquantized weights, and this checkpoint has integers alone",
            remedy='quantize the source again, and save that with weight_only="plain"',
        )
    linears = {f"{name}.weight" for name in quantized_linears(config)}
    return {name: (source if name in linears else tensors)[name] for name in tensor_specs(plain_linears(config))}
