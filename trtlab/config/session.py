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
    """Most tokens that the pool of KV blocks holds; None derives it from the engine's bounds and the memory.

    On a CPU that is ``max_batch_size * max_seq_len``, on a GPU see ``kv_cache_free_gpu_memory_fraction``. More holds
    more requests and more shared beginnings.
    TensorRT-LLM: ``max_tokens``.
    """
    kv_cache_free_gpu_memory_fraction: PositiveShare | None = None
    """Share of the GPU memory left by the weights that the pool takes; None takes what the engine's bounds can use.

    None is twice ``max_batch_size * max_seq_len`` tokens, the second half for shared beginnings, or 0.9 of that memory
    if this is smaller. A number is TensorRT-LLM's: the pool takes all of that share, unless
    ``max_tokens_in_paged_kv_cache`` is smaller, and a second session gets a share of the rest. The smaller bound wins;
    ``session.kv_cache.pool`` shows all. It does not apply on a CPU.
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
