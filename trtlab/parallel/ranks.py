"""Runs a step on every rank and returns its logits: the only place where a step fans out. Knows no models."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

import torch
from torch import Tensor

from trtlab.config.mapping import Mapping
from trtlab.interrupts import deliver_interrupt
from trtlab.parallel.comm import Comm, RankFailed, Solo, ThreadComm, thread_group
from trtlab.parallel.step_inputs import Chunk, StepInputs

POLL_S = 0.1  # how often an interrupt is looked for while the ranks run


class Rank(Protocol):
    """One part of a model, with its weights and its part of the KV cache; it runs its share of each step."""

    def run(self, step: StepInputs, comm: Comm) -> Tensor | None:
        """Run one step.

        Returns:
            Logits in float32, in the order of the chunks: ``[chunks, vocab]``, or ``[tokens, vocab]`` with
            ``every_token``. None on a rank that is not in the last pipeline stage.
        """
        ...

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of the pool, pairs (source, target) in this order; called only for a paged pool."""
        ...

    def close(self) -> None:
        """Free the rank's weights and cache; called once."""
        ...


class RankGroup:
    """All ranks of a model. They run as threads of this process; a single rank runs in the caller's thread."""

    def __init__(self, ranks: Sequence[Rank], mapping: Mapping) -> None:
        assert len(ranks) == len(mapping.ranks), (len(ranks), mapping)
        self.ranks = tuple(ranks)
        self._mapping = mapping
        self._threads = ThreadPoolExecutor(len(ranks), "trtlab-rank") if len(ranks) > 1 else None

    def run(self, step: StepInputs) -> Tensor:
        """The logits of the last stage; see ``Rank.run``. Raises the error of the rank that failed first."""
        if self._threads is None:
            return _logits([self.ranks[0].run(step, Solo())])
        comms = thread_group(self._mapping)
        futures: list[Future[Tensor | None]] = []
        try:
            for rank, comm in zip(self.ranks, comms, strict=True):
                futures.append(self._threads.submit(_guarded, rank, comm, step))
            while wait(futures, POLL_S).not_done:
                deliver_interrupt()
        except BaseException:  # an interrupt: no rank may still be in this step when the next one begins
            for comm in comms:
                comm.abort()
            wait(futures)
            raise
        return _logits(_results(futures))

    def run_prompt(self, slot: int, blocks: tuple[int, ...], token_ids: Sequence[int], budget: int) -> Tensor:
        """The logits after each token of one prompt, ``[tokens, vocab]`` on the CPU, ``budget`` tokens at a time."""
        starts = range(0, len(token_ids), budget)
        chunks = [Chunk(slot, start, tuple(token_ids[start : start + budget]), blocks) for start in starts]
        return torch.cat([self.run(StepInputs((chunk,), every_token=True)).cpu() for chunk in chunks])

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """See ``Rank.copy_blocks``."""
        for rank in self.ranks:
            rank.copy_blocks(copies)

    def close(self) -> None:
        """Close all ranks; a second call does nothing."""
        ranks, self.ranks = self.ranks, ()
        for rank in ranks:
            rank.close()
        if self._threads is not None:
            self._threads.shutdown()


def _guarded(rank: Rank, comm: ThreadComm, step: StepInputs) -> Tensor | None:
    """Run a rank's share; if it fails, the ranks that wait for it are woken."""
    try:
        return rank.run(step, comm)
    except BaseException:
        comm.abort()
        raise


def _results(futures: Sequence[Future[Tensor | None]]) -> list[Tensor | None]:
    """The ranks' results. RankFailed only says that another rank failed, so any other error is raised before it."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, RankFailed)), errors[0])
    return [future.result() for future in futures]


def _logits(results: Sequence[Tensor | None]) -> Tensor:
    logits = next((result for result in results if result is not None), None)
    assert logits is not None, "no rank gave logits"
    return logits
