"""Settings of a build, a session and a request: frozen, validated, named as TensorRT-LLM names them.

The shape of a model and its mapping (``trtlab.model_config``) are given here too, as one place to import settings from.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass

from trtlab.errors import ConfigError
from trtlab.model_config import (
    DTYPES,
    Mapping,
    ModelConfig,
    RotaryScaling,
    require_positive,
    torch_dtype,
)
from trtlab.settings import Settings, check_types

__all__ = [
    "DTYPES",
    "BuildConfig",
    "Mapping",
    "ModelConfig",
    "RotaryScaling",
    "SamplingParams",
    "SessionConfig",
    "torch_dtype",
]

logger = logging.getLogger("trtlab")

# TensorRT-LLM build flags that have no counterpart, and what they mean today.
OBSOLETE_BUILD_FLAGS = {
    "gemm_plugin": "TensorRT chooses its own matrix products; there is no GEMM plugin, so every weight can be streamed",
    "gpt_attention_plugin": "attention is a TensorRT layer of its own; there is no plugin to choose",
    "strongly_typed": "every network is strongly typed since TensorRT 11: precision is what the tensors say",
    "remove_input_padding": "torch runs packed tokens, a TensorRT plan padded rows; the tokens are the same",
    "context_fmha": "TensorRT fuses attention where it can",
    "paged_kv_cache": "how K and V are stored belongs to the session, not to the plan",
    "use_paged_context_fmha": "prefill always reads what is cached, so chunked context needs no flag",
    "use_inflight_batching": "batching belongs to the session: SessionConfig(batching_type=...)",
    "multi_block_mode": "a choice of the attention kernel at run time",
}


@dataclass(frozen=True)
class BuildConfig(Settings):
    """The bounds that an engine is built for; the defaults suit a notebook.

    ``max_seq_len=None`` becomes ``min(2048, the model's)`` at build. ``dtype=None`` keeps the checkpoint's.
    ``compute_capabilities`` pins a plan to targets such as ``("8.9",)``; empty builds for all that the library
    serves. ``optimization_level`` is TensorRT's 0 to 5, None its default. Flags of TensorRT-LLM that mean nothing
    today are accepted and answered in ``notes``.
    """

    max_batch_size: int = 8
    max_input_len: int = 1024
    max_seq_len: int | None = None
    max_num_tokens: int = 2048
    tokens_per_block: int = 32
    dtype: str | None = None
    weight_streaming: bool = False
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    notes: tuple[str, ...] = ()
    max_output_len: InitVar[int | None] = None
    max_beam_width: InitVar[int] = 1
    gemm_plugin: InitVar[object] = None
    gpt_attention_plugin: InitVar[object] = None
    strongly_typed: InitVar[object] = None
    remove_input_padding: InitVar[object] = None
    context_fmha: InitVar[object] = None
    paged_kv_cache: InitVar[object] = None
    use_paged_context_fmha: InitVar[object] = None
    use_inflight_batching: InitVar[object] = None
    multi_block_mode: InitVar[object] = None

    def __post_init__(self, max_output_len: int | None, max_beam_width: int, *obsolete: object) -> None:
        if max_output_len is not None:
            self._set_seq_len_from(max_output_len)
        if max_beam_width != 1:
            raise ConfigError("beam search is not supported yet", got=f"max_beam_width={max_beam_width}", expected=1)
        for (flag, meaning), value in zip(OBSOLETE_BUILD_FLAGS.items(), obsolete, strict=True):
            if value is not None:
                self._note(f"{flag}={value!r} has no effect: {meaning}")
        self._validate()

    def _validate(self) -> None:
        require_positive(
            "BuildConfig",
            max_batch_size=self.max_batch_size,
            max_input_len=self.max_input_len,
            max_num_tokens=self.max_num_tokens,
            tokens_per_block=self.tokens_per_block,
        )
        if self.max_seq_len is not None:
            require_positive("BuildConfig", max_seq_len=self.max_seq_len)
        check_types(self)
        if self.max_seq_len is not None:
            if self.max_input_len == BuildConfig.max_input_len:  # the default follows a smaller max_seq_len
                object.__setattr__(self, "max_input_len", min(self.max_input_len, self.max_seq_len))
            if self.max_input_len > self.max_seq_len:
                raise ConfigError(
                    f"max_input_len {self.max_input_len} exceeds max_seq_len {self.max_seq_len}",
                    remedy="max_seq_len counts prompt and answer together: raise it, or lower max_input_len",
                )
        if self.dtype is not None:
            torch_dtype(self.dtype)
        if self.optimization_level is not None and self.optimization_level not in range(6):
            raise ConfigError("optimization_level out of range", got=self.optimization_level, expected="0 to 5")
        if self.max_num_tokens < self.max_batch_size:
            raise ConfigError(
                f"max_num_tokens {self.max_num_tokens} is below max_batch_size {self.max_batch_size}",
                remedy="a generation step feeds one token a request: raise max_num_tokens",
            )

    def _set_seq_len_from(self, max_output_len: int) -> None:
        require_positive("BuildConfig", max_output_len=max_output_len)
        if self.max_seq_len is not None:
            raise ConfigError("max_seq_len and max_output_len were both given", remedy="give max_seq_len alone")
        object.__setattr__(self, "max_seq_len", self.max_input_len + max_output_len)
        self._note(f"max_output_len={max_output_len} is the old spelling of max_seq_len={self.max_seq_len}")

    def _note(self, text: str) -> None:
        logger.warning(text)
        object.__setattr__(self, "notes", (*self.notes, text))

    def resolve(self, config: ModelConfig) -> BuildConfig:
        """The same bounds with ``max_seq_len`` and ``dtype`` filled in for a model, checked against it."""
        limit = config.max_position_embeddings
        seq_len = self.max_seq_len if self.max_seq_len is not None else min(2048, limit)
        if seq_len > limit:
            raise ConfigError(
                f"max_seq_len {seq_len} exceeds the model's max_position_embeddings {limit}",
                remedy=f"use max_seq_len={limit} or less",
            )
        if config.sliding_window is not None and seq_len > config.sliding_window:
            raise ConfigError(
                f"the model's sliding window of {config.sliding_window} tokens is shorter than max_seq_len {seq_len}",
                remedy=f"sliding windows are not supported yet: use max_seq_len={config.sliding_window} or less",
            )
        return dataclasses.replace(
            self,
            max_seq_len=seq_len,
            max_input_len=min(self.max_input_len, seq_len),
            dtype=self.dtype or config.dtype,
        )

    @property
    def seq_len(self) -> int:
        """``max_seq_len`` of a resolved config."""
        assert self.max_seq_len is not None, "resolve() fills max_seq_len in"
        return self.max_seq_len


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


@dataclass(frozen=True)
class SamplingParams(Settings):
    """How the next token is chosen; with none of temperature, top_k and top_p given, greedily.

    ``temperature`` divides the logits, then ``top_k`` keeps the k best and ``top_p`` the smallest set whose
    probability reaches p (Holtzman et al., arXiv:1904.09751). ``repetition_penalty`` divides positive and multiplies
    negative logits of tokens already seen (Keskar et al., arXiv:1909.05858). ``stop`` words end the text before
    them. ``logprobs`` keeps the log-probability of each chosen token, before temperature and filtering.
    """

    max_new_tokens: int = 32
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: Sequence[str] | str | None = ()
    seed: int | None = None
    logprobs: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        require_positive("SamplingParams", max_new_tokens=self.max_new_tokens)
        check_types(self)
        object.__setattr__(self, "stop", tuple(stop))
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ConfigError(
                "temperature must be finite and not negative", got=self.temperature, remedy="0 takes the best token"
            )
        if self.top_k is not None and self.top_k < 0:
            raise ConfigError("top_k must not be negative", got=self.top_k, remedy="0 keeps every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top_p must lie in (0, 1]", got=self.top_p, remedy="1 keeps every token")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                "repetition_penalty must be positive and finite",
                got=self.repetition_penalty,
                remedy="1 changes nothing",
            )
        if "" in stop:
            raise ConfigError("an empty stop word would stop at once", got=self.stop, remedy="leave it out")

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        chosen = (self.temperature, self.top_k, self.top_p)
        return chosen == (None, None, None) or self.temperature == 0 or self.top_k == 1
