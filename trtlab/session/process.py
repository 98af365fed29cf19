"""Says whether a session can run in this process: the threads of OpenMP do not survive a fork."""

from __future__ import annotations

import logging
import os

import torch

from trtlab.errors import EngineError

logger = logging.getLogger("trtlab")

_IMPORTED_IN = os.getpid()
_opened_in: set[int] = set()  # the processes that opened a session, this one's ancestors among them


def require_process_that_can_run() -> None:
    """Prepare this process for a session.

    A forked child computes with one thread, because torch would wait for its parent's threads.

    Raises:
        EngineError: in a forked child of a process that had a session itself: OpenMP would end the process.
    """
    here = os.getpid()
    if _opened_in - {here}:
        raise EngineError(
            "a session cannot be opened in a forked child of a process that had one itself",
            got=f"process {here}, with a session opened before the fork",
            remedy='start the process with multiprocessing.get_context("spawn")',
        )
    if here != _IMPORTED_IN and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logger.warning("this process was forked, so that it computes with one thread; spawned ones use all")
    _opened_in.add(here)
