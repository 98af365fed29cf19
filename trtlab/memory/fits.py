"""Checks that this machine has enough memory for a build or a session. Reads no weight; errors show the numbers."""

from __future__ import annotations

import dataclasses

import torch

from trtlab.card import size
from trtlab.config.build import BuildConfig, compute_dtype
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.session import SessionConfig
from trtlab.errors import EngineError
from trtlab.hardware import memory_bytes
from trtlab.memory.estimate import RankEstimate, estimate
from trtlab.parallel.shard import EmbeddingLayout

BUILD_PEAK = 2.6  # peak memory of a build over the bytes of its rank's weights, as measured at 1.1 billion parameters


def require_room_to_build(config: ModelConfig, build: BuildConfig, mapping: Mapping, layout: EmbeddingLayout) -> None:
    """Raise EngineError when building the largest rank's plan takes more memory than this machine has."""
    largest = estimate(config, build, mapping, layout=layout).largest
    memory, needed = memory_bytes(), int(BUILD_PEAK * largest.weight_bytes)
    if memory and needed > memory:
        raise EngineError(
            f"building the plan of rank {largest.rank} takes about {size(needed)}, {BUILD_PEAK} times its weights of "
            f"{size(largest.weight_bytes)}",
            expected=f"at most {size(memory)}, which this machine has",
            remedy="split the weights over more ranks (tp_size), quantize them, or build with plan=False",
        )


def require_room_to_run(
    config: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    layout: EmbeddingLayout,
    session: SessionConfig,
    device: torch.device,
) -> None:
    """Raise EngineError when weights, KV pool and activations of all ranks do not fit the device's memory.

    A CPU's pool is allocated whole, in float32. A GPU's pool takes the memory that is left, so one block must fit.
    """
    expected = estimate(config, build, mapping, layout=layout)
    widening = compute_dtype(build, device).itemsize / config.torch_dtype.itemsize
    kv_widening = 1.0 if config.quantization.kv_cache_quant_algo else widening
    tokens = build.max_batch_size * build.seq_len
    if session.max_tokens_in_paged_kv_cache is not None:
        tokens = session.max_tokens_in_paged_kv_cache
    if device.type == "cuda":
        tokens, memory = build.tokens_per_block, torch.cuda.mem_get_info(device)[0]
    else:
        memory = memory_bytes()

    def on_device(rank: RankEstimate) -> RankEstimate:
        per_token = round(rank.kv_bytes_per_token * kv_widening)
        return dataclasses.replace(
            rank,
            kv_bytes_per_token=per_token,
            kv_pool_bytes=tokens * per_token,
            activation_bytes=round(rank.activation_bytes * widening),
        )

    ranks = tuple(on_device(rank) for rank in expected.ranks)
    if memory:
        dataclasses.replace(expected, ranks=ranks).require_fits(memory / len(ranks))
