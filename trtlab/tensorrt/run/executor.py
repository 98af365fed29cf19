"""Drives a plan, or the interpreter in its place, step by step: cache slots, runs, guards, and logits in order."""

from __future__ import annotations

from collections import abc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.session import SessionConfig
from trtlab.parallel.comm import Comm, Solo, ThreadComm, thread_group
from trtlab.parallel.step import StepInputs
from trtlab.runtime.pool import PoolSize, pool_size
from trtlab.tensorrt import dtypes
from trtlab.tensorrt.bindings import HIDDEN_STATES, LOGITS, Bindings, profiles
from trtlab.tensorrt.emit.emission import Emission, emit
from trtlab.tensorrt.run.batching import check_step, plan_inputs, runs_of, write_updates


class Runner(Protocol):
    """What runs a profile once: TensorRT on a GPU, or the interpreter on a CPU."""

    device: torch.device

    def run(self, profile: str, inputs: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """The outputs of each rank by name, from one set of inputs a rank; valid until the next run.

        A cache in the network's own type is written in place and is no output here.
        """
        ...

    def close(self) -> None:
        """Free what the runner holds."""
        ...


class TensorRTExecutor:
    """An Executor over a Runner. Every slot is a row of each layer's cache, which starts at zero; blocks only count."""

    def __init__(
        self,
        name: str,
        runner: Runner,
        tables: Sequence[Bindings],
        build: BuildConfig,
        session: SessionConfig | None = None,
    ) -> None:
        self.name = name
        self.pool = _slot_pool(tables, build, session or SessionConfig())
        self._runner = runner
        self._tables = tables
        self._build = build
        self._context = profiles(build)[0]
        self._held = [0] * build.max_batch_size
        self._caches = [allocate(table, build.max_batch_size, runner.device) for table in tables]

    @torch.inference_mode()
    def run(self, step: StepInputs) -> torch.Tensor:
        """Logits in float32, ``[chunks, vocab]`` or ``[tokens, vocab]``; see Executor.

        Raises RequestError when a slot is full, EngineError for a slot beyond the plan's batch, before anything runs.
        """
        check_step(step, self._build.max_batch_size, self._build.seq_len, self._held)
        for chunk in step.chunks:
            if chunk.past == 0 and self._held[chunk.slot]:
                self._clear(chunk.slot)
        parts: dict[int, torch.Tensor] = {}
        for run in runs_of(step, self._context):
            slots = slice(run.first, run.first + len(run.pieces))
            caches = [{name: cache[slots] for name, cache in held.items()} for held in self._caches]
            ranks = list(zip(self._tables, caches, strict=True))
            inputs = [{**plan_inputs(run, table, self._build.seq_len), **rows} for table, rows in ranks]
            outputs = self._runner.run(run.profile, inputs)
            for (table, rows), given in zip(ranks, outputs, strict=True):
                write_updates(run, table, given, rows)
            logits = next(given[LOGITS] for given in outputs if LOGITS in given)  # [batch, wanted, vocab]
            for number, (place, row, _) in enumerate(run.results):
                parts[place] = logits[row, number if run.profile == "context" else 0]
        for chunk in step.chunks:
            self._held[chunk.slot] = chunk.past + len(chunk.token_ids)
        return torch.stack([parts[place] for place in range(len(parts))])

    def _clear(self, slot: int) -> None:
        """Forget who had the slot: a mask hides a number, but 0 x NaN, which a failed request leaves, spreads."""
        for held in self._caches:
            for cache in held.values():
                cache[slot].zero_()

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """See Executor. A slot belongs to one request: nothing is shared, so nothing is copied."""
        raise AssertionError(f"no block of a slot is shared: {copies}")

    def close(self) -> None:
        """See Executor."""
        self._caches = []
        self._runner.close()


def allocate(table: Bindings, slots: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A rank's caches, ``[slots, kv_heads, capacity, head_size]`` each; zero, for 0 x NaN would spread."""
    return {
        binding.name: torch.zeros(binding.sized({"batch": slots}), dtype=dtypes.to_torch(binding.dtype), device=device)
        for binding in table.cache_inputs
    }


def _slot_pool(tables: Sequence[Bindings], build: BuildConfig, session: SessionConfig) -> PoolSize:
    """The account in blocks of caches that lie in one slot a request: the plan's bounds, or fewer if asked."""
    place = sum(
        torch.Size(binding.sized({"batch": 1})).numel() * dtypes.to_torch(binding.dtype).itemsize
        for table in tables
        for binding in table.cache_inputs
    )
    block_bytes = place // build.seq_len * build.tokens_per_block
    return pool_size(build, session, block_bytes, paged=False)


class InterpreterRunner:
    """Runs the emitted networks with torch on the CPU; several ranks are threads of this process."""

    device = torch.device("cpu")

    def __init__(self, emissions: Sequence[Emission], mapping: Mapping) -> None:
        self._networks = [emission.read() for emission in emissions]
        self._tables = [emission.bindings for emission in emissions]
        self._mapping = mapping
        self._pool = ThreadPoolExecutor(len(emissions)) if len(emissions) > 1 else None

    def run(self, profile: str, inputs: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """See Runner."""
        if self._pool is None:
            return [self._rank_run(0, inputs[0], Solo())]
        comms = thread_group(self._mapping)
        futures = [self._pool.submit(self._guarded, rank, inputs[rank], comm) for rank, comm in enumerate(comms)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:  # ranks that only waited for the failed one say so with a RuntimeError
            raise next((error for error in errors if not isinstance(error, RuntimeError)), errors[0])
        return [future.result() for future in futures]

    def close(self) -> None:
        """See Runner."""
        self._networks = []
        if self._pool is not None:
            self._pool.shutdown()

    @torch.inference_mode()
    def _guarded(self, rank: int, inputs: dict[str, torch.Tensor], comm: ThreadComm) -> dict[str, torch.Tensor]:
        try:
            return self._rank_run(rank, inputs, comm)
        except BaseException:
            comm.abort()
            raise

    def _rank_run(self, rank: int, inputs: dict[str, torch.Tensor], comm: Comm) -> dict[str, torch.Tensor]:
        if not self._mapping.is_first_stage(rank):
            inputs = {HIDDEN_STATES: comm.receive(), **inputs}
        outputs, table = self._networks[rank].run(inputs, comm=comm), self._tables[rank]
        if not self._mapping.is_last_stage(rank):
            comm.send(outputs[table.result.name])
        return {name: tensor for name, tensor in outputs.items() if name not in table.caches}


def interpreter_executor(
    config: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    ranks: Sequence[abc.Mapping[str, torch.Tensor]],
    session: SessionConfig | None = None,
) -> TensorRTExecutor:
    """An executor that steps through the networks that TensorRT compiles, in their own types, on the CPU."""
    build = build.resolve(config)
    emissions = [emit(config, build, mapping, rank, weights) for rank, weights in enumerate(ranks)]
    tables = [emission.bindings for emission in emissions]
    return TensorRTExecutor("interpreter", InterpreterRunner(emissions, mapping), tables, build, session)
