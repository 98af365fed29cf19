"""What this machine has: processor cores, memory, caches, GPUs. No other module asks the system."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Gpu:
    """One CUDA device: its name, memory and compute capability."""

    name: str
    memory_bytes: int
    compute_capability: str


def gpus() -> tuple[Gpu, ...]:
    """The CUDA devices that torch sees, in its order."""
    return tuple(_gpu(index) for index in range(torch.cuda.device_count()))


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, properties.total_memory, f"{properties.major}.{properties.minor}")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory, 0 where the system does not report them."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def free_bytes() -> int:
    """Bytes of memory that this process can still take, within the limit of its container; 0 where nothing says.

    File pages that the system can drop count as free. Where only the total is known, as on macOS, it is the total.
    """
    available = _number_after("MemAvailable:", Path("/proc/meminfo"))
    rooms = [memory_bytes() if available is None else available * 1024]
    for limit, used, inactive in CGROUPS:
        most, now = _number_after("", CGROUP_ROOT / limit), _number_after("", CGROUP_ROOT / used)
        if most is not None and now is not None:  # "max" means no limit
            droppable = _number_after(inactive, (CGROUP_ROOT / used).with_name("memory.stat")) or 0
            rooms.append(max(0, most - now + droppable))
    return min(rooms)


CGROUP_ROOT = Path("/sys/fs/cgroup")
# The limit of a container, what it uses, and the key of the file pages among them, in versions 2 and 1 of cgroups.
CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def _number_after(key: str, file: Path) -> int | None:
    """The number after a key, which is the first of its line, in a file of the system; None where there is none."""
    try:
        text = file.read_text()
    except OSError:
        return None
    match = re.search(rf"^{re.escape(key)}\s*(\d+)", text, re.MULTILINE)
    return None if match is None else int(match[1])


def cache_bytes() -> int:
    """The last-level cache of the first processor core in bytes, 0 where the system does not report it."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes), default=0)
