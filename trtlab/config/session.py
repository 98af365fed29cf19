"""How a session runs an engine: frozen, validated, under the names of TensorRT-LLM's executor."""

from __future__ import annotations

from typing import Literal, get_args

from trtlab.config.base import PositiveInt, PositiveShare, Settings, settings

BackendName = Literal["auto", "tensorrt", "torch", "interpreter"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


@settings
class SessionConfig(Settings):
    """How a session runs an engine, under the names of TensorRT-LLM's executor."""

    max_tokens_in_paged_kv_cache: PositiveInt | None = None
    """Most tokens that the pool of KV blocks holds; None derives it from the bounds and the memory.

    On a CPU that is ``max_batch_size * max_seq_len``. More holds more requests and more shared beginnings.
    TensorRT-LLM: ``max_tokens``.
    """
    kv_cache_free_gpu_memory_fraction: PositiveShare = 0.9
    """Share of the GPU memory left by the weights that the pool may take; 0.9 leaves a tenth free.

    The smaller of the two bounds wins; ``session.kv_cache.pool`` shows both. It does not apply on a CPU.
    TensorRT-LLM: ``free_gpu_memory_fraction``.
    """
    enable_block_reuse: bool = True
    """Whether blocks of finished requests are kept for prompts with the same beginning.

    TensorRT-LLM: ``kv_cache_enable_block_reuse``.
    """
    enable_chunked_context: bool = True
    """Whether a prompt longer than ``max_num_tokens`` is read in pieces."""
    capacity_scheduler_policy: Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"] = "GUARANTEED_NO_EVICT"
    """When a request may join: when the pool holds its longest answer, or (MAX_UTILIZATION) at once.

    MAX_UTILIZATION fills the pool better; a request may be interrupted and computed again.
    """
    batching_type: Literal["INFLIGHT", "STATIC"] = "INFLIGHT"
    """Whether requests join and leave at each step, or (STATIC) a batch is closed until all its requests are done.

    STATIC computes the rows of finished requests for nothing, as ``transformers.generate`` does.
    """
    fast_cpu_kernels: bool = False
    """Whether a CPU reads float32 weights rounded to BF16: half the bytes a token (benchmarks/README.md).

    It applies to weights that are read completely for each token, including the head. Products and sums stay float32.
    Weights that BF16 represents exactly are always read in BF16. Not in TensorRT-LLM.
    """
    events_kept: PositiveInt = 10_000
    """Number of last steps that ``session.events`` keeps."""
