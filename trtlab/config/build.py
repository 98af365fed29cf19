"""The bounds that an engine is built for: frozen, validated, named as TensorRT-LLM names them."""

from __future__ import annotations

import dataclasses
import logging
from typing import Annotated, Any

import torch
from pydantic import Field

from trtlab.config.base import PositiveInt, Settings, normalize, settings
from trtlab.config.model import DtypeName, ModelConfig
from trtlab.errors import ConfigError
from trtlab.validation import describe, did_you_mean, shorten

logger = logging.getLogger("trtlab")

DEFAULT_INPUT_LEN = 1024  # where max_input_len is None and max_seq_len allows it
DEFAULT_SEQ_LEN = 2048  # where max_seq_len is None and the model allows it

# TensorRT-LLM build flags that have no counterpart, and why.
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
OLD_FLAGS = ("max_output_len", "max_beam_width", *OBSOLETE_BUILD_FLAGS)  # what from_trtllm takes besides fields


@settings
class BuildConfig(Settings):
    """The bounds that an engine is built for; the defaults suit a notebook, not a data centre."""

    max_batch_size: PositiveInt = 8
    """Most requests that run in one step. More serves more at once and takes more memory for K and V."""
    max_input_len: PositiveInt | None = None
    """Longest prompt in tokens; None becomes 1024, or ``max_seq_len`` where that is less."""
    max_seq_len: PositiveInt | None = None
    """Longest request in tokens, prompt and answer together; None becomes 2048, or the model's where that is less."""
    max_num_tokens: PositiveInt = 2048
    """Most tokens that one step computes over all its requests. More reads prompts faster and takes more memory."""
    tokens_per_block: PositiveInt = 32
    """Tokens in one block of the KV cache. Small blocks waste less and share more, large ones are faster to read."""
    dtype: DtypeName | None = None
    """Type that the plan computes in; None takes the checkpoint's."""
    weight_streaming: bool = False
    """Whether weights may stay in the host's memory while the plan runs; this is slower and frees GPU memory."""
    compute_capabilities: tuple[str, ...] = ()
    """Targets of the plan, such as ``("8.9",)``; empty means all that the TensorRT library supports."""
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    """How long TensorRT looks for fast kernels, 0 to 5; None is TensorRT's default.

    TensorRT-LLM: ``--builder_opt``.
    """
    notes: tuple[str, ...] = ()
    """Why old flags have no effect; ``BuildConfig.from_trtllm`` fills it in."""

    def __post_init__(self) -> None:
        if self.max_input_len is not None and self.max_seq_len is not None and self.max_input_len > self.max_seq_len:
            raise ConfigError(
                f"max_input_len {self.max_input_len} exceeds max_seq_len {self.max_seq_len}",
                remedy="max_seq_len counts prompt and answer together: raise it, or lower max_input_len",
            )
        if self.max_num_tokens < self.max_batch_size:
            raise ConfigError(
                f"max_num_tokens {self.max_num_tokens} is below max_batch_size {self.max_batch_size}",
                remedy="a generation step feeds one token a request: raise max_num_tokens",
            )

    @classmethod
    def from_trtllm(cls, **flags: Any) -> BuildConfig:
        """The bounds from ``trtllm-build``'s flags; ``notes`` explains each flag that has no effect.

        Args:
            flags: The fields of BuildConfig, ``max_output_len``, ``max_beam_width`` (1 only), and the flags without a
                counterpart, from ``gemm_plugin`` to ``multi_block_mode``; a flag that is None is left out.

        Raises:
            ConfigError: For an unknown flag, beam search, ``max_output_len`` together with ``max_seq_len``, and values
                that BuildConfig refuses.
        """
        known = (*(field.name for field in dataclasses.fields(cls)), *OLD_FLAGS)
        for flag in flags.keys() - set(known):
            remedy = did_you_mean(flag, known) or f"known flags are {', '.join(known)}"
            raise ConfigError(f"BuildConfig.from_trtllm: unknown flag {flag}", remedy=remedy)
        old = {flag: value for flag, value in flags.items() if flag in OLD_FLAGS and value is not None}
        bounds = cls(**{flag: value for flag, value in flags.items() if flag not in OLD_FLAGS})
        notes = []
        if "max_output_len" in old:
            bounds = bounds._with_output_len(normalize(old["max_output_len"]))
            notes.append(f"max_output_len={old['max_output_len']} is the old spelling of max_seq_len={bounds.seq_len}")
        beams = normalize(old.get("max_beam_width", 1))
        if type(beams) is not int or beams != 1:
            raise ConfigError("beam search is not supported yet", got=f"max_beam_width={shorten(beams)}", expected=1)
        notes += [
            f"{flag}={shorten(old[flag])} has no effect: {meaning}"
            for flag, meaning in OBSOLETE_BUILD_FLAGS.items()
            if flag in old
        ]
        for note in notes:
            logger.warning(note)
        return dataclasses.replace(bounds, notes=(*bounds.notes, *notes))

    def _with_output_len(self, output_len: object) -> BuildConfig:
        if type(output_len) is not int or output_len < 1:
            expected = describe(PositiveInt)
            raise ConfigError("BuildConfig.max_output_len is not valid", got=shorten(output_len), expected=expected)
        if self.max_seq_len is not None:
            raise ConfigError("max_seq_len and max_output_len were both given", remedy="give max_seq_len alone")
        return dataclasses.replace(self, max_seq_len=(self.max_input_len or DEFAULT_INPUT_LEN) + output_len)

    @classmethod
    def remedy_for_unknown(cls, name: str) -> str | None:
        """Old flags of TensorRT-LLM are for ``from_trtllm``."""
        return f"use BuildConfig.from_trtllm({name}=...), which takes the old flags" if name in OLD_FLAGS else None

    def resolve(self, config: ModelConfig) -> BuildConfig:
        """The bounds for this model: None becomes a value, and ConfigError is raised where the model allows less."""
        limit = config.max_position_embeddings
        seq_len = self.max_seq_len if self.max_seq_len is not None else min(DEFAULT_SEQ_LEN, limit)
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
        if self.max_input_len is not None and self.max_input_len > seq_len:
            raise ConfigError(
                f"max_input_len {self.max_input_len} exceeds max_seq_len {seq_len}",
                remedy=f"use max_input_len={seq_len} or less"
                + (f", or give max_seq_len, at most {limit}" if seq_len < limit else ""),
            )
        bounds = dataclasses.replace(self, max_seq_len=seq_len, dtype=self.dtype or config.dtype)
        return dataclasses.replace(bounds, max_input_len=bounds.input_len)

    @property
    def input_len(self) -> int:
        """``max_input_len``, or its default where it is None; ``max_seq_len`` must be set."""
        return min(DEFAULT_INPUT_LEN, self.seq_len) if self.max_input_len is None else self.max_input_len

    @property
    def seq_len(self) -> int:
        """``max_seq_len`` of a resolved config."""
        assert self.max_seq_len is not None, "max_seq_len is None: call resolve() first"
        return self.max_seq_len


def compute_dtype(build: BuildConfig, device: torch.device) -> torch.dtype:
    """float32 on a CPU, whatever the weights are stored in: ties in bfloat16 break differently on other machines."""
    return torch.float32 if device.type == "cpu" else getattr(torch, build.dtype or "float32")
