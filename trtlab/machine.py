"""``trtlab.machine()``: the hardware and libraries of this machine, and whether it builds and runs plans."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass

import torch

from trtlab import hardware
from trtlab.card import Shown
from trtlab.config.calls import public
from trtlab.errors import TrtlabError
from trtlab.hardware import Gpu
from trtlab.tensorrt.library import library


@dataclass(frozen=True, repr=False)
class Machine(Shown):
    """The hardware and libraries of a machine, and whether it builds and runs plans; see ``trtlab.machine()``."""

    system: str
    cores: int
    memory_bytes: int
    torch: str
    gpus: tuple[Gpu, ...]
    tensorrt: str
    builds_plans: bool
    runs_plans: bool
    mpi: bool


@public
def machine() -> Machine:
    """Describe this machine: processor cores, memory in bytes, CUDA devices, the TensorRT library, MPI."""
    gpus = hardware.gpus()
    tensorrt, builds, runs = _tensorrt(gpus)
    return Machine(
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        cores=hardware.cores(),
        memory_bytes=hardware.memory_bytes(),
        torch=torch.__version__,
        gpus=gpus,
        tensorrt=tensorrt,
        builds_plans=builds,
        runs_plans=runs,
        mpi=importlib.util.find_spec("mpi4py") is not None,
    )


def _tensorrt(gpus: tuple[Gpu, ...]) -> tuple[str, bool, bool]:
    """The library in words, whether plans can be built here, and whether they run on the first GPU."""
    try:
        tensorrt = library()
    except TrtlabError as error:
        return f"none: {error}", False, False
    if not gpus:
        return f"{tensorrt.title}; its plans need a GPU to run", True, False
    major, minor = (int(part) for part in gpus[0].compute_capability.split("."))
    verdict = tensorrt.runs_on((major, minor))
    return f"{tensorrt.title}; {verdict.reason}", True, verdict.ok
