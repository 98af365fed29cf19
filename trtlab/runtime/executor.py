"""Runs one step of a batch and gives its logits. Knows slots and tokens; knows no requests and no text."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trtlab.config import BuildConfig, Mapping, ModelConfig
from trtlab.model.decoder import decoder
from trtlab.model.rope import rotary_table
from trtlab.model.weights import ModelWeights, rank_weights
from trtlab.ops.fast import with_fast_kernels, with_large_laid_out
from trtlab.ops.torch import NewTokens, PackedBatch, SlotCache, TorchOps, spread
from trtlab.parallel.comm import Comm, RankFailed, Solo, ThreadComm, thread_group


@dataclass(frozen=True)
class Chunk:
    """New tokens of one request: they follow ``past`` tokens that its slot holds already."""

    slot: int
    past: int
    token_ids: Sequence[int]


@dataclass(frozen=True)
class StepInputs:
    """One step: at most one chunk a slot. ``every_token`` asks for the logits of all rows, not of each last one."""

    chunks: Sequence[Chunk]
    every_token: bool = False


class Executor(Protocol):
    """What a session needs of a backend."""

    name: str

    def run(self, step: StepInputs) -> Tensor:
        """Logits in float32: ``[chunks, vocab]``, or ``[tokens, vocab]`` with ``every_token``, in the chunks' order."""
        ...

    def close(self) -> None:
        """Free what the executor holds; a second call is harmless."""
        ...


def compute_dtype(build: BuildConfig, device: torch.device) -> torch.dtype:
    """float32 on a CPU, whatever the storage: bfloat16 ties break differently from machine to machine."""
    return torch.float32 if device.type == "cpu" else getattr(torch, build.dtype or "float32")


class TorchExecutor:
    """The decoder in torch; several ranks run as threads of this process, on one device."""

    name = "torch"

    def __init__(
        self,
        config: ModelConfig,
        build: BuildConfig,
        mapping: Mapping,
        ranks: Sequence[dict[str, Tensor]],
        device: torch.device,
        *,
        fast: bool = False,
    ) -> None:
        fast = fast and device.type == "cpu"
        dtype = torch.bfloat16 if fast else compute_dtype(build, device)
        rotary = spread(rotary_table(config, build.seq_len), dtype, device)
        self._config = config
        self._device = device
        self._rotary = rotary
        self._weights: list[ModelWeights] = []
        self._caches: list[SlotCache] = []
        for rank, tensors in enumerate(ranks):
            on_device = {
                name: tensor.to(device, dtype if tensor.dtype == config.torch_dtype else tensor.dtype)
                for name, tensor in tensors.items()  # integers, FP8 and their scales stay as they are stored
            }
            weights = rank_weights(config, mapping, rank, on_device)
            weights = with_fast_kernels(weights) if fast else with_large_laid_out(weights)
            self._weights.append(weights)
            self._caches.append(_cache(config, build, weights, dtype, device))
        self._mapping = mapping
        self._pool = ThreadPoolExecutor(len(mapping.ranks)) if len(mapping.ranks) > 1 else None

    @torch.inference_mode()
    def run(self, step: StepInputs) -> Tensor:
        """See Executor."""
        order = sorted(range(len(step.chunks)), key=lambda i: len(step.chunks[i].token_ids) > 1)
        chunks = [step.chunks[i] for i in order]
        sequences = [NewTokens(c.slot, c.past, len(c.token_ids)) for c in chunks]
        batch = PackedBatch(sequences, self._rotary, self._device)
        tokens = torch.tensor([t for c in chunks for t in c.token_ids], device=self._device)
        logits = self._forward(batch, tokens, step.every_token)
        if order == sorted(order):
            return logits
        if not step.every_token:
            return logits[torch.tensor(order, device=self._device).argsort()]
        parts = torch.split(logits, [s.length for s in sequences])
        return torch.cat([parts[order.index(i)] for i in range(len(order))])

    def _forward(self, batch: PackedBatch, tokens: Tensor, every_token: bool) -> Tensor:
        if self._pool is None:
            return self._rank_forward(0, Solo(), batch, tokens, every_token)
        comms = thread_group(self._mapping)
        futures = [
            self._pool.submit(self._guarded, rank, comm, batch, tokens, every_token) for rank, comm in enumerate(comms)
        ]
        errors = [e for f in futures if (e := f.exception()) is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, RankFailed)), errors[0])
        return futures[-self._mapping.tp_size].result()

    @torch.inference_mode()
    def _guarded(self, rank: int, comm: ThreadComm, batch: PackedBatch, tokens: Tensor, every_token: bool) -> Tensor:
        try:
            return self._rank_forward(rank, comm, batch, tokens, every_token)
        except BaseException:
            comm.abort()
            raise

    def _rank_forward(self, rank: int, comm: Comm, batch: PackedBatch, tokens: Tensor, every_token: bool) -> Tensor:
        ops = TorchOps(batch, self._caches[rank], comm, every_token=every_token)
        return decoder(ops, self._config, self._weights[rank], tokens)

    def close(self) -> None:
        """See Executor."""
        self._weights, self._caches = [], []
        if self._pool is not None:
            self._pool.shutdown()


def _cache(
    config: ModelConfig, build: BuildConfig, weights: ModelWeights, dtype: torch.dtype, device: torch.device
) -> SlotCache:
    return SlotCache(
        layers=len(weights.layers),
        slots=build.max_batch_size,
        kv_heads=weights.kv_heads,
        capacity=build.seq_len,
        head_size=config.head_size,
        dtype=dtype,
        device=device,
        scales=[layer.kv_scales for layer in weights.layers if layer.kv_scales is not None],
    )
