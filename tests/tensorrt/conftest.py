"""Networks built by hand, layer by layer, and what runs a small model beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.parallel.step_inputs import StepInputs
from trtlab.runtime.torch_backend import torch_backend
from trtlab.tensorrt import dtypes
from trtlab.tensorrt.library import library
from trtlab.tensorrt.log import log
from trtlab.tensorrt.read.interpreter import Network

from ..models import small_config, telling_weights


class ByHand:
    """TensorRT's own calls with a little less writing; the meaning of each layer stays TensorRT's."""

    def __init__(self) -> None:
        self.trt = library().trt
        self.builder = self.trt.Builder(log(self.trt).native)
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


SMALL = small_config(vocab_size=97, max_position_embeddings=128)
BUILD = BuildConfig(max_batch_size=3, max_input_len=24, max_seq_len=40, max_num_tokens=32)


class TorchBySlot:
    """Torch on a CPU for steps that name no blocks: each slot has neighbouring blocks of its own."""

    def __init__(
        self,
        config: ModelConfig,
        ranks: dict[str, torch.Tensor] | Sequence[dict[str, torch.Tensor]],
        build: BuildConfig = BUILD,
        mapping: Mapping | None = None,
    ) -> None:
        ranks = [ranks] if isinstance(ranks, dict) else ranks
        build = build.resolve(config)
        self._ranks = torch_backend(config, build, mapping or Mapping(), ranks, torch.device("cpu")).ranks
        self._blocks = -(-build.seq_len // build.tokens_per_block)
        self.close = self._ranks.close

    def run(self, step: StepInputs) -> torch.Tensor:
        own = {chunk.slot: range(chunk.slot * self._blocks, (chunk.slot + 1) * self._blocks) for chunk in step.chunks}
        chunks = tuple(chunk._replace(blocks=tuple(own[chunk.slot])) for chunk in step.chunks)
        return self._ranks.run(StepInputs(chunks, step.every_token))


@pytest.fixture
def small() -> ModelConfig:
    return SMALL


@pytest.fixture
def bounds() -> BuildConfig:
    return BUILD


@pytest.fixture
def weights_of() -> Callable[..., dict[str, torch.Tensor]]:
    return telling_weights


@pytest.fixture
def torch_reference() -> type[TorchBySlot]:
    return TorchBySlot
