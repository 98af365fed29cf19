"""How ranks exchange tensors: alone, or as threads of one process. Knows no models."""

from __future__ import annotations

import queue
import threading
from typing import Protocol

import torch
from torch import Tensor

from trtlab.config.mapping import Mapping


class RankFailed(RuntimeError):
    """Another rank failed, so that this one would wait in vain; the cause is that rank's error."""


class Comm(Protocol):
    """What one rank may ask of the others. Every rank of a group must make the same calls in the same order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the tensor-parallel group, added in rank order."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """The group's tensors side by side along the last dimension, in rank order."""
        ...

    def send(self, x: Tensor) -> None:
        """Hand ``x`` to the same tensor-parallel rank of the next pipeline stage."""
        ...

    def receive(self) -> Tensor:
        """What the stage before sent."""
        ...


class Solo:
    """One rank: its own group, with no stage before or after it."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        return x

    def send(self, x: Tensor) -> None:
        """There is no next stage."""
        raise AssertionError("a single rank has no next stage")

    def receive(self) -> Tensor:
        """There is no stage before."""
        raise AssertionError("a single rank has no stage before it")


class ThreadComm:
    """One rank of several that run as threads of this process; see ``thread_group``."""

    def __init__(self, group: _Group, place: int, before: _Link, after: _Link) -> None:
        self._group = group
        self._place = place
        self._before = before
        self._after = after

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the group, in the same order on every rank, so that all hold the same bits."""
        if self._group.size == 1:
            return x
        parts = self._group.exchange(self._place, x)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        """The group's tensors side by side."""
        return x if self._group.size == 1 else torch.cat(self._group.exchange(self._place, x), dim=-1)

    def send(self, x: Tensor) -> None:
        """Hand ``x`` to the next stage."""
        self._after.put(x)

    def receive(self) -> Tensor:
        """Wait for the stage before; RankFailed when a rank failed meanwhile."""
        x = self._before.get()
        if x is None:
            raise RankFailed("another rank failed")
        return x

    def abort(self) -> None:
        """Wake every rank that waits for this one: it will not come."""
        self._group.barrier.abort()
        self._after.put(None)


_Link = queue.SimpleQueue[Tensor | None]


class _Group:
    """The meeting point of one tensor-parallel group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self._parts: list[Tensor | None] = [None] * size

    def exchange(self, place: int, x: Tensor) -> list[Tensor]:
        self._parts[place] = x
        try:
            self.barrier.wait()
            parts = [p for p in self._parts if p is not None]
            self.barrier.wait()  # nobody overwrites a part before all have read it
        except threading.BrokenBarrierError as error:
            raise RankFailed("another rank failed") from error
        return parts


def thread_group(mapping: Mapping) -> list[ThreadComm]:
    """One ThreadComm for each rank of a mapping, in rank order."""
    groups = [_Group(mapping.tp_size) for _ in range(mapping.pp_size)]
    links = [[_Link() for _ in range(mapping.tp_size)] for _ in range(mapping.pp_size + 1)]
    comms = []
    for rank in mapping.ranks:
        stage, place = mapping.pp_rank(rank), mapping.tp_rank(rank)
        comms.append(ThreadComm(groups[stage], place, links[stage][place], links[stage + 1][place]))
    return comms
