"""TensorRT-LLM's workflow as four notebook objects: Checkpoint, QuantizedCheckpoint, Engine, Session."""

from trtlab import cards as _cards  # noqa: F401 - registers how each object shows itself
from trtlab.bench import benchmark
from trtlab.card import card
from trtlab.checkpoint import Checkpoint, QuantizedCheckpoint
from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig, RotaryScaling
from trtlab.config.quant import QuantConfig
from trtlab.config.sampling import SamplingParams
from trtlab.config.session import SessionConfig
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
from trtlab.evaluate.quantization import compare_recipes
from trtlab.machine import machine
from trtlab.memory.estimate import estimate
from trtlab.packaged import smollm2
from trtlab.session.request import Completion, Request
from trtlab.session.session import Session
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
    "compare_recipes",
    "estimate",
    "machine",
    "smollm2",
]
