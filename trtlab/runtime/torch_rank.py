"""Runs one rank in torch: on a GPU, or on a CPU without Numba."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtlab.config.model import ModelConfig
from trtlab.model.decoder import decoder
from trtlab.model.rope import RotaryTable
from trtlab.model.weights import ModelWeights
from trtlab.ops.paged import Kernel, NewTokens, PackedBatch, PagedCache
from trtlab.ops.torch import TorchOps
from trtlab.parallel.comm import Comm
from trtlab.parallel.ranks import Rank
from trtlab.parallel.step_inputs import StepInputs
from trtlab.runtime.rank_tables import RankTables, in_step_order, singles_first


class TorchRank(Rank):
    """A ``Rank`` over ``TorchOps``, on the device of its cache.

    ``rotary`` comes from ``spread``. With a ``kernel``, attention reads the blocks in place and gathers nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        cache: PagedCache,
        tables: RankTables,
        rotary: RotaryTable,
        kernel: Kernel | None = None,
    ) -> None:
        self._config = config
        self._weights = weights
        self.cache = cache
        self._device = cache.keys.device
        self._tables = tables
        self._rotary = rotary
        self._kernel = kernel

    @torch.inference_mode()
    def run(self, step: StepInputs, comm: Comm) -> Tensor | None:
        order, chunks = singles_first(step.chunks)
        sequences = [NewTokens(slot, past, len(token_ids)) for slot, past, token_ids, _ in chunks]
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        tables = self._tables.update(chunks)
        batch = PackedBatch(sequences, self._rotary, tables, self._device, self._kernel, token_ids)
        logits = self.forward(batch, comm, step.every_token)
        return None if logits is None else in_step_order(logits, order, chunks, step.every_token)

    def forward(self, batch: PackedBatch, comm: Comm, every_token: bool) -> Tensor | None:
        """The model's part of a step: logits in the batch's order."""
        ops = TorchOps(batch, self.cache, comm, every_token=every_token)
        out = decoder(ops, self._config, self._weights, batch.token_ids)
        return out if self._weights.lm_head is not None else None

    @torch.inference_mode()
    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self.cache.copy(copies)

    def close(self) -> None:
        del self._weights, self.cache
        torch.cuda.empty_cache()  # does nothing where CUDA was never used
