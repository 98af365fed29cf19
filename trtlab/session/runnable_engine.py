"""What a session needs of an engine; the engine itself lies on a floor above."""

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
    """What a session needs of an engine."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        ...

    @property
    def build_config(self) -> BuildConfig:
        """The bounds, resolved for the model."""
        ...

    @property
    def mapping(self) -> Mapping:
        """How the model lies over ranks."""
        ...

    @property
    def layout(self) -> EmbeddingLayout:
        """How its token table does."""
        ...

    @property
    def plans(self) -> Plans | None:
        """Its TensorRT plans, if it has any."""
        ...

    @property
    def tokenizer_dir(self) -> Path | None:
        """The folder of its tokenizer."""
        ...

    def weights(self, rank: int) -> dict[str, Tensor]:
        """One rank's tensors, read."""
        ...

    def require_open(self) -> None:
        """EngineError after ``close``."""
        ...
