"""Qwen2 and Qwen3: LLaMA's tensors; Qwen2 has a bias on query, key and value, Qwen3 norms on query and key."""

from __future__ import annotations

from trtlab.convert.families.family import Family
from trtlab.convert.families.llama import DEFAULTS, NAMES

QWEN_DEFAULTS = {
    **DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

QWEN2 = Family(
    NAMES,
    QWEN_DEFAULTS,
    attn_bias=True,
    model_type="qwen2",
    window="by layer",
    trtllm_keys={"qwen_type": "qwen2"},
)
QWEN3 = Family(
    NAMES,
    {**QWEN_DEFAULTS, "head_dim": 128},
    qk_layernorm=True,
    model_type="qwen3",
    window="by layer",
    trtllm_keys={"qwen_type": "qwen3"},
)
