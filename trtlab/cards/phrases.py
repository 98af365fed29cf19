"""Phrases that several cards share: a model's attention and positions, an engine's bounds."""

from __future__ import annotations

from trtlab.config.build import BuildConfig
from trtlab.config.model import ModelConfig


def attention_phrase(config: ModelConfig) -> str:
    """The kind of attention, with its heads."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    kind = "multi-head" if heads == kv_heads else "multi-query" if kv_heads == 1 else "grouped-query"
    return f"{kind}: {heads} query heads over {kv_heads} key/value heads of {config.head_size}"


def position_phrase(config: ModelConfig) -> str:
    """The longest text, and the settings of the rotary embedding."""
    scaling = config.rotary_scaling
    how = f", {scaling.kind} scaling x{scaling.factor:g}" if scaling else ""
    window = f", sliding window {config.sliding_window:,}" if config.sliding_window else ""
    return f"up to {config.max_position_embeddings:,}, rotary base {config.rotary_base:g}{how}{window}"


def bounds_phrase(build: BuildConfig) -> str:
    """The bounds of an engine."""
    return (
        f"max_batch_size {build.max_batch_size}, max_input_len {build.input_len}, "
        f"max_seq_len {build.max_seq_len}, max_num_tokens {build.max_num_tokens}"
    )
