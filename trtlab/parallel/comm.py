"""How ranks exchange tensors: alone, or as threads of one process. Knows no models."""

from __future__ import annotations

import queue
import threading
from typing import Protocol

import torch
from torch import Tensor

from trtlab.config.mapping import Mapping


class RankFailed(RuntimeError):
    """Another rank failed, so that this one cannot go on; that rank's own error is the cause."""


class Comm(Protocol):
    """Communication between the ranks of a group. All of them must make the same calls in the same order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the tensor-parallel group, added in rank order."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """The group's tensors concatenated along the last dimension, in rank order."""
        ...

    def send(self, x: Tensor) -> None:
        """Send ``x`` to the same tensor-parallel rank of the next pipeline stage."""
        ...

    def receive(self) -> Tensor:
        """The tensor that the previous stage sent."""
        ...


class Solo:
    """The Comm of a single rank: its own group, with no stage before or after it."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        return x

    def send(self, x: Tensor) -> None:
        """Never called: there is no next stage."""
        raise AssertionError("a single rank has no next stage")

    def receive(self) -> Tensor:
        """Never called: there is no previous stage."""
        raise AssertionError("a single rank has no previous stage")


class ThreadComm:
    """The Comm of one of several ranks that run as threads of this process; ``thread_group`` makes them."""

    def __init__(self, group: _Group, place: int, before: _Link, after: _Link) -> None:
        self._group = group
        self._place = place
        self._before = before
        self._after = after

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the group, added in the same order on every rank, so that all get the same bits."""
        if self._group.size == 1:
            return x
        parts = self._group.exchange(self._place, x)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        """The group's tensors concatenated along the last dimension."""
        return x if self._group.size == 1 else torch.cat(self._group.exchange(self._place, x), dim=-1)

    def send(self, x: Tensor) -> None:
        """Send ``x`` to the next stage."""
        self._after.put(x)

    def receive(self) -> Tensor:
        """Wait for the previous stage's tensor; RankFailed when a rank failed meanwhile."""
        x = self._before.get()
        if x is None:
            raise RankFailed("another rank failed")
        return x

    def abort(self) -> None:
        """Wake every rank that waits for this one, which has failed; they raise RankFailed."""
        self._group.barrier.abort()
        self._after.put(None)


_Link = queue.SimpleQueue[Tensor | None]


class _Group:
    """The shared state of one tensor-parallel group: a barrier, and a place for each rank's tensor."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self._parts: list[Tensor | None] = [None] * size

    def exchange(self, place: int, x: Tensor) -> list[Tensor]:
        self._parts[place] = x
        try:
            self.barrier.wait()
            parts = [p for p in self._parts if p is not None]
            self.barrier.wait()  # no rank overwrites its part before all have read it
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
