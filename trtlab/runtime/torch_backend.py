"""Opens the torch backend: loads the weights on their device, sizes the KV pool, and makes the ranks."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from trtlab.card import size
from trtlab.config.build import BuildConfig, compute_dtype
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.session import SessionConfig
from trtlab.errors import EngineError
from trtlab.model.rope import RotaryTable, rotary_table
from trtlab.model.weights import ModelWeights, rank_weights
from trtlab.ops.cpu.weights import cpu_weights, has_loops
from trtlab.ops.paged import Kernel, PagedCache
from trtlab.ops.torch import spread
from trtlab.parallel.ranks import Rank, RankGroup
from trtlab.runtime.backend import Backend
from trtlab.runtime.cpu_rank import CpuRank
from trtlab.runtime.pool_size import PoolSize, pool_size
from trtlab.runtime.rank_tables import RankTables
from trtlab.runtime.torch_rank import TorchRank

LoadWeights = Callable[[ModelConfig, Mapping, int, dict[str, Tensor]], ModelWeights]
MakeRank = Callable[[ModelConfig, ModelWeights, PagedCache, RankTables, RotaryTable], Rank]


def torch_backend(
    config: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    ranks: Sequence[dict[str, Tensor]],
    device: torch.device,
    session: SessionConfig | None = None,
) -> Backend:
    """Open the decoder in torch on one device.

    Args:
        config: The model.
        build: The engine's bounds, resolved.
        mapping: How the model is split over ranks.
        ranks: The tensors of each rank, by name.
        device: Where all ranks run.
        session: Settings of the pool and the kernels; None for the defaults.

    Raises:
        ConfigError: when not even one block of the KV pool fits.
        EngineError: when a GPU has too little memory; what was allocated is free again.
    """
    try:
        return _opened(config, build, mapping, ranks, device, session or SessionConfig())
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # their locals hold weights, and a notebook keeps a traceback
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        stored = sum(tensor.nbytes for tensors in ranks for tensor in tensors.values())
        raise EngineError(
            f"{device} has too little memory for this session",
            got=f"{size(free)} free of {size(total)}",
            expected=f"{size(stored)} for the weights, and more for the KV pool and a step",
            remedy="close other sessions on this GPU, or bound the pool: max_tokens_in_paged_kv_cache=...",
        ) from error


def _opened(
    config: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    ranks: Sequence[dict[str, Tensor]],
    device: torch.device,
    session: SessionConfig,
) -> Backend:
    dtype = compute_dtype(build, device)
    load, make_rank = _for_device(device, dtype, session)
    weights = [load(config, mapping, rank, tensors) for rank, tensors in enumerate(ranks)]
    pool = _pool_size(config, build, session, weights, dtype, device)
    rotary = spread(rotary_table(config, build.seq_len), dtype, device)
    group = []
    for own in weights:
        tables = RankTables(build.max_batch_size, build.seq_len, pool.tokens_per_block)
        group.append(make_rank(config, own, _cache(config, pool, own, dtype, device), tables, rotary))
    return Backend("torch", pool, RankGroup(group, mapping), device)


def _for_device(device: torch.device, dtype: torch.dtype, session: SessionConfig) -> tuple[LoadWeights, MakeRank]:
    """The function that loads a rank's weights for this device, and the one that makes the rank."""
    if device.type == "cpu":
        loops = has_loops()
        load: LoadWeights = partial(_cpu_weights, loops=loops, round_dense=session.fast_cpu_kernels)
        return load, CpuRank if loops else TorchRank
    return partial(_gpu_weights, dtype=dtype, device=device), partial(TorchRank, kernel=_kernel())


def _kernel() -> Kernel | None:
    """The attention kernel that reads blocks in place, if Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from trtlab.ops.cuda.paged_attention import paged_attention

    return paged_attention


def _cpu_weights(
    config: ModelConfig, mapping: Mapping, rank: int, tensors: dict[str, Tensor], *, loops: bool, round_dense: bool
) -> ModelWeights:
    return cpu_weights(rank_weights(config, mapping, rank, tensors), loops=loops, round_dense=round_dense)


def _gpu_weights(
    config: ModelConfig,
    mapping: Mapping,
    rank: int,
    tensors: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> ModelWeights:
    on_device = {
        name: tensor.to(device, dtype if tensor.dtype == config.torch_dtype else tensor.dtype)
        for name, tensor in tensors.items()  # integers, FP8 and their scales stay as they are stored
    }
    return rank_weights(config, mapping, rank, on_device)


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
    """Free bytes of a GPU, including what torch has reserved and does not use; None for a CPU."""
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
