"""Runs one rank by a plan or by the interpreter: keeps cache slots, checks steps, returns logits in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.session import SessionConfig
from trtlab.parallel.comm import Comm
from trtlab.parallel.ranks import Rank, RankGroup
from trtlab.parallel.step_inputs import StepInputs
from trtlab.runtime.backend import Backend
from trtlab.runtime.pool_size import PoolSize, pool_size
from trtlab.tensorrt import dtypes
from trtlab.tensorrt.bindings import LOGITS, Bindings, profiles
from trtlab.tensorrt.run.batching import check_step, plan_inputs, runs_of, write_updates


class Runner(Protocol):
    """Runs a profile of one rank once: TensorRT on a GPU, or the interpreter on a CPU."""

    device: torch.device

    def run(self, profile: str, inputs: dict[str, torch.Tensor], comm: Comm) -> dict[str, torch.Tensor]:
        """Run a profile and return the rank's outputs by name, valid until the next run.

        A cache in the network's own type is written in place and is not among the outputs.
        """
        ...

    def close(self) -> None:
        """Free the runner's network or plan."""
        ...


class PlanRank(Rank):
    """A ``Rank`` over a Runner. A slot is a row of each layer's cache; the pool's blocks only keep account of it."""

    def __init__(self, runner: Runner, table: Bindings, build: BuildConfig) -> None:
        self._runner = runner
        self._table = table
        self._build = build
        self._context = profiles(build)[0]
        self._held = [0] * build.max_batch_size  # cached tokens of each slot
        self.caches = allocate(table, build.max_batch_size, runner.device)

    @torch.inference_mode()
    def run(self, step: StepInputs, comm: Comm) -> torch.Tensor | None:
        """The rank's logits, or None.

        Raises:
            RequestError: when a slot is full, before anything runs.
            EngineError: for a slot beyond the plan's batch, before anything runs.
        """
        check_step(step, self._build.max_batch_size, self._build.seq_len, self._held)
        for chunk in step.chunks:
            if chunk.past == 0 and self._held[chunk.slot]:
                self._clear(chunk.slot)
        parts: dict[int, torch.Tensor] = {}
        for run in runs_of(step, self._context):
            rows = {name: cache[run.first : run.first + len(run.pieces)] for name, cache in self.caches.items()}
            inputs = {**plan_inputs(run, self._table, self._build.seq_len), **rows}
            outputs = self._runner.run(run.profile, inputs, comm)
            write_updates(run, self._table, outputs, rows)
            if (logits := outputs.get(LOGITS)) is not None:  # [batch, wanted, vocab]
                for number, (place, row, _) in enumerate(run.results):
                    parts[place] = logits[row, number if run.profile == "context" else 0]
        for chunk in step.chunks:
            self._held[chunk.slot] = chunk.past + len(chunk.token_ids)
        return torch.stack([parts[place] for place in range(len(parts))]) if parts else None

    def _clear(self, slot: int) -> None:
        """Zero a slot for a new request: a failed one may leave NaN, and 0 x NaN is NaN in spite of the mask."""
        for cache in self.caches.values():
            cache[slot].zero_()

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        # Never called: a slot belongs to one request, so no block is shared and none is copied.
        raise AssertionError(f"slots share no blocks, and cannot copy {copies}")

    def close(self) -> None:
        self.caches = {}
        self._runner.close()


def allocate(table: Bindings, slots: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A rank's caches by name, each ``[slots, kv_heads, capacity, head_size]``; zeros, because 0 x NaN would spread."""
    return {
        binding.name: torch.zeros(binding.sized({"batch": slots}), dtype=dtypes.to_torch(binding.dtype), device=device)
        for binding in table.cache_inputs
    }


def slot_backend(
    name: str,
    runners: Sequence[Runner],
    tables: Sequence[Bindings],
    build: BuildConfig,
    mapping: Mapping,
    session: SessionConfig | None = None,
) -> Backend:
    """Open a backend with one Runner and its bindings per rank; ``build`` is resolved."""
    pool = _slot_pool(tables, build, session or SessionConfig())
    ranks = [PlanRank(runner, table, build) for runner, table in zip(runners, tables, strict=True)]
    return Backend(name, pool, RankGroup(ranks, mapping), runners[0].device)


def _slot_pool(tables: Sequence[Bindings], build: BuildConfig, session: SessionConfig) -> PoolSize:
    """The size, counted in blocks, of caches with one slot per request: the plan's bounds, or fewer by the settings."""
    slot_bytes = sum(
        torch.Size(binding.sized({"batch": 1})).numel() * dtypes.to_torch(binding.dtype).itemsize
        for table in tables
        for binding in table.cache_inputs
    )
    block_bytes = slot_bytes // build.seq_len * build.tokens_per_block
    return pool_size(build, session, block_bytes, paged=False)
