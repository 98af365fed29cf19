"""What this machine has: CPU, CUDA, which TensorRT, MPI. The only place that asks."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from trtlab.display.card import Shown
from trtlab.errors import TrtlabError


@dataclass(frozen=True, repr=False)
class Gpu:
    """One CUDA device: its name, memory and compute capability."""

    name: str
    memory_bytes: int
    compute_capability: str


@dataclass(frozen=True, repr=False)
class Machine(Shown):
    """What is here, what can build and what can run; see ``trtlab.machine()``."""

    system: str
    cores: int
    memory_bytes: int
    torch: str
    gpus: tuple[Gpu, ...]
    tensorrt: str
    builds_plans: bool
    runs_plans: bool
    mpi: bool


def machine() -> Machine:
    """Ask the machine: processor cores, memory in bytes, CUDA devices, the TensorRT library, MPI."""
    gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count()))
    tensorrt, builds, runs = _tensorrt(gpus)
    return Machine(
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory(),
        torch=torch.__version__,
        gpus=gpus,
        tensorrt=tensorrt,
        builds_plans=builds,
        runs_plans=runs,
        mpi=importlib.util.find_spec("mpi4py") is not None,
    )


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, properties.total_memory, f"{properties.major}.{properties.minor}")


def _memory() -> int:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def cache_bytes() -> int:
    """The last-level cache of the first processor core in bytes, 0 where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes), default=0)


def _tensorrt(gpus: tuple[Gpu, ...]) -> tuple[str, bool, bool]:
    """What to call the library, whether plans can be built here, and whether they run on the first GPU."""
    from trtlab.tensorrt.library import library

    try:
        found = library()
    except TrtlabError as missing:
        return f"none: {missing}", False, False
    if not gpus:
        return f"{found.title}; its plans need a GPU to run", True, False
    major, minor = (int(part) for part in gpus[0].compute_capability.split("."))
    verdict = found.runs_on((major, minor))
    return f"{found.title}; {verdict.reason}", True, verdict.ok
