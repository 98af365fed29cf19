"""TensorRT-LLM's names of a model's tensors, inside the layers and outside them."""

from __future__ import annotations

LAYER_PREFIX = "transformer.layers."
EMBEDDING = "transformer.vocab_embedding.weight"
POSITIONS = "transformer.position_embedding.weight"
FINAL_NORM = "transformer.ln_f"
HEAD = "lm_head.weight"


def layer_name(layer: int, part: str) -> str:
    """``transformer.layers.3.attention.qkv.weight`` from 3 and ``attention.qkv.weight``."""
    return f"{LAYER_PREFIX}{layer}.{part}"


def split_layer_name(name: str) -> tuple[int, str] | None:
    """The inverse of ``layer_name``; None for a tensor outside the layers."""
    if not name.startswith(LAYER_PREFIX):
        return None
    number, part = name.removeprefix(LAYER_PREFIX).split(".", 1)
    return int(number), part
