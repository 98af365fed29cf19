"""The families that the decoder serves, as data: what their configs say and what their tensors are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from trtlab.config.model import ModelConfig
from trtlab.model.tensor_specs import layer_name
from trtlab.model.weights import EMBEDDING, FINAL_NORM, HEAD, tensor_specs


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture: what a missing config key means, and what is fixed."""

    defaults: Mapping[str, Any]
    attn_bias: bool | None = None  # None: the config's attention_bias, on the output projection too
    qk_layernorm: bool = False
    mlp_bias: bool = False  # whether the config may ask for one


_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "sliding_window": None,
}

_SWITCHED_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(
            {**_COMMON, "num_key_value_heads": None, "max_position_embeddings": 2048}, mlp_bias=True
        ),
        "MistralForCausalLM": Family({**_COMMON, "sliding_window": 4096}, attn_bias=False),
        "Qwen2ForCausalLM": Family({**_COMMON, **_SWITCHED_WINDOW}, attn_bias=True),
        "Qwen3ForCausalLM": Family({**_COMMON, **_SWITCHED_WINDOW, "head_dim": 128}, qk_layernorm=True),
    }
)

# TensorRT-LLM's part of a layer's name, and Hugging Face's; what is fused is put together by rows.
_HUGGING_FACE_PARTS = {
    "input_layernorm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "attention.q_layernorm": ("self_attn.q_norm",),
    "attention.k_layernorm": ("self_attn.k_norm",),
    "post_layernorm": ("post_attention_layernorm",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
_META_PARTS = {
    "input_layernorm": ("attention_norm",),
    "attention.qkv": ("attention.wq", "attention.wk", "attention.wv"),
    "attention.dense": ("attention.wo",),
    "post_layernorm": ("ffn_norm",),
    "mlp.fc": ("feed_forward.w1",),
    "mlp.gate": ("feed_forward.w3",),
    "mlp.proj": ("feed_forward.w2",),
}


@dataclass(frozen=True)
class NameTable:
    """What a source calls the tensors: those outside the layers, the prefix of a layer, and a layer's parts."""

    outside: Mapping[str, str]
    layer: str
    parts: Mapping[str, tuple[str, ...]]

    def sources(self, config: ModelConfig) -> dict[str, tuple[str, ...]]:
        """For each tensor of the model by TensorRT-LLM's name, the source's names in the order of its rows."""
        names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in self.outside.items()}
        for index in range(config.num_hidden_layers):
            for ours, theirs in self.parts.items():
                for kind in ("weight", "bias"):
                    names[layer_name(index, f"{ours}.{kind}")] = tuple(
                        f"{self.layer.format(index)}.{part}.{kind}" for part in theirs
                    )
        return {name: names[name] for name in tensor_specs(config)}

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the source must hold, by the source's name."""
        return {
            theirs: shape
            for ours, names in self.sources(config).items()
            for theirs, shape in zip(names, source_shapes(config, ours), strict=True)
        }


HUGGING_FACE_NAMES = NameTable(
    {EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.norm.weight", HEAD: "lm_head.weight"},
    "model.layers.{}",
    _HUGGING_FACE_PARTS,
)
META_NAMES = NameTable(
    {EMBEDDING: "tok_embeddings.weight", FINAL_NORM: "norm.weight", HEAD: "output.weight"}, "layers.{}", _META_PARTS
)


def source_shapes(config: ModelConfig, name: str) -> tuple[tuple[int, ...], ...]:
    """The shapes of the tensors that make up ``name``: three for a fused projection, else one."""
    shape = tensor_specs(config)[name].shape
    if ".attention.qkv." not in name:
        return (shape,)
    q_rows = config.num_attention_heads * config.head_size
    kv_rows = config.num_key_value_heads * config.head_size
    return tuple((rows, *shape[1:]) for rows in (q_rows, kv_rows, kv_rows))
