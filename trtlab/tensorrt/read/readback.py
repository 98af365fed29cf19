"""Reads an ``INetworkDefinition`` back into plain Python: layers, their tensors and their parameters. Runs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trtlab.errors import EngineError
from trtlab.tensorrt import dtypes

# Kind of layer -> the class that has its parameters, and the parameters that are read. The class must match the kind
# exactly: a wrong one crashes the process. A kind that is not listed here is therefore never cast.
PARAMETERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "ACTIVATION": ("IActivationLayer", ("type", "alpha", "beta")),
    "ATTENTION_INPUT": ("IAttentionInputLayer", ()),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", ()),
    "CAST": ("ICastLayer", ()),
    "CONCATENATION": ("IConcatenationLayer", ("axis",)),
    "CONSTANT": ("IConstantLayer", ()),
    "DEQUANTIZE": ("IDequantizeLayer", ("axis",)),
    "DIST_COLLECTIVE": ("IDistCollectiveLayer", ("num_ranks",)),
    "ELEMENTWISE": ("IElementWiseLayer", ("op",)),
    "GATHER": ("IGatherLayer", ("axis", "mode", "num_elementwise_dims")),
    "IDENTITY": ("IIdentityLayer", ()),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", ("cache_mode", "update_form")),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", ("op0", "op1")),
    "QUANTIZE": ("IQuantizeLayer", ("axis",)),
    "REDUCE": ("IReduceLayer", ("op", "axes", "keep_dims")),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", ("interleaved", "rotary_embedding_dim")),
    "SELECT": ("ISelectLayer", ()),
    "SHUFFLE": ("IShuffleLayer", ("first_transpose", "reshape_dims", "second_transpose", "zero_is_placeholder")),
    "SLICE": ("ISliceLayer", ("start", "shape", "stride", "axes", "mode")),
    "SOFTMAX": ("ISoftMaxLayer", ("axes",)),
    "UNARY": ("IUnaryLayer", ("op",)),
}


@dataclass(frozen=True)
class NetworkTensor:
    """A tensor of the network: its name, its type as a word, and its shape, with -1 where a profile decides."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class NetworkLayer:
    """One layer of a network; ``attributes`` are its parameters, ``value`` a constant's numbers."""

    name: str
    kind: str
    inputs: tuple[NetworkTensor | None, ...]
    outputs: tuple[NetworkTensor, ...]
    attributes: Mapping[str, Any]
    metadata: str = ""
    value: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def precision(self) -> str:
        """The type of the layer's result."""
        return self.outputs[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer's result, with -1 where a profile decides."""
        return self.outputs[0].shape

    @property
    def weight_bytes(self) -> int:
        """Bytes of a constant in the plan; 0 for any other layer."""
        if self.value is None:
            return 0
        elements = 1
        for size in self.shape:
            elements *= size
        return dtypes.nbytes(self.precision, elements)


def read_layer(trt: Any, layer: Any, constants: Mapping[str, torch.Tensor]) -> NetworkLayer:
    """Read one layer; ``constants`` has by layer name the weights that TensorRT does not return."""
    # The kind must be read first: once cast, an activation's .type is its ActivationType.
    kind = str(layer.type.name)
    if kind not in PARAMETERS:
        raise EngineError(
            f"layer {layer.name!r} is a {kind}, which cannot be read back here",
            expected=", ".join(sorted(PARAMETERS)),
            remedy="add it to PARAMETERS in trtlab/tensorrt/read/readback.py and to KERNELS in kernels.py",
        )
    name, metadata = str(layer.name), str(layer.metadata)
    inputs = tuple(read_tensor(layer.get_input(i)) for i in range(layer.num_inputs))
    outputs = tuple(output for i in range(layer.num_outputs) if (output := read_tensor(layer.get_output(i))))
    class_name, parameters = PARAMETERS[kind]
    layer.__class__ = getattr(trt, class_name)
    if kind in ("SHUFFLE", "SLICE") and len(inputs) > 1:
        raise EngineError(
            f"layer {name!r} takes its shape from a tensor",
            expected="fixed dimensions, with 0 and -1 where a profile decides",
        )
    attributes = {parameter: plain(getattr(layer, parameter)) for parameter in parameters}
    value = None
    if kind == "SHUFFLE" and inputs[0] is not None:  # TensorRT's permutations always have eight axes
        attributes["first_transpose"] = attributes["first_transpose"][: len(inputs[0].shape)]
        attributes["second_transpose"] = attributes["second_transpose"][: len(outputs[0].shape)]
    elif kind == "CONSTANT":
        value = constant(layer, name, outputs[0], constants)
    elif kind in ("ATTENTION_INPUT", "ATTENTION_OUTPUT"):
        attributes |= attention(layer.attention)
    elif kind == "DIST_COLLECTIVE":
        attributes |= collective(name, metadata)
    return NetworkLayer(name, kind.lower(), inputs, outputs, attributes, metadata, value)


def read_tensor(tensor: Any) -> NetworkTensor | None:
    """Read the name, type and shape of an ``ITensor``; None for an optional input that is not set."""
    if tensor is None:
        return None
    return NetworkTensor(str(tensor.name), dtypes.word(tensor.dtype), tuple(tensor.shape))


def plain(value: Any) -> Any:
    """A parameter as a word, a number or a tuple of numbers."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "name"):
        return str(value.name).lower()
    return tuple(int(number) for number in value)


def constant(layer: Any, name: str, output: NetworkTensor, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A constant's values, with INT4 unpacked: from the network if TensorRT returns them, else from ``constants``."""
    weights = layer.weights
    if hasattr(weights, "__array__"):  # numpy on the same memory; BF16, FP8 and INT4 are returned without data
        return torch.from_numpy(weights).reshape(output.shape)
    if name not in constants:
        raise EngineError(
            f"constant {name!r} is {output.dtype}, which TensorRT does not return",
            expected="its tensor in constants",
            remedy="pass constants={layer name: tensor}",
        )
    data = constants[name].detach()
    if output.dtype == "int4":
        return dtypes.unpack_int4(data, output.shape)
    return data.reshape(output.shape)


def attention(boundary: Any) -> dict[str, Any]:
    """The parameters of an attention, from one of the two layers (input or output) that stand for it."""
    if boundary.key_value_lengths is not None or boundary.query_lengths is not None:
        raise EngineError(f"attention {boundary.name!r} has query or key lengths", expected="a mask and padded tensors")
    return {
        "mask": None if boundary.mask is None else str(boundary.mask.name),
        "causal_kind": plain(boundary.causal_kind),
        "norm_op": plain(boundary.norm_op),
        "query_form": plain(boundary.query_form),
        "decomposable": bool(boundary.decomposable),
    }


def collective(name: str, metadata: str) -> dict[str, Any]:
    """Operation and reduction of a collective, from the JSON in its metadata: TensorRT does not return them."""
    try:
        parsed = json.loads(metadata)
        return {"operation": str(parsed["operation"]), "reduce": parsed.get("reduce")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"the metadata of collective {name!r} does not name its operation",
            got=repr(metadata),
            expected='metadata such as {"operation": "all_reduce", "reduce": "sum"}',
        ) from error
