"""What an engine needs of a checkpoint, which ``trtlab.checkpoint`` implements, and whether it is the same model."""

from __future__ import annotations

import dataclasses
from collections import abc
from pathlib import Path
from typing import Protocol

from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.quant import QuantConfig
from trtlab.errors import EngineError
from trtlab.parallel.shard import EmbeddingLayout
from trtlab.storage.lazy import LazyTensor


class WeightSource(Protocol):
    """A checkpoint, as far as an engine needs it to be built or compared."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        ...

    @property
    def tensors(self) -> abc.Mapping[str, LazyTensor]:
        """The whole tensors by TensorRT-LLM's names."""
        ...

    @property
    def source(self) -> str:
        """The origin of the weights, in words."""
        ...

    @property
    def tokenizer_path(self) -> Path | None:
        """The folder of the tokenizer, if there is one."""
        ...

    @property
    def folder(self) -> Path | None:
        """The folder that stores the model in TensorRT-LLM's format, if there is one."""
        ...

    @property
    def holds_files(self) -> bool:
        """Whether the files of ``folder`` hold exactly these tensors, so that they may be linked."""
        ...

    @property
    def mapping(self) -> Mapping:
        """How ``folder`` splits the model over ranks."""
        ...

    @property
    def layout(self) -> EmbeddingLayout:
        """How ``folder`` splits the token table over ranks."""
        ...

    def require_whole(self, what: str) -> None:
        """Raise CheckpointError when this holds a single rank of several; ``what`` completes "cannot be"."""
        ...


MAY_DIFFER = ("architecture", "dtype", "quantization")  # between checkpoints of one model


def require_same_model(engine: ModelConfig, checkpoint: ModelConfig) -> tuple[str, str] | None:
    """Raise EngineError, with the settings that differ, when a checkpoint is of another model than an engine.

    Returns:
        How each of them is quantized, None where both are in the same way.
    """
    names = [field.name for field in dataclasses.fields(engine) if field.name not in MAY_DIFFER]
    differ = [name for name in names if getattr(engine, name) != getattr(checkpoint, name)]
    if differ:
        raise EngineError(
            "the checkpoint is of another model than the engine",
            got=", ".join(f"{name}={getattr(checkpoint, name)}" for name in differ),
            expected=", ".join(f"{name}={getattr(engine, name)}" for name in differ),
            remedy="give the checkpoint that the engine was built from, or another one of the same model",
        )
    if engine.quantization == checkpoint.quantization:
        return None
    return _recipe(engine.quantization), _recipe(checkpoint.quantization)


def _recipe(quant: QuantConfig) -> str:
    cache = f"{quant.kv_cache_quant_algo} KV cache" if quant.kv_cache_quant_algo else None
    head = "quantized head" if quant.quantizes_head else None
    return " with ".join(name for name in (quant.quant_algo, head, cache) if name) or "plain weights"
