"""Runs work on rank 0 of the processes that one mpirun started, while the other ranks wait. Knows no models."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from typing import Any

from trtlab.errors import MissingDependency
from trtlab.parallel.comm import RankFailed

MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # set by mpirun of MPICH and Intel, and of Open MPI
DONE_TAG = 4242  # of the message that rank 0 sends to the waiting ranks
POLL_INTERVAL_S = 0.02  # the ranks poll, because a rank that waits inside MPI keeps a core busy


def on_rank_zero(work: Callable[[], object]) -> None:
    """Run ``work`` on rank 0 while the other ranks wait; without mpirun, just run it.

    Every rank must call it. A process that mpirun did not start never touches MPI.

    Raises:
        MissingDependency: under mpirun without mpi4py.
        BaseException: on every rank, the error that ``work`` raised on rank 0.
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
            message = _picklable(failure)
            for rank in range(1, world.Get_size()):
                world.send(message, dest=rank, tag=DONE_TAG)
    else:
        while not world.iprobe(source=0, tag=DONE_TAG):
            time.sleep(POLL_INTERVAL_S)
        error_of_rank_zero: BaseException | None = world.recv(source=0, tag=DONE_TAG)
        if error_of_rank_zero is not None:
            raise error_of_rank_zero


def _mpi_world() -> Any:
    """The communicator of all processes that one mpirun started; None without mpirun."""
    if not any(int(os.environ.get(name, "1")) > 1 for name in MPI_SIZES):
        return None
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise MissingDependency(
            f"several processes under mpirun need mpi4py: {error}", remedy="pip install mpi4py mpich"
        ) from error
    return MPI.COMM_WORLD


def _picklable(error: BaseException | None) -> BaseException | None:
    """A copy of the error if it can be pickled, otherwise a RankFailed with its text."""
    try:
        copy: BaseException | None = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - pickling runs code of the error's class, which may raise anything
        return RankFailed(f"rank 0 failed: {type(error).__name__}: {error}")
    return copy
