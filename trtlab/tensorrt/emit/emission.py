"""Emits one rank's decoder into a TensorRT network, which the plan builder compiles and the interpreter runs."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Any

import torch

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.interrupts import hold_interrupts
from trtlab.model.decoder import decoder
from trtlab.model.rope import rotary_table
from trtlab.model.weights import rank_weights
from trtlab.ops.named import NamedOps
from trtlab.tensorrt import dtypes
from trtlab.tensorrt.bindings import BATCH, TOKENS, WANTED, Binding, Bindings, bindings
from trtlab.tensorrt.emit.ops import TensorRTOps
from trtlab.tensorrt.library import Library, library
from trtlab.tensorrt.log import log
from trtlab.tensorrt.read.interpreter import LayerTable, Network


@dataclass(frozen=True)
class Emission:
    """An emitted network, with its builder, bindings and weights.

    ``constants`` keeps every weight alive, because the network has only pointers. ``taps`` maps a result of the
    decoder, such as ``transformer.layers.0.mlp.fc`` or ``...mlp.fc:activation``, to the network's tensor;
    ``NamedOps(TorchOps)`` uses the same names.
    """

    library: Library
    builder: Any = field(repr=False)
    network: Any = field(repr=False)
    bindings: Bindings = field(repr=False)
    build: BuildConfig
    constants: abc.Mapping[str, torch.Tensor] = field(repr=False)
    taps: abc.Mapping[str, str] = field(repr=False)

    def read(self) -> Network:
        """Read the network back, to inspect it and to run it with torch."""
        return Network.read(self.library.trt, self.network, self.constants)

    def table(self, *, batch: int = 1, tokens: int = 1) -> LayerTable:
        """One row per layer, in order: name, kind, precision, shape, weight bytes, and FLOPs for these tokens.

        Only shapes are computed; each row of the batch gives the logits of one token.
        """
        dims = {BATCH: batch, TOKENS: tokens, WANTED: 1}
        return self.read().table({binding.name: binding.sized(dims) for binding in self.bindings.inputs})


def emit(
    config: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    rank: int,
    weights: abc.Mapping[str, torch.Tensor],
    *,
    op_set: type[TensorRTOps] = TensorRTOps,
) -> Emission:
    """Emit the decoder of one rank as a strongly typed network in ``build``'s dtype.

    Args:
        config: The model.
        build: The engine's bounds.
        mapping: How the model is split over ranks.
        rank: The rank to emit.
        weights: The rank's tensors by name. They stay unchanged; those of another dtype are converted to copies.
        op_set: A subclass may emit some verb in another way, to try it or to plant an error for ``compare``.

    Raises:
        MissingDependency: without TensorRT.
    """
    build = build.resolve(config)
    trt_library = library()
    with hold_interrupts():  # TensorRT logs while layers are added, and in its callback an interrupt would be lost
        return _emit(trt_library, config, build, mapping, rank, weights, op_set)


def _emit(
    trt_library: Library,
    config: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    rank: int,
    weights: abc.Mapping[str, torch.Tensor],
    op_set: type[TensorRTOps],
) -> Emission:
    assert build.dtype is not None, "the build config is not resolved: it has no dtype"
    trt = trt_library.trt
    builder = trt.Builder(log(trt).native)
    network = builder.create_network(0)
    table = bindings(config, build, mapping, rank)
    inputs = {binding.name: add_input(trt, network, binding) for binding in table.inputs}
    parts = rank_weights(config, mapping, rank, weights)
    angles = rotary_table(config, build.seq_len) if config.uses_rotary else None
    rotary = None if angles is None else (angles.cos, angles.sin)
    scales = [layer.kv_scales for layer in parts.layers if layer.kv_scales is not None]
    ops = op_set(trt, network, inputs, build.dtype, rotary, mapping.tp_group(rank), scales)
    tensors: dict[str, Any] = {}
    result = decoder(NamedOps(ops, tensors.__setitem__), config, parts, inputs[table.first.name])
    result.name = table.result.name
    for tensor in (result, *ops.presents):
        network.mark_output(tensor)
    taps = {name: str(tensor.name) for name, tensor in tensors.items()}
    return Emission(trt_library, builder, network, table, build, ops.constants, taps)


def add_input(trt: Any, network: Any, binding: Binding) -> Any:
    """Declare one input; its dimensions get names, so that TensorRT knows which dimensions are equal."""
    tensor = network.add_input(binding.name, dtypes.to_trt(trt, binding.dtype), trt.Dims(binding.declared))
    for axis, size in enumerate(binding.shape):
        if isinstance(size, str):
            tensor.set_dimension_name(axis, size)
    return tensor
