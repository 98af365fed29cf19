"""The interface that an engine needs of a checkpoint; ``trtlab.checkpoint``, two floors above, implements it."""

from __future__ import annotations

from collections import abc
from pathlib import Path
from typing import Protocol

from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
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
    def tokenizer_dir(self) -> Path | None:
        """The folder of the tokenizer, if there is one."""
        ...

    @property
    def folder(self) -> Path | None:
        """The folder that stores the tensors in TensorRT-LLM's format, if there is one."""
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
