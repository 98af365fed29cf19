"""Which backend runs an engine: the one asked for, or the best that is here; and why."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from trtlab.config.session import SessionConfig
from trtlab.errors import ConfigError, EngineError
from trtlab.memory.fits import require_room_to_run
from trtlab.runtime.backend import Backend
from trtlab.runtime.torch_backend import torch_backend
from trtlab.session.runnable_engine import RunnableEngine
from trtlab.session.session import Session
from trtlab.tensorrt.run.interpreter_runner import interpreter_backend
from trtlab.tensorrt.run.plan_runner import plan_backend

BACKENDS = ("auto", "tensorrt", "torch", "interpreter")


def open_session(engine: RunnableEngine, config: SessionConfig, backend: str, device: str | None) -> Session:
    """A session on the backend asked for, by ``TRTLAB_BACKEND``, or on the best that is here."""
    engine.require_open()
    asked = backend if backend != "auto" else os.environ.get("TRTLAB_BACKEND", "auto")
    if asked not in BACKENDS:
        raise ConfigError("unknown backend", got=repr(asked), expected=" | ".join(BACKENDS))
    target = _device(device)
    chosen, reason = (asked, "asked for") if asked != "auto" else _best(engine, target)
    where = torch.device("cpu") if chosen == "interpreter" else target
    require_room_to_run(engine.config, engine.build_config, engine.mapping, engine.layout, config, where)
    running = OPENERS[chosen](engine, target, config)
    return Session(engine, running, config, f"{chosen} on {where}: {reason}")


def _best(engine: RunnableEngine, device: torch.device) -> tuple[str, str]:
    """TensorRT where a GPU is here that the plan runs on, else torch; and the reason in a few words."""
    if device.type != "cuda":
        return "torch", "asked for this device" if torch.cuda.is_available() else "no CUDA device is here"
    if engine.plans is None:
        return "torch", "the engine has no TensorRT plan"
    verdict = engine.plans.run_on(device)
    return ("tensorrt" if verdict else "torch"), verdict.reason


def _torch(engine: RunnableEngine, device: torch.device, config: SessionConfig) -> Backend:
    ranks = [engine.weights(rank) for rank in engine.mapping.ranks]
    return torch_backend(engine.config, engine.build_config, engine.mapping, ranks, device, config)


def _interpreter(engine: RunnableEngine, device: torch.device, config: SessionConfig) -> Backend:
    ranks = [engine.weights(rank) for rank in engine.mapping.ranks]
    return interpreter_backend(engine.config, engine.build_config, engine.mapping, ranks, config)


def _tensorrt(engine: RunnableEngine, device: torch.device, config: SessionConfig) -> Backend:
    if engine.plans is None:
        raise EngineError("this engine has no TensorRT plan", remedy='build it with plan=True, or use backend="torch"')
    if device.type != "cuda":
        raise EngineError(
            "a TensorRT plan runs on an NVIDIA GPU, and none is here",
            remedy='use backend="interpreter" for the same network, or "torch"',
        )
    plan = engine.plans.read(0)
    record = engine.plans.records[0]
    return plan_backend(engine.config, engine.build_config, engine.mapping, plan, record, device, config)


OPENERS: dict[str, Callable[[RunnableEngine, torch.device, SessionConfig], Backend]] = {
    "torch": _torch,
    "interpreter": _interpreter,
    "tensorrt": _tensorrt,
}


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError("unknown device", got=repr(name), expected="cpu | cuda | cuda:0 ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here", got=repr(name), remedy='use device="cpu"')
    return device
