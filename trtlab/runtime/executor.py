"""Runs one step of a batch and gives its logits. Knows slots, blocks and tokens; knows no requests and no text."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from trtlab.config.build import BuildConfig, compute_dtype
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.session import SessionConfig
from trtlab.model.decoder import decoder
from trtlab.model.rope import rotary_table
from trtlab.model.weights import ModelWeights, rank_weights
from trtlab.ops.cpu.ops import CpuBatch, CpuOps, CpuPool, compile_loops
from trtlab.ops.cpu.weights import cpu_weights, has_loops
from trtlab.ops.paged import BlockTables, Kernel, NewTokens, PackedBatch, PagedCache
from trtlab.ops.torch import TorchOps, spread
from trtlab.parallel.comm import Comm, RankFailed, Solo, ThreadComm, thread_group
from trtlab.parallel.step import Chunk, StepInputs
from trtlab.runtime.packing import RankTables, in_step_order, singles_first
from trtlab.runtime.pool import PoolSize, pool_size


class Executor(Protocol):
    """What a session needs of a backend."""

    name: str
    pool: PoolSize

    def run(self, step: StepInputs) -> Tensor:
        """Logits in float32: ``[chunks, vocab]``, or ``[tokens, vocab]`` with ``every_token``, in the chunks' order."""
        ...

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of the pool, (source, target) one after another; asked only of a paged pool."""
        ...

    def close(self) -> None:
        """Free what the executor holds; a second call is harmless."""
        ...


Batch = PackedBatch | CpuBatch


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
        session: SessionConfig | None = None,
    ) -> None:
        session = session or SessionConfig()
        dtype = compute_dtype(build, device)
        self._config = config
        self._device = device
        self._rotary = spread(rotary_table(config, build.seq_len), dtype, device)
        loops = device.type == "cpu" and has_loops()
        self._weights: list[ModelWeights] = []
        for rank, tensors in enumerate(ranks):
            if device.type == "cpu":
                weights = rank_weights(config, mapping, rank, tensors)
                self._weights.append(cpu_weights(weights, loops=loops, round_dense=session.fast_cpu_kernels))
            else:
                on_device = {
                    name: tensor.to(device, dtype if tensor.dtype == config.torch_dtype else tensor.dtype)
                    for name, tensor in tensors.items()  # integers, FP8 and their scales stay as they are stored
                }
                self._weights.append(rank_weights(config, mapping, rank, on_device))
        self.pool = _pool_size(config, build, session, self._weights, dtype, device)
        self._caches = [_cache(config, self.pool, weights, dtype, device) for weights in self._weights]
        self._cpu_pools = [CpuPool(cache) for cache in self._caches] if loops else []
        for weights, pool in zip(self._weights, self._cpu_pools, strict=False):
            compile_loops(weights, pool)
        self._cpu_rotary = (self._rotary.cos.numpy(), self._rotary.sin.numpy()) if loops else None
        self._tables = RankTables(build.max_batch_size, build.seq_len, build.tokens_per_block)
        self._kernel = _kernel(device)
        self._mapping = mapping
        self._threads = ThreadPoolExecutor(len(mapping.ranks)) if len(mapping.ranks) > 1 else None

    @torch.inference_mode()
    def run(self, step: StepInputs) -> Tensor:
        """See Executor."""
        order, chunks = singles_first(step.chunks)
        batch = self.batch(chunks, self._tables.update(chunks))
        return in_step_order(self.forward(batch, step.every_token), order, chunks, step.every_token)

    @torch.inference_mode()
    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """See Executor."""
        for cache in self._caches:
            cache.copy(copies)

    def batch(self, chunks: Sequence[Chunk], tables: BlockTables) -> Batch:
        """The inputs of a step; chunks of one token come first."""
        if self._cpu_rotary is not None:
            return CpuBatch([chunk[:3] for chunk in chunks], tables)
        sequences = [NewTokens(slot, past, len(token_ids)) for slot, past, token_ids, _ in chunks]
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        return PackedBatch(sequences, self._rotary, tables, self._device, self._kernel, token_ids)

    def forward(self, batch: Batch, every_token: bool) -> Tensor:
        """The model's part of a step: logits in the batch's order."""
        if self._threads is None:
            return self._rank_forward(0, Solo(), batch, every_token)
        comms = thread_group(self._mapping)
        futures = [
            self._threads.submit(self._guarded, rank, comm, batch, every_token) for rank, comm in enumerate(comms)
        ]
        errors = [e for f in futures if (e := f.exception()) is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, RankFailed)), errors[0])
        return futures[-self._mapping.tp_size].result()

    @torch.inference_mode()
    def _guarded(self, rank: int, comm: ThreadComm, batch: Batch, every_token: bool) -> Tensor:
        try:
            return self._rank_forward(rank, comm, batch, every_token)
        except BaseException:
            comm.abort()
            raise

    def _rank_forward(self, rank: int, comm: Comm, batch: Batch, every_token: bool) -> Tensor:
        if isinstance(batch, CpuBatch):
            assert self._cpu_rotary is not None, "a CPU's batch comes with its tables"
            on_cpu = CpuOps(batch, self._cpu_pools[rank], self._cpu_rotary, comm, every_token=every_token)
            return torch.from_numpy(decoder(on_cpu, self._config, self._weights[rank], batch.token_ids))
        ops = TorchOps(batch, self._caches[rank], comm, every_token=every_token)
        return decoder(ops, self._config, self._weights[rank], batch.token_ids)

    def close(self) -> None:
        """See Executor."""
        self._weights, self._caches, self._cpu_pools = [], [], []
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if self._threads is not None:
            self._threads.shutdown()


def _pool_size(
    config: ModelConfig,
    build: BuildConfig,
    session: SessionConfig,
    weights: Sequence[ModelWeights],
    dtype: torch.dtype,
    device: torch.device,
) -> PoolSize:
    stored = [(rank.layers[0].kv_scales.dtype if rank.layers[0].kv_scales else dtype).itemsize for rank in weights]
    block_bytes = sum(
        2 * len(rank.layers) * rank.kv_heads * config.head_size * build.tokens_per_block * itemsize  # K and V
        for rank, itemsize in zip(weights, stored, strict=True)
    )
    return pool_size(build, session, block_bytes, free_bytes=_free_bytes(device))


def _free_bytes(device: torch.device) -> int | None:
    """What is left on a GPU, with what torch holds unused; None for a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _cache(
    config: ModelConfig, pool: PoolSize, weights: ModelWeights, dtype: torch.dtype, device: torch.device
) -> PagedCache:
    return PagedCache(
        layers=len(weights.layers),
        kv_heads=weights.kv_heads,
        num_blocks=pool.num_blocks,
        tokens_per_block=pool.tokens_per_block,
        head_size=config.head_size,
        dtype=dtype,
        device=device,
        scales=[layer.kv_scales for layer in weights.layers if layer.kv_scales is not None],
    )


def _kernel(device: torch.device) -> Kernel | None:
    """The kernel that reads blocks in place, on a GPU where Triton is installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from trtlab.ops.cuda.paged_attention import paged_attention

    return paged_attention
