"""A network built by hand, layer by layer, for the tests of what reads and runs networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trtlab.tensorrt import dtypes
from trtlab.tensorrt.interpreter import Network
from trtlab.tensorrt.library import library


class ByHand:
    """TensorRT's own calls with a little less writing; the meaning of each layer stays TensorRT's."""

    def __init__(self) -> None:
        self.trt = library().trt
        self.builder = self.trt.Builder(self.trt.Logger(self.trt.Logger.ERROR))
        self.net = self.builder.create_network(0)
        self.constants: dict[str, torch.Tensor] = {}

    def input(self, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        return self.net.add_input(name, dtypes.to_trt(self.trt, dtype), self.trt.Dims(shape))

    def constant(self, name: str, tensor: torch.Tensor, dtype: str | None = None, shape: Any = None) -> Any:
        self.constants[name] = tensor.contiguous()
        shape = tuple(tensor.shape) if shape is None else shape
        kind = dtypes.to_trt(self.trt, dtype or dtypes.from_torch(tensor.dtype))
        count = torch.Size(shape).numel()
        weights = self.trt.Weights(kind, self.constants[name].data_ptr(), count)
        layer = self.net.add_constant(self.trt.Dims(shape), weights)
        layer.name = name
        return layer.get_output(0)

    def output(self, layer: Any, name: str = "y") -> None:
        layer.get_output(0).name = name
        self.net.mark_output(layer.get_output(0))

    def read(self) -> Network:
        return Network.read(self.trt, self.net, self.constants)

    def run(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.read().run(inputs)["y"]


@pytest.fixture
def by_hand() -> ByHand:
    return ByHand()


@pytest.fixture(scope="session")
def new_network() -> type[ByHand]:
    """For property tests, which need a fresh network for each example."""
    return ByHand
