"""Opens a session: chooses the backend and the device of an engine, and records the reason."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from trtlab.config.session import BACKENDS, BackendName, SessionConfig
from trtlab.errors import ConfigError, EngineError
from trtlab.memory.fits import require_room_to_run
from trtlab.runtime.backend import Backend
from trtlab.runtime.torch_backend import torch_backend
from trtlab.session.process import require_process_that_can_run
from trtlab.session.runnable_engine import RunnableEngine
from trtlab.session.session import Session
from trtlab.tensorrt.run.interpreter_runner import interpreter_backend
from trtlab.tensorrt.run.plan_runner import plan_backend

DEVICES = "cpu | cuda | cuda:0 ..."


def open_session(
    engine: RunnableEngine, config: SessionConfig, backend: BackendName, device: str | torch.device | None
) -> Session:
    """Open a session on a backend.

    Args:
        engine: An open engine.
        config: The session's settings.
        backend: One of ``BACKENDS``. With ``auto`` the environment variable ``TRTLAB_BACKEND`` decides, and without it
            the best backend of this machine.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None for CUDA if there is a device, else the CPU.

    Raises:
        ConfigError: for an unknown backend, or a device that is not here or not supported.
        EngineError: for a closed engine, or a backend that cannot run it.
    """
    engine.require_open()
    require_process_that_can_run()
    requested = backend if backend != "auto" else os.environ.get("TRTLAB_BACKEND", "auto")
    if requested not in BACKENDS:
        raise ConfigError(
            "the environment variable TRTLAB_BACKEND does not name a backend",
            got=repr(requested),
            expected=" | ".join(BACKENDS),
            remedy="set it to one of these, or unset it",
        )
    target = _device(device)
    name, reason = (requested, "asked for") if requested != "auto" else _best(engine, target)
    used = torch.device("cpu") if name == "interpreter" else target
    require_room_to_run(engine.config, engine.build_config, engine.mapping, engine.layout, config, used)
    return Session(engine, OPENERS[name](engine, target, config), config, f"{name} on {used}: {reason}")


def _best(engine: RunnableEngine, device: torch.device) -> tuple[str, str]:
    """TensorRT if the plan runs on this device, else torch; and the reason in a few words."""
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
        raise EngineError(
            "this engine has no TensorRT plan",
            remedy='use backend="torch", or build and open it again without plan=False',
        )
    if device.type != "cuda":
        raise EngineError(
            f"a TensorRT plan runs on an NVIDIA GPU, not on {device}",
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


def _device(name: str | torch.device | None) -> torch.device:
    """The device of a name; ConfigError for one that is not here, or that trtlab does not run on."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if here else "cpu")
    try:
        device = torch.device(name if isinstance(name, torch.device) else str(name))
    except RuntimeError as error:
        raise ConfigError("unknown device", got=repr(name), expected=DEVICES) from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ConfigError(f"sessions do not run on {device.type}", got=repr(name), expected=DEVICES)
    if not here:
        raise ConfigError("there is no CUDA device here", got=repr(name), remedy='use device="cpu"')
    if (device.index or 0) >= here:
        known = " | ".join(f"cuda:{index}" for index in range(here))
        raise ConfigError("there is no such CUDA device here", got=repr(name), expected=known)
    return device
