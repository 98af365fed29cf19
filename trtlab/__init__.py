"""TensorRT-LLM's workflow as four notebook objects: Checkpoint, QuantizedCheckpoint, Engine, Session."""

from trtlab.bench import benchmark
from trtlab.checkpoint import Checkpoint, QuantizedCheckpoint
from trtlab.config import BuildConfig, Mapping, ModelConfig, RotaryScaling, SamplingParams, SessionConfig
from trtlab.display import cards as _cards  # noqa: F401 - registers how each object shows itself
from trtlab.display.card import card
from trtlab.engine import Engine
from trtlab.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    MissingDependency,
    QuantizeError,
    RequestError,
    TrtlabError,
)
from trtlab.estimate import estimate
from trtlab.machine import machine
from trtlab.quantize.config import QuantConfig
from trtlab.request import Completion, Request
from trtlab.session import Session
from trtlab.version import VERSION as __version__

__all__ = [
    "BuildConfig",
    "Checkpoint",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Engine",
    "EngineError",
    "Mapping",
    "MissingDependency",
    "ModelConfig",
    "QuantConfig",
    "QuantizeError",
    "QuantizedCheckpoint",
    "Request",
    "RequestError",
    "RotaryScaling",
    "SamplingParams",
    "Session",
    "SessionConfig",
    "TrtlabError",
    "__version__",
    "benchmark",
    "card",
    "estimate",
    "machine",
]
