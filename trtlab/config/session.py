"""How a session runs an engine: frozen, validated, in the words of TensorRT-LLM's executor."""

from __future__ import annotations

from dataclasses import dataclass

from trtlab.config.base import Settings, check_types
from trtlab.config.model import require_positive
from trtlab.errors import ConfigError

CAPACITY_POLICIES = ("GUARANTEED_NO_EVICT", "MAX_UTILIZATION")
BATCHING_TYPES = ("INFLIGHT", "STATIC")


@dataclass(frozen=True)
class SessionConfig(Settings):
    """How a session runs an engine, in the words of TensorRT-LLM's executor.

    ``max_tokens_in_paged_kv_cache`` bounds the pool of KV blocks in tokens, ``kv_cache_free_gpu_memory_fraction`` in
    parts of what a GPU has left beside the weights; the smaller wins (``session.kv_cache.pool`` shows both).
    ``enable_block_reuse`` keeps the blocks of finished requests for prompts with the same beginning.
    ``enable_chunked_context`` splits a prompt longer than ``max_num_tokens``. ``capacity_scheduler_policy`` lets a
    request join when its longest end is sure to fit (GUARANTEED_NO_EVICT), or at once, at the risk that one is
    interrupted and computed again (MAX_UTILIZATION). ``batching_type``
    STATIC closes a batch until all of it is done and computes the rows of those that have ended for nothing, as
    ``transformers.generate`` does.
    ``fast_cpu_kernels`` rounds the float32 weights that a CPU reads whole at each token, the head among them, to BF16:
    half the bytes (benchmarks/README.md). Products and sums stay float32, and weights that BF16 holds exactly are read
    so without being asked.
    ``events_kept`` is how many of the last steps ``session.events`` holds.
    """

    max_tokens_in_paged_kv_cache: int | None = None
    kv_cache_free_gpu_memory_fraction: float = 0.9
    enable_block_reuse: bool = True
    enable_chunked_context: bool = True
    capacity_scheduler_policy: str = "GUARANTEED_NO_EVICT"
    batching_type: str = "INFLIGHT"
    fast_cpu_kernels: bool = False
    events_kept: int = 10_000

    def __post_init__(self) -> None:
        if self.max_tokens_in_paged_kv_cache is not None:
            require_positive("SessionConfig", max_tokens_in_paged_kv_cache=self.max_tokens_in_paged_kv_cache)
        require_positive("SessionConfig", events_kept=self.events_kept)
        check_types(self)
        if not 0 < self.kv_cache_free_gpu_memory_fraction <= 1:
            raise ConfigError(
                "kv_cache_free_gpu_memory_fraction must lie in (0, 1]",
                got=self.kv_cache_free_gpu_memory_fraction,
                remedy="0.9 leaves a tenth of a GPU's free memory",
            )
        for name, known in (("capacity_scheduler_policy", CAPACITY_POLICIES), ("batching_type", BATCHING_TYPES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"unknown {name}", got=repr(getattr(self, name)), expected=" | ".join(known))
