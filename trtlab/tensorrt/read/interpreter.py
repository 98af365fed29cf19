"""Network: a TensorRT network to inspect and to run with torch, one layer at a time. Needs no GPU.

It runs exactly what TensorRT compiles: every layer is read back from the ``INetworkDefinition``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trtlab.card import Shown
from trtlab.errors import EngineError
from trtlab.parallel.comm import Comm
from trtlab.tensorrt import dtypes
from trtlab.tensorrt.read import kernels
from trtlab.tensorrt.read.readback import NetworkLayer, NetworkTensor, read_layer, read_tensor


@dataclass(frozen=True)
class LayerRow:
    """One row of a layer table: a layer's name, kind and precision, the shape of its result, its bytes and FLOPs."""

    name: str
    kind: str
    precision: str
    shape: tuple[int, ...]
    weight_bytes: int
    flops: int


@dataclass(frozen=True, repr=False)
class LayerTable(Shown):
    """One row per layer of a network, in the order in which they run; a sequence."""

    rows: tuple[LayerRow, ...]

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LayerRow:
        return self.rows[index]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants."""
        return sum(row.weight_bytes for row in self.rows)

    @property
    def flops(self) -> int:
        """FLOPs of one run."""
        return sum(row.flops for row in self.rows)

    @property
    def mix(self) -> dict[str, int]:
        """The number of layers of each kind, the most frequent first."""
        return dict(Counter(row.kind for row in self.rows).most_common())


@dataclass(frozen=True, repr=False)
class Network(Shown):
    """The layers of a network in the order in which they run, with its inputs and outputs."""

    layers: tuple[NetworkLayer, ...]
    inputs: tuple[NetworkTensor, ...]
    outputs: tuple[NetworkTensor, ...]
    # What keeps the constants' memory alive: they are views of the emitted network's.
    alive: object = field(default=None, repr=False, compare=False)

    @classmethod
    def read(cls, trt: Any, network: Any, constants: Mapping[str, torch.Tensor] | None = None) -> Network:
        """Read an ``INetworkDefinition`` back.

        Args:
            trt: TensorRT's module.
            network: The network definition.
            constants: Tensors by name of their constant layer, for types that TensorRT does not return: BF16, FP8, and
                INT4, which is packed two values per byte.

        Raises:
            EngineError: for a kind of layer that cannot be read back here.
        """
        table = constants or {}
        layers = tuple(read_layer(trt, network.get_layer(i), table) for i in range(network.num_layers))
        inputs = tuple(t for i in range(network.num_inputs) if (t := read_tensor(network.get_input(i))))
        outputs = tuple(t for i in range(network.num_outputs) if (t := read_tensor(network.get_output(i))))
        return cls(layers, inputs, outputs, (network, table))

    def __iter__(self) -> Iterator[NetworkLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> NetworkLayer:
        """The layer of that name, or the one that writes the tensor of that name."""
        for layer in self.layers:
            if name == layer.name or any(name == output.name for output in layer.outputs):
                return layer
        raise EngineError(f"the network has no layer or tensor named {name!r}", remedy="network.layers lists them")

    def run(
        self, inputs: Mapping[str, torch.Tensor], keep: Iterable[str] = (), comm: Comm | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the network once.

        Args:
            inputs: All inputs by name. A cache is written in place, and its output is the same tensor.
            keep: Names of more tensors to return, each by its own name or by its layer's.
            comm: The other ranks of a network that is split; all of them must run at the same time.

        Returns:
            The outputs, and the tensors in ``keep``, by name.

        Raises:
            EngineError: when an input is missing, unknown or of another type or shape.
        """
        wanted = {name: self.tensor_name(name) for name in keep}
        wanted |= {output.name: output.name for output in self.outputs}
        kept = {name: inputs[name] for name in wanted.values() if name in inputs}
        for layer, result in self.steps(inputs, comm):
            if layer.outputs[0].name in wanted.values():
                kept[layer.outputs[0].name] = result
        return {name: kept[tensor] for name, tensor in wanted.items()}

    def steps(
        self, inputs: Mapping[str, torch.Tensor], comm: Comm | None = None
    ) -> Iterator[tuple[NetworkLayer, torch.Tensor]]:
        """Run layer by layer and yield each layer with its result; a tensor is freed after its last use."""
        self.check_inputs(inputs)
        last = {tensor.name: i for i, layer in enumerate(self.layers) for tensor in layer.inputs if tensor}
        tensors = dict(inputs)
        for i, layer in enumerate(self.layers):
            operands = [None if tensor is None else tensors[tensor.name] for tensor in layer.inputs]
            result = kernels.compute(layer, operands, comm)
            check_result(layer, result)
            tensors[layer.outputs[0].name] = result
            yield layer, result
            for name in {tensor.name for tensor in layer.inputs if tensor}:
                if last[name] == i:
                    tensors.pop(name, None)

    def table(self, shapes: Mapping[str, tuple[int, ...]]) -> LayerTable:
        """One row per layer for inputs of the given shapes; only shapes are computed, no numbers."""
        meta = Network(tuple(on_meta(layer) for layer in self.layers), self.inputs, self.outputs)
        inputs = {t.name: empty(t, shapes.get(t.name, t.shape)) for t in self.inputs}
        sizes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        rows = []
        for layer, result in meta.steps(inputs):
            sizes[layer.outputs[0].name] = tuple(result.shape)
            operands = [() if t is None else sizes[t.name] for t in layer.inputs]
            work = flops(layer, operands, tuple(result.shape))
            rows.append(
                LayerRow(layer.name, layer.kind, layer.precision, tuple(result.shape), layer.weight_bytes, work)
            )
        return LayerTable(tuple(rows))

    def tensor_name(self, name: str) -> str:
        """The tensor that a name refers to: an input, a tensor, or the result of a layer."""
        if any(name == tensor.name for tensor in self.inputs):
            return name
        return self[name].outputs[0].name

    def check_inputs(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Refuse inputs that are missing, unknown, or of another type or shape than the network declares."""
        declared = {tensor.name: tensor for tensor in self.inputs}
        if set(inputs) != set(declared):
            missing, unknown = sorted(set(declared) - set(inputs)), sorted(set(inputs) - set(declared))
            raise EngineError(
                f"inputs do not match the network: missing {missing}, unknown {unknown}",
                remedy="network.inputs lists them",
            )
        for name, tensor in declared.items():
            shape, dtype = tuple(inputs[name].shape), dtypes.from_torch(inputs[name].dtype)
            if dtype != tensor.dtype or not fits(shape, tensor.shape):
                raise EngineError(
                    f"input {name!r} does not fit",
                    got=f"{dtype} {list(shape)}",
                    expected=f"{tensor.dtype} {list(tensor.shape)}",
                )


def fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """Whether a shape has the declared rank and sizes, where -1 means any size."""
    return len(shape) == len(declared) and all(
        expected in (-1, size) for size, expected in zip(shape, declared, strict=True)
    )


def check_result(layer: NetworkLayer, result: torch.Tensor) -> None:
    """Raise AssertionError when our kernel and TensorRT's shape inference disagree: one of the two is wrong."""
    declared = layer.outputs[0]
    assert fits(tuple(result.shape), declared.shape), (layer.name, tuple(result.shape), declared)
    assert result.dtype == dtypes.to_torch(declared.dtype), (layer.name, result.dtype, declared)


def on_meta(layer: NetworkLayer) -> NetworkLayer:
    """The same layer, a constant with its shape but without its numbers."""
    if layer.value is None:
        return layer
    return NetworkLayer(layer.name, layer.kind, layer.inputs, layer.outputs, {}, layer.metadata, layer.value.to("meta"))


def empty(tensor: NetworkTensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor without numbers; every dimension of its shape must be known."""
    if min(shape, default=0) < 0:
        raise EngineError(f"input {tensor.name!r} has no fixed shape", got=list(shape), remedy="add it to shapes=")
    return torch.empty(shape, dtype=dtypes.to_torch(tensor.dtype), device="meta")


def flops(layer: NetworkLayer, inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """FLOPs of a layer: 2 per multiply-add of a product, 1 per element of any other floating-point result."""
    if layer.kind == "matrix_multiply":
        inner = inputs[0][-2 if layer.attributes["op0"] == "transpose" else -1]
        return 2 * inner * math.prod(output)
    if layer.kind == "attention_input":
        keys = inputs[1][2]
        return 2 * 2 * math.prod(output) * keys  # Q Kᵀ and P V
    moves = ("constant", "shuffle", "slice", "concatenation", "gather", "select", "identity", "kv_cache_update")
    if layer.kind in (*moves, "attention_output", "dist_collective") or layer.precision not in dtypes.FLOATS:
        return 0
    return math.prod(output)
