"""The typed weights of a decoder, and how they are built from the tensors of one rank. Knows no files."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.model.blocks import LAYER_SITES, LM_HEAD, LinearSite, layer_plan
from trtlab.model.names import EMBEDDING, FINAL_NORM, HEAD, POSITIONS, layer_name, source_name
from trtlab.model.quantized_weights import KvScales, Quantized, kv_cache_scales, quantized_linear, tensor_bytes


@dataclass(frozen=True)
class Embedding:
    """A table ``[rows, columns]`` of tokens or positions; ``first_row`` is the id of its first row if cut by rows."""

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
class LayerNorm(Norm):
    """The gain, the epsilon and the bias ``[hidden]`` of a LayerNorm."""

    bias: Tensor


@dataclass(frozen=True)
class Dense:
    """An unquantized linear: weight ``[out, in]`` and bias ``[out]`` in their stored dtype."""

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
    """The weights of one decoder layer; fields are named as in ``model.blocks``. Only a gated MLP has a ``gate``."""

    input_layernorm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    dense: Linear
    post_layernorm: Norm
    fc: Linear
    gate: Linear | None
    proj: Linear
    kv_scales: KvScales | None = None


@dataclass(frozen=True)
class ModelWeights:
    """The weights of one rank. ``heads`` and ``kv_heads`` count the rank's own heads.

    ``embedding`` is None after the first pipeline stage, ``final_norm`` and ``lm_head`` are None before the last one.
    ``positions`` is the table of a model with learned positions. ``gather_embedding`` is set when the token table is
    cut by columns, ``reduce_embedding`` when it is cut by rows.
    """

    heads: int
    kv_heads: int
    layers: tuple[LayerWeights, ...]
    embedding: Embedding | None
    final_norm: Norm | None
    lm_head: Linear | None
    gather_embedding: bool = False
    reduce_embedding: bool = False
    positions: Embedding | None = None


def rank_weights(config: ModelConfig, mapping: Mapping, rank: int, tensors: abc.Mapping[str, Tensor]) -> ModelWeights:
    """The typed weights of one rank from its tensors, whose layer numbers count from 0 within the stage.

    The shape of an embedding tells how it was cut. Where the input of a linear is cut, only the first rank of the
    group keeps the bias, so that the sum over ranks adds it once. A rank without a head tensor uses its embedding rows
    (tied weights).
    """
    stage = mapping.layers(rank, config.num_hidden_layers)
    embedding = _embedding(config, mapping, rank, tensors) if mapping.is_first_stage(rank) else None
    last = mapping.is_last_stage(rank)
    return ModelWeights(
        heads=config.num_attention_heads // mapping.tp_size,
        kv_heads=mapping.kv_heads(config),
        layers=tuple(
            layer_weights(config, tensors, layer - stage.start, layer, keep_bias=mapping.tp_rank(rank) == 0)
            for layer in stage
        ),
        embedding=embedding,
        final_norm=final_norm(config, tensors) if last else None,
        lm_head=lm_head(config, tensors) if last else None,
        gather_embedding=embedding is not None and embedding.weight.shape[1] < config.hidden_size,
        reduce_embedding=embedding is not None and embedding.first_row is not None,
        positions=Embedding(POSITIONS, tensors[POSITIONS]) if embedding is not None and POSITIONS in tensors else None,
    )


def map_linears(weights: ModelWeights, function: Callable[[Linear], Any]) -> ModelWeights:
    """The same weights with ``function`` applied to every linear, the head included.

    The function may return a weight type of an op set, such as one that is laid out for a kernel.
    """

    def mapped(layer: LayerWeights) -> LayerWeights:
        linears = {site.name: getattr(layer, site.name) for site in LAYER_SITES.values()}
        return replace(layer, **{name: function(linear) for name, linear in linears.items() if linear is not None})

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


def lm_head(config: ModelConfig, tensors: abc.Mapping[str, Tensor]) -> Linear:
    """The head, quantized or not; a tied model has its embedding table."""
    algorithm = config.quantization.algorithm_of(LM_HEAD.part)
    if algorithm is not None:
        return quantized_linear(algorithm, LM_HEAD.part, HEAD, tensors.__getitem__, None)
    name = source_name(HEAD, tensors)
    return Dense(name, tensors[name])


def layer_weights(
    config: ModelConfig, tensors: abc.Mapping[str, Tensor], layer: int, number: int, *, keep_bias: bool = True
) -> LayerWeights:
    """The typed weights of layer ``layer`` of these tensors, which is layer ``number`` of the whole model."""

    def tensor(part: str) -> Tensor:
        return tensors[layer_name(layer, part)]

    def norm(part: str) -> Norm:
        return _norm(config, tensors, layer_name(layer, part))

    def linear(site: LinearSite) -> Linear:
        name = layer_name(layer, f"{site.part}.weight")
        bias = tensors.get(layer_name(layer, f"{site.part}.bias")) if keep_bias or not site.cuts_input else None
        algorithm = config.quantization.algorithm_of(layer_name(number, site.part))
        if algorithm is None:
            return Dense(name, tensors[name], bias)
        return quantized_linear(algorithm, site.part, name, tensor, bias)

    plan = layer_plan(config)
    linears = {site.name: linear(site) for site in plan.linears}
    return LayerWeights(
        input_layernorm=norm("input_layernorm"),
        qkv=linears["qkv"],
        q_norm=norm("attention.q_layernorm") if config.qk_layernorm else None,
        k_norm=norm("attention.k_layernorm") if config.qk_layernorm else None,
        dense=linears["dense"],
        post_layernorm=norm("post_layernorm"),
        fc=linears["fc"],
        gate=linears.get("gate"),
        proj=linears["proj"],
        kv_scales=kv_cache_scales(config.quantization, tensor),
    )


def final_norm(config: ModelConfig, tensors: abc.Mapping[str, Tensor]) -> Norm:
    """The norm before the head."""
    return _norm(config, tensors, FINAL_NORM)


def _norm(config: ModelConfig, tensors: abc.Mapping[str, Tensor], module: str) -> Norm:
    """An RMSNorm, or a LayerNorm if there is a bias."""
    name, bias = f"{module}.weight", tensors.get(f"{module}.bias")
    if bias is None:
        return Norm(name, tensors[name], config.norm_epsilon)
    return LayerNorm(name, tensors[name], config.norm_epsilon, bias)
