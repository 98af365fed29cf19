"""TensorRT-LLM's names of a model's tensors, inside the layers and outside them."""

from __future__ import annotations

from collections.abc import Container

from trtlab.config.quant import HEAD_MODULE

LAYER_PREFIX = "transformer.layers."
EMBEDDING = "transformer.vocab_embedding.weight"
POSITIONS = "transformer.position_embedding.weight"
FINAL_NORM = "transformer.ln_f"
HEAD = f"{HEAD_MODULE}.weight"


def source_name(name: str, tensors: Container[str]) -> str:
    """The name under which ``tensors`` hold an unquantized weight: a tied model's head is its token table."""
    return EMBEDDING if name == HEAD and HEAD not in tensors else name


def layer_name(layer: int | None, part: str) -> str:
    """``transformer.layers.3.attention.qkv.weight`` from 3 and ``attention.qkv.weight``; None is outside the layers."""
    return part if layer is None else f"{LAYER_PREFIX}{layer}.{part}"


def split_layer_name(name: str) -> tuple[int, str] | None:
    """The inverse of ``layer_name``; None for a tensor outside the layers."""
    if not name.startswith(LAYER_PREFIX):
        return None
    number, part = name.removeprefix(LAYER_PREFIX).split(".", 1)
    return int(number), part
