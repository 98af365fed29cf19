"""Computes the size of the pool of KV blocks, and keeps every bound that was considered. Allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass

from trtlab.card import Shown
from trtlab.config.build import BuildConfig
from trtlab.config.session import SessionConfig
from trtlab.errors import ConfigError
from trtlab.memory.estimate import pool_tokens

FRACTION = "kv_cache_free_gpu_memory_fraction"
DEFAULT_FRACTION = 0.9  # of the free memory: the most that a pool takes on a GPU where no fraction is given


@dataclass(frozen=True)
class Bound:
    """One bound on the pool: the setting behind it, and how many blocks it allows."""

    name: str
    blocks: int


@dataclass(frozen=True, repr=False)
class PoolSize(Shown):
    """The size of the pool and the bounds that led to it.

    ``block_bytes`` are the bytes of one block: K and V of all layers and ranks. With ``paged`` the memory is allocated
    in these blocks; without, each request has a slot of fixed size, and the blocks only keep account of it.
    ``free_bytes`` is what the GPU had left beside the weights, None on a CPU.
    """

    num_blocks: int
    tokens_per_block: int
    block_bytes: int
    bounds: tuple[Bound, ...]
    paged: bool = True
    free_bytes: int | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens that the pool holds."""
        return self.num_blocks * self.tokens_per_block

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_blocks * self.block_bytes

    @property
    def winner(self) -> str:
        """The name of the smallest bound, which decided."""
        return min(self.bounds, key=lambda bound: bound.blocks).name


def pool_size(
    build: BuildConfig,
    session: SessionConfig,
    block_bytes: int,
    *,
    free_bytes: int | None = None,
    paged: bool = True,
) -> PoolSize:
    """Compute the size of the pool for an engine's bounds.

    The smallest of these bounds decides: ``max_tokens_in_paged_kv_cache`` if it is given; on a GPU the fraction of the
    free memory, 0.9 where none is given; and where neither is given, ``max_batch_size`` requests of ``max_seq_len``
    tokens, on a GPU twice that, so that as many blocks again are kept for reuse. A fraction that decides is taken
    whole: smaller K and V give more blocks, not less memory.

    Args:
        build: The engine's bounds, resolved.
        session: The settings that bound the pool.
        block_bytes: Bytes of one block over all layers and ranks.
        free_bytes: What a GPU has left beside the weights; None for a CPU.
        paged: Whether the memory is allocated in blocks.

    Raises:
        ConfigError: when not even one block fits.
    """
    size, bounds = build.tokens_per_block, []
    tokens, fraction = session.max_tokens_in_paged_kv_cache, session.kv_cache_free_gpu_memory_fraction
    if tokens is not None:
        bounds.append(Bound("max_tokens_in_paged_kv_cache", tokens // size))
    elif free_bytes is None:
        bounds.append(Bound("max_batch_size x max_seq_len", pool_tokens(build) // size))
    elif fraction is None:
        bounds.append(Bound("2 x max_batch_size x max_seq_len", 2 * pool_tokens(build) // size))
    if free_bytes is not None:
        share = int(free_bytes * (DEFAULT_FRACTION if fraction is None else fraction))
        bounds.append(Bound(FRACTION, share // block_bytes))
    fewest = min(bound.blocks for bound in bounds)
    if fewest < 1:
        raise ConfigError(
            "the KV cache has no room for one block",
            got=", ".join(f"{bound.name}: {bound.blocks} blocks" for bound in bounds),
            expected=f"at least one block of {size} tokens, {block_bytes} bytes",
            remedy="raise max_tokens_in_paged_kv_cache, or free memory on the GPU",
        )
    return PoolSize(fewest, size, block_bytes, tuple(bounds), paged, free_bytes)
