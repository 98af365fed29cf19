"""The bounds that an engine is built for: frozen, validated, named as TensorRT-LLM names them."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import InitVar, dataclass

import torch

from trtlab.config.base import Settings, check_types
from trtlab.config.model import ModelConfig, require_positive, torch_dtype
from trtlab.errors import ConfigError

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


def compute_dtype(build: BuildConfig, device: torch.device) -> torch.dtype:
    """float32 on a CPU, whatever the storage: bfloat16 ties break differently from machine to machine."""
    return torch.float32 if device.type == "cpu" else getattr(torch, build.dtype or "float32")
