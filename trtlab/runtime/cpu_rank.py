"""Runs one rank on a CPU with Numba: float32 arrays, and compiled loops where generation spends its time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtlab.config.model import ModelConfig
from trtlab.model.decoder import decoder
from trtlab.model.rope import RotaryTable
from trtlab.model.weights import ModelWeights
from trtlab.ops.cpu.ops import CpuBatch, CpuOps, CpuPool, compile_loops
from trtlab.ops.paged import PagedCache
from trtlab.parallel.comm import Comm
from trtlab.parallel.ranks import Rank
from trtlab.parallel.step_inputs import StepInputs
from trtlab.runtime.rank_tables import RankTables, in_step_order, singles_first


class CpuRank(Rank):
    """A ``Rank`` over ``CpuOps``. ``weights`` come from ``cpu_weights``, ``rotary`` from ``spread``."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, cache: PagedCache, tables: RankTables, rotary: RotaryTable
    ) -> None:
        self._config = config
        self._weights = weights
        self.cache = cache
        self._pool = CpuPool(cache)
        self._tables = tables
        self._rotary = (rotary.cos.numpy(), rotary.sin.numpy())
        compile_loops(weights, self._pool)

    @torch.inference_mode()
    def run(self, step: StepInputs, comm: Comm) -> Tensor | None:
        order, chunks = singles_first(step.chunks)
        batch = CpuBatch(chunks, self._tables.update(chunks))
        logits = self.forward(batch, comm, step.every_token)
        return None if logits is None else in_step_order(logits, order, chunks, step.every_token)

    def forward(self, batch: CpuBatch, comm: Comm, every_token: bool) -> Tensor | None:
        """The model's part of a step: logits in the batch's order."""
        ops = CpuOps(batch, self._pool, self._rotary, comm, every_token=every_token)
        out = decoder(ops, self._config, self._weights, batch.token_ids)
        return torch.from_numpy(out) if self._weights.lm_head is not None else None

    @torch.inference_mode()
    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self.cache.copy(copies)

    def close(self) -> None:
        del self._weights, self.cache, self._pool
