"""The interface that a session needs of an engine; ``trtlab.engine``, a floor above, implements it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.parallel.shard import EmbeddingLayout
from trtlab.tensorrt.build.plans import Plans


class RunnableEngine(Protocol):
    """An engine that a session can run."""

    @property
    def config(self) -> ModelConfig:
        """The model's sizes and architecture."""
        ...

    @property
    def build_config(self) -> BuildConfig:
        """The bounds of the build, resolved for the model."""
        ...

    @property
    def mapping(self) -> Mapping:
        """How the model is split over ranks."""
        ...

    @property
    def layout(self) -> EmbeddingLayout:
        """How the token table is split over ranks."""
        ...

    @property
    def plans(self) -> Plans | None:
        """The TensorRT plans, None without."""
        ...

    @property
    def tokenizer_path(self) -> Path | None:
        """The folder of the tokenizer, None without."""
        ...

    def weights(self, rank: int) -> dict[str, Tensor]:
        """One rank's tensors by name, read into memory."""
        ...

    def require_open(self) -> None:
        """Raise EngineError after ``close``."""
        ...
