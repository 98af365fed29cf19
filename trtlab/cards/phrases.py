"""Phrases that several cards share: attention and positions, bounds, a folder, the call that builds a model."""

from __future__ import annotations

from pathlib import Path

from trtlab.config.build import DEFAULT_SEQ_LEN, BuildConfig
from trtlab.config.model import ModelConfig
from trtlab.errors import EngineError
from trtlab.tensorrt.emit.quantized import check_algorithm


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


def build_call(config: ModelConfig) -> str:
    """The call that builds an engine of a model, with bounds that it allows."""
    longest = min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)
    try:
        check_algorithm(config)
        plan = ""
    except EngineError:
        plan = ", plan=False"
    return f"checkpoint.build(BuildConfig(max_batch_size=8, max_seq_len={min(DEFAULT_SEQ_LEN, longest)}){plan})"


def folder_facts(folder: Path | None) -> tuple[tuple[str, str], ...]:
    """Where an object lies: from the current folder or from ``~`` where it is below one of them."""
    if folder is None:
        return ()
    for root, sign in ((Path.cwd(), ""), (Path.home(), "~/")):
        if folder.is_relative_to(root) and folder != root:
            return (("folder", f"{sign}{folder.relative_to(root)}"),)
    return (("folder", str(folder)),)
