"""The processes that one mpirun started: which of them works, and how the others wait for it."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from typing import Any

from trtlab.errors import MissingDependency
from trtlab.parallel.comm import RankFailed

MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # what mpirun of MPICH and Intel, or of Open MPI, tells its processes
DONE = 4242  # the tag of rank 0's word to those that wait
PATIENCE_S = 0.02  # between two looks: a rank that waits in MPI itself would keep a core busy


def on_rank_zero(work: Callable[[], object]) -> None:
    """Under mpirun let rank 0 do ``work`` while the other ranks wait; all raise what it raised. Alone just do it.

    Every rank must call it. A process that mpirun did not start never touches MPI. Raises MissingDependency without
    mpi4py.
    """
    world = _mpi_world()
    if world is None:
        work()
    elif world.Get_rank() == 0:
        failure: BaseException | None = None
        try:
            work()
        except BaseException as error:
            failure = error
            raise
        finally:
            word = _portable(failure)
            for rank in range(1, world.Get_size()):
                world.send(word, dest=rank, tag=DONE)
    else:
        while not world.iprobe(source=0, tag=DONE):
            time.sleep(PATIENCE_S)
        told: BaseException | None = world.recv(source=0, tag=DONE)
        if told is not None:
            raise told


def _mpi_world() -> Any:
    """All processes that one mpirun started, None when this one is alone."""
    if not any(int(os.environ.get(name, "1")) > 1 for name in MPI_SIZES):
        return None
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise MissingDependency(
            f"several processes under mpirun need mpi4py: {error}", remedy='pip install "trtlab[mpi]"'
        ) from error
    return MPI.COMM_WORLD


def _portable(error: BaseException | None) -> BaseException | None:
    """The error itself where it survives the way to another process, its words otherwise."""
    try:
        copy: BaseException | None = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever an error's class does when it is pickled
        return RankFailed(f"rank 0 failed: {type(error).__name__}: {error}")
    return copy
