"""The tensors of a decoder by TensorRT-LLM's names, and the typed parts that op sets meet. Knows no files."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.model.quantized_weights import KvScales, Quantized, kv_cache_scales, quantized_linear, tensor_bytes
from trtlab.model.tensor_specs import TensorSpec, layer_name, quantized_layer_specs

EMBEDDING = "transformer.vocab_embedding.weight"
FINAL_NORM = "transformer.ln_f.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Embedding:
    """A token table ``[rows, columns]``; ``first_row`` is the id of its first row when it was cut by rows."""

    name: str
    weight: Tensor
    first_row: int | None = None


@dataclass(frozen=True)
class Norm:
    """The gain ``[hidden]`` of an RMSNorm and its epsilon."""

    name: str
    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Dense:
    """A linear layer's weight ``[out, in]`` and bias ``[out]`` as they are stored."""

    name: str
    weight: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return tensor_bytes(self)


Linear = Dense | Quantized


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. ``fc`` is Hugging Face's gate_proj and ``gate`` its up_proj: TensorRT-LLM's names."""

    input_layernorm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    dense: Linear
    post_layernorm: Norm
    fc: Linear
    gate: Linear
    proj: Linear
    kv_scales: KvScales | None = None


@dataclass(frozen=True)
class ModelWeights:
    """What one rank holds. ``heads`` and ``kv_heads`` are the rank's own; the ends are None on inner stages.

    ``gather_embedding`` and ``reduce_embedding`` say how a table cut by columns or by rows is put together.
    """

    heads: int
    kv_heads: int
    layers: tuple[LayerWeights, ...]
    embedding: Embedding | None
    final_norm: Norm | None
    lm_head: Dense | None
    gather_embedding: bool = False
    reduce_embedding: bool = False


def tensor_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of a whole model by name, embedding first, head last; a tied model has no head of its own."""
    hidden = config.hidden_size
    specs = {EMBEDDING: TensorSpec((config.vocab_size, hidden), "embedding")}
    for layer in range(config.num_hidden_layers):
        parts = quantized_layer_specs(config, layer, _layer_specs(config))
        specs |= {layer_name(layer, part): spec for part, spec in parts.items()}
    specs[FINAL_NORM] = TensorSpec((hidden,))
    if not config.tie_word_embeddings:
        specs[HEAD] = TensorSpec((config.vocab_size, hidden), "head")
    return specs


def _layer_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_size
    qkv_rows = q_rows + 2 * config.num_key_value_heads * config.head_size
    specs = {
        "input_layernorm.weight": TensorSpec((hidden,)),
        "attention.qkv.weight": TensorSpec((qkv_rows, hidden), "qkv"),
        "attention.dense.weight": TensorSpec((hidden, q_rows), "columns", dim=1),
        "post_layernorm.weight": TensorSpec((hidden,)),
        "mlp.fc.weight": TensorSpec((inner, hidden), "rows"),
        "mlp.gate.weight": TensorSpec((inner, hidden), "rows"),
        "mlp.proj.weight": TensorSpec((hidden, inner), "columns", dim=1),
    }
    if config.qk_layernorm:
        specs["attention.q_layernorm.weight"] = TensorSpec((config.head_size,))
        specs["attention.k_layernorm.weight"] = TensorSpec((config.head_size,))
    if config.attn_bias:
        specs["attention.qkv.bias"] = TensorSpec((qkv_rows,), "qkv")
    if config.dense_bias:
        specs["attention.dense.bias"] = TensorSpec((hidden,))
    if config.mlp_bias:
        specs["mlp.fc.bias"] = TensorSpec((inner,), "rows")
        specs["mlp.gate.bias"] = TensorSpec((inner,), "rows")
        specs["mlp.proj.bias"] = TensorSpec((hidden,))
    return specs


def rank_weights(config: ModelConfig, mapping: Mapping, rank: int, tensors: abc.Mapping[str, Tensor]) -> ModelWeights:
    """The parts of one rank from its tensors, whose layer numbers count from 0 within the stage.

    How an embedding was cut is read from its shape. A row-parallel bias is kept by the group's first rank alone, so
    that the sum over ranks adds it once. A rank without a head of its own uses its embedding rows (tied weights).
    """
    stage = mapping.layers(rank, config.num_hidden_layers)
    embedding = _embedding(config, mapping, rank, tensors) if mapping.is_first_stage(rank) else None
    last = mapping.is_last_stage(rank)
    return ModelWeights(
        heads=config.num_attention_heads // mapping.tp_size,
        kv_heads=max(1, config.num_key_value_heads // mapping.tp_size),
        layers=tuple(
            layer_weights(config, tensors, layer - stage.start, layer, keep_bias=mapping.tp_rank(rank) == 0)
            for layer in stage
        ),
        embedding=embedding,
        final_norm=Norm(FINAL_NORM, tensors[FINAL_NORM], config.norm_epsilon) if last else None,
        lm_head=_head(tensors) if last else None,
        gather_embedding=embedding is not None and embedding.weight.shape[1] < config.hidden_size,
        reduce_embedding=embedding is not None and embedding.first_row is not None,
    )


def map_linears(weights: ModelWeights, function: Callable[[Linear], Any]) -> ModelWeights:
    """The same weights with a function applied to every linear layer, the head among them.

    The function may give a weight type of an op set's own, such as one laid out for a kernel.
    """

    def mapped(layer: LayerWeights) -> LayerWeights:
        return replace(
            layer,
            qkv=function(layer.qkv),
            dense=function(layer.dense),
            fc=function(layer.fc),
            gate=function(layer.gate),
            proj=function(layer.proj),
        )

    head = weights.lm_head
    return replace(
        weights,
        layers=tuple(mapped(layer) for layer in weights.layers),
        lm_head=None if head is None else function(head),
    )


def _embedding(config: ModelConfig, mapping: Mapping, rank: int, tensors: abc.Mapping[str, Tensor]) -> Embedding:
    table = tensors[EMBEDDING]
    cut_by_rows = table.shape[0] < config.vocab_size
    return Embedding(EMBEDDING, table, mapping.tp_rank(rank) * table.shape[0] if cut_by_rows else None)


def _head(tensors: abc.Mapping[str, Tensor]) -> Dense:
    name = HEAD if HEAD in tensors else EMBEDDING
    return Dense(name, tensors[name])


def layer_weights(
    config: ModelConfig, tensors: abc.Mapping[str, Tensor], layer: int, number: int, *, keep_bias: bool = True
) -> LayerWeights:
    """Layer ``layer`` of these tensors, which is layer ``number`` of the model."""

    def tensor(part: str) -> Tensor:
        return tensors[layer_name(layer, part)]

    def norm(part: str) -> Norm:
        name = layer_name(layer, f"{part}.weight")
        return Norm(name, tensors[name], config.norm_epsilon)

    def linear(part: str, *, keep: bool = True) -> Linear:
        name = layer_name(layer, f"{part}.weight")
        bias = tensors.get(layer_name(layer, f"{part}.bias")) if keep else None
        recipe = config.quantization.recipe_of(layer_name(number, part))
        return (
            Dense(name, tensors[name], bias) if recipe is None else quantized_linear(recipe, part, name, tensor, bias)
        )

    return LayerWeights(
        input_layernorm=norm("input_layernorm"),
        qkv=linear("attention.qkv"),
        q_norm=norm("attention.q_layernorm") if config.qk_layernorm else None,
        k_norm=norm("attention.k_layernorm") if config.qk_layernorm else None,
        dense=linear("attention.dense", keep=keep_bias),
        post_layernorm=norm("post_layernorm"),
        fc=linear("mlp.fc"),
        gate=linear("mlp.gate"),
        proj=linear("mlp.proj", keep=keep_bias),
        kv_scales=kv_cache_scales(config.quantization, tensor),
    )
