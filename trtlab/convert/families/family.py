"""Defines a family: the defaults of its config, its fixed settings, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trtlab.config.model import ModelConfig
from trtlab.model.blocks import QKV
from trtlab.model.names import split_layer_name
from trtlab.model.tensor_specs import tensor_specs


@dataclass(frozen=True)
class NameTable:
    """A source's names of the modules, by TensorRT-LLM's names.

    ``outside`` has the modules outside the layers. ``layer`` is the prefix of a layer, with ``{}`` for its number.
    ``parts`` has the modules of a layer: several where TensorRT-LLM joins them by rows into one.
    """

    outside: Mapping[str, str]
    layer: str
    parts: Mapping[str, tuple[str, ...]]

    def sources(self, config: ModelConfig) -> dict[str, tuple[str, ...]]:
        """For each tensor, by TensorRT-LLM's name, the source's names in the order of its rows."""
        return {name: self._source(name) for name in tensor_specs(config)}

    def _source(self, name: str) -> tuple[str, ...]:
        place, (module, _, kind) = split_layer_name(name), name.rpartition(".")
        if place is None:
            return (f"{self.outside[module]}.{kind}",)
        number, part = place
        parts = self.parts[part.removesuffix(f".{kind}")]
        return tuple(f"{self.layer.format(number)}.{source}.{kind}" for source in parts)

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the source must hold, by the source's name."""
        return {
            source: shape
            for name, spec in tensor_specs(config).items()
            for source, shape in zip(self._source(name), _source_shapes(config, name, spec.shape), strict=True)
        }


@dataclass(frozen=True)
class Family:
    """One architecture by Hugging Face's name.

    ``defaults`` are the values of keys that config.json leaves out. Where ``attn_bias`` is None, the config's
    ``attention_bias`` decides, also for the output projection. ``mlp_bias`` is whether the config's key is read.
    ``model_type`` is Hugging Face's short name. ``window`` is where the attention window comes from: no key, the key
    ``sliding_window``, or also the keys that switch it on and choose its layers. ``settings`` are the fields of
    ModelConfig that are fixed for the family, such as its norm. ``trtllm_keys`` are the keys that TensorRT-LLM's
    config.json needs for this family alone.
    """

    names: NameTable
    defaults: Mapping[str, Any]
    attn_bias: bool | None = None
    qk_layernorm: bool = False
    mlp_bias: bool = False
    model_type: str | None = None
    window: Literal["none", "every layer", "by layer"] = "none"
    settings: Mapping[str, Any] = field(default_factory=dict)
    trtllm_keys: Mapping[str, Any] = field(default_factory=dict)


def _source_shapes(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of the source tensors of ``name``, which has ``shape``: three for a fused projection, else one."""
    place = split_layer_name(name)
    if place is None or place[1].rpartition(".")[0] != QKV.part:
        return (shape,)
    q_rows = config.num_attention_heads * config.head_size
    kv_rows = config.num_key_value_heads * config.head_size
    return tuple((rows, *shape[1:]) for rows in (q_rows, kv_rows, kv_rows))
