"""Qwen2 and Qwen3: LLaMA's tensors; Qwen2 has a bias on query, key and value, Qwen3 norms on query and key."""

from __future__ import annotations

from trtlab.convert.families.family import Family
from trtlab.convert.families.llama import DEFAULTS, NAMES

SWITCHED_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}

QWEN2 = Family(NAMES, {**DEFAULTS, **SWITCHED_WINDOW}, attn_bias=True)
QWEN3 = Family(NAMES, {**DEFAULTS, **SWITCHED_WINDOW, "head_dim": 128}, qk_layernorm=True)
