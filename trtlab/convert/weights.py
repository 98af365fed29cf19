"""Takes weights in memory, by TensorRT-LLM's names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trtlab.config.model import ModelConfig
from trtlab.convert.check import check_floating, check_tensors
from trtlab.errors import CheckpointError
from trtlab.model.tensor_specs import tensor_specs
from trtlab.storage.lazy import LazyTensor, in_memory
from trtlab.validation import shorten


def read_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """The tensors of a model in its dtype; CheckpointError for weights that do not fit it, or are no tensors."""
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"the weight {name} is no tensor", got=shorten(tensor), expected="a torch.Tensor")
    tensors = {name: in_memory(tensor) for name, tensor in weights.items()}
    check_tensors("the weights", tensors, {name: spec.shape for name, spec in tensor_specs(config).items()})
    check_floating("the weights", tensors.items())
    return {name: tensor.to(config.torch_dtype) for name, tensor in tensors.items()}
