"""Mistral: LLaMA's tensors, no bias, and a sliding window whose size its config may leave out."""

from __future__ import annotations

from trtlab.convert.families.family import Family
from trtlab.convert.families.llama import DEFAULTS, NAMES

MISTRAL = Family(
    NAMES,
    {**DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    attn_bias=False,
    model_type="mistral",
    window="every layer",
)
