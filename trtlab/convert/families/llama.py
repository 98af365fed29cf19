"""LLaMA: the names of its tensors in Hugging Face's, Meta's and llama.cpp's format, and the defaults of its config."""

from __future__ import annotations

from typing import Any

from trtlab.convert.families.family import Family, NameTable

NAMES = NameTable(
    outside={
        "transformer.vocab_embedding": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "lm_head": "lm_head",
    },
    layer="model.layers.{}",
    parts={
        "input_layernorm": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.dense": ("self_attn.o_proj",),
        "attention.q_layernorm": ("self_attn.q_norm",),
        "attention.k_layernorm": ("self_attn.k_norm",),
        "post_layernorm": ("post_attention_layernorm",),
        "mlp.fc": ("mlp.gate_proj",),
        "mlp.gate": ("mlp.up_proj",),
        "mlp.proj": ("mlp.down_proj",),
    },
)
META_NAMES = NameTable(
    outside={
        "transformer.vocab_embedding": "tok_embeddings",
        "transformer.ln_f": "norm",
        "lm_head": "output",
    },
    layer="layers.{}",
    parts={
        "input_layernorm": ("attention_norm",),
        "attention.qkv": ("attention.wq", "attention.wk", "attention.wv"),
        "attention.dense": ("attention.wo",),
        "post_layernorm": ("ffn_norm",),
        "mlp.fc": ("feed_forward.w1",),
        "mlp.gate": ("feed_forward.w3",),
        "mlp.proj": ("feed_forward.w2",),
    },
)
GGUF_NAMES = NameTable(
    outside={
        "transformer.vocab_embedding": "token_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    layer="blk.{}",
    parts={
        "input_layernorm": ("attn_norm",),
        "attention.qkv": ("attn_q", "attn_k", "attn_v"),
        "attention.dense": ("attn_output",),
        "attention.q_layernorm": ("attn_q_norm",),
        "attention.k_layernorm": ("attn_k_norm",),
        "post_layernorm": ("ffn_norm",),
        "mlp.fc": ("ffn_gate",),
        "mlp.gate": ("ffn_up",),
        "mlp.proj": ("ffn_down",),
    },
)
# The values of keys that config.json leaves out; the other families start from them.
DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "sliding_window": None,
}

LLAMA = Family(
    NAMES,
    {**DEFAULTS, "num_key_value_heads": None, "max_position_embeddings": 2048},
    mlp_bias=True,
    model_type="llama",
)
