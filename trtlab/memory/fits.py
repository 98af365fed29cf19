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
from trtlab.hardware import free_bytes
from trtlab.memory.estimate import RankEstimate, estimate, pool_tokens
from trtlab.parallel.shard import EmbeddingLayout

BUILD_PEAK = 2.6  # peak memory of a build over the bytes of its rank's weights, as measured at 1.1 billion parameters


def require_room_to_build(config: ModelConfig, build: BuildConfig, mapping: Mapping, layout: EmbeddingLayout) -> None:
    """Raise EngineError when building the largest rank's plan takes more memory than this machine has free."""
    largest = estimate(config, build, mapping, layout=layout).largest
    memory, needed = free_bytes(), int(BUILD_PEAK * largest.weight_bytes)
    if memory and needed > memory:
        raise EngineError(
            f"building the plan of rank {largest.rank} takes about {size(needed)}, {BUILD_PEAK} times its weights of "
            f"{size(largest.weight_bytes)}",
            expected=f"at most {size(memory)}, which this machine has free",
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
    """Raise EngineError when weights, KV pool, activations and tables of all ranks do not fit what the device has free.

    A CPU's pool is allocated whole, in float32. A GPU's pool takes the memory that is left, so one block must fit.
    """
    expected = estimate(config, build, mapping, layout=layout)
    widening = compute_dtype(build, device).itemsize / config.torch_dtype.itemsize
    kv_widening = 1.0 if config.quantization.kv_cache_quant_algo else widening
    tokens = pool_tokens(build)
    if session.max_tokens_in_paged_kv_cache is not None:
        tokens = session.max_tokens_in_paged_kv_cache // build.tokens_per_block * build.tokens_per_block
    if device.type == "cuda":
        tokens, memory = build.tokens_per_block, torch.cuda.mem_get_info(device)[0]
    else:
        memory = free_bytes()

    def on_device(rank: RankEstimate) -> RankEstimate:
        per_token = round(rank.kv_bytes_per_token * kv_widening)
        return dataclasses.replace(
            rank,
            kv_bytes_per_token=per_token,
            kv_pool_bytes=tokens * per_token,
            activation_bytes=round(rank.activation_bytes * widening),
            table_bytes=_table_bytes(config, build),
        )

    ranks = tuple(on_device(rank) for rank in expected.ranks)
    if memory:
        dataclasses.replace(expected, ranks=ranks).require_fits(memory / len(ranks))


def _table_bytes(config: ModelConfig, build: BuildConfig) -> int:
    """The most bytes of a session's tables: angles by position while they are made, and the blocks of every slot."""
    float32, number, pointer, slot = 4, 4, 8, 200
    angles = 4 * build.seq_len * config.head_size * float32 if config.uses_rotary else 0
    blocks = -(-build.seq_len // build.tokens_per_block)
    return angles + build.max_batch_size * (slot + blocks * (number + pointer))
