"""How large the pool of KV blocks is, and why: every bound that was considered, and the one that won."""

from __future__ import annotations

from dataclasses import dataclass

from trtlab.card import Shown
from trtlab.config.build import BuildConfig
from trtlab.config.session import SessionConfig
from trtlab.errors import ConfigError


@dataclass(frozen=True)
class Bound:
    """One bound on the pool: what sets it, and how many blocks it allows."""

    name: str
    blocks: int


@dataclass(frozen=True, repr=False)
class PoolSize(Shown):
    """The pool's blocks; ``block_bytes`` are those of K and V over all layers and ranks.

    ``paged`` tells whether the memory lies in these blocks, or in one slot a request with the blocks as its account.
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
        """The bound that decided."""
        return min(self.bounds, key=lambda bound: bound.blocks).name


def pool_size(
    build: BuildConfig,
    session: SessionConfig,
    block_bytes: int,
    *,
    free_bytes: int | None = None,
    paged: bool = True,
) -> PoolSize:
    """The pool for an engine's bounds; ``free_bytes`` is what a GPU has left once the weights lie on it, else None.

    On a GPU the smaller of ``max_tokens_in_paged_kv_cache`` and the fraction of what is free wins, and the pool takes
    it whole: smaller K and V make more blocks, not less memory. Elsewhere the default holds ``max_batch_size`` requests
    of ``max_seq_len`` tokens. Raises ConfigError when not one block fits.
    """
    size, bounds = build.tokens_per_block, []
    if session.max_tokens_in_paged_kv_cache is not None:
        bounds.append(Bound("max_tokens_in_paged_kv_cache", session.max_tokens_in_paged_kv_cache // size))
    if free_bytes is not None:
        share = int(free_bytes * session.kv_cache_free_gpu_memory_fraction)
        bounds.append(Bound("kv_cache_free_gpu_memory_fraction", share // block_bytes))
    elif not bounds:
        bounds.append(Bound("max_batch_size x max_seq_len", build.max_batch_size * -(-build.seq_len // size)))
    fewest = min(bound.blocks for bound in bounds)
    if fewest < 1:
        raise ConfigError(
            "the KV cache has no room for one block",
            got=", ".join(f"{bound.name}: {bound.blocks} blocks" for bound in bounds),
            expected=f"at least one block of {size} tokens, {block_bytes} bytes",
            remedy="raise max_tokens_in_paged_kv_cache, or free memory on the GPU",
        )
    return PoolSize(fewest, size, block_bytes, tuple(bounds), paged, free_bytes)
