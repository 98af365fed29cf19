"""The op set that adds layers to an ``INetworkDefinition``: strongly typed, padded ``[batch, tokens, hidden]``.

Computes nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trtlab.errors import ConfigError
from trtlab.model.op_set import Ops
from trtlab.model.quantized_weights import KvScales
from trtlab.model.scales import ToOriginal
from trtlab.model.weights import Embedding, LayerNorm, Linear, Norm
from trtlab.tensorrt import bindings as io
from trtlab.tensorrt.emit.quantized import QuantizedLinears

# TensorRT's ActivationType by Hugging Face's name; silu is x * sigmoid(x), for which there is no single layer.
ACTIVATIONS = {"silu": "SIGMOID", "gelu": "GELU_ERF", "gelu_pytorch_tanh": "GELU_TANH", "relu": "RELU"}


class TensorRTOps(QuantizedLinears, Ops[Any]):
    """The verbs as layers of a network.

    Args:
        trt: TensorRT's module.
        network: The network definition to add layers to.
        inputs: The network's inputs, by the names in ``bindings``.
        dtype: The network's type.
        rotary: Cosine and sine, each ``[positions, head_size / 2]``; None without rotary embedding.
        group: The ranks of the tensor-parallel group.
        kv_scales: One per layer for a cache in INT8 or FP8; empty without.
    """

    def __init__(
        self,
        trt: Any,
        network: Any,
        inputs: Mapping[str, Any],
        dtype: str,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        group: Sequence[int],
        kv_scales: Sequence[KvScales] = (),
    ) -> None:
        super().__init__(trt, network, dtype)
        self.presents: list[Any] = []
        self._inputs = inputs
        self._group = list(group)
        self._kv_scales = kv_scales
        self._joined_mask: Any = None
        # The tables and the rotation stay in float32: a rounded cosine would be an error at every position.
        tables = zip(("cos", "sin"), rotary or (), strict=rotary is not None)
        self._rotary = [self._constant(f"rotary.{name}", table, tuple(table.shape)) for name, table in tables]

    def embedding(self, tokens: Any, weight: Embedding) -> Any:
        self._enter(weight.name)
        table = self._weight(weight.name, weight.weight, tuple(weight.weight.shape))
        if weight.first_row is None:
            return self._add("gather", self._network.add_gather(table, tokens, 0))
        # Ids of other ranks' rows are clamped into the table, and their results are replaced by zero.
        first, last = weight.first_row, weight.first_row + weight.weight.shape[0] - 1
        low, high = self._scalar("first", first, 2, torch.int32), self._scalar("last", last, 2, torch.int32)
        clamped = self._elementwise("clamp_high", "MIN", self._elementwise("clamp_low", "MAX", tokens, low), high)
        inside = self._elementwise("inside", "EQUAL", tokens, clamped)
        rows = self._network.add_gather(table, self._elementwise("local", "SUB", clamped, low), 0)
        inside = self._reshape("inside_rows", inside, (0, 0, 1))
        zero = self._weight("zero", torch.zeros(1, 1, 1), (1, 1, 1))
        return self._add("select", self._network.add_select(inside, self._add("gather", rows), zero))

    def position_embedding(self, tokens: Any, weight: Embedding) -> Any:
        self._enter(weight.name)
        table = self._weight(weight.name, weight.weight, tuple(weight.weight.shape))
        return self._add("gather", self._network.add_gather(table, self._inputs[io.POSITION_IDS], 0))

    def rms_norm(self, x: Any, weight: Norm) -> Any:
        # TensorRT's normalization layer subtracts the mean, so RMSNorm is emitted as single operations.
        self._enter(weight.name)
        rank = len(x.shape)
        wide = self._cast("wide", x, self._trt.float32)
        square = self._elementwise("square", "PROD", wide, wide)
        root = self._root(self._mean("mean", square), weight.epsilon)
        narrow = self._cast("narrow", self._elementwise("divide", "DIV", wide, root), self._dtype)
        gain = self._weight(weight.name, weight.weight, (1,) * (rank - 1) + tuple(weight.weight.shape))
        return self._elementwise("gain", "PROD", narrow, gain)

    def layer_norm(self, x: Any, weight: LayerNorm) -> Any:
        # TensorRT's normalization layer cannot be read back here, so the norm is emitted as float32 operations.
        self._enter(weight.name)
        rank = len(x.shape)
        wide = self._cast("wide", x, self._trt.float32)
        centred = self._elementwise("centre", "SUB", wide, self._mean("mean", wide))
        variance = self._mean("variance", self._elementwise("square", "PROD", centred, centred))
        scaled = self._elementwise("divide", "DIV", centred, self._root(variance, weight.epsilon))
        shape = (1,) * (rank - 1) + tuple(weight.weight.shape)
        gain = self._constant(f"{self._scope}.gain", weight.weight.float(), shape)
        bias = self._constant(f"{self._scope}.bias", weight.bias.float(), shape)
        result = self._elementwise("add_bias", "SUM", self._elementwise("gain", "PROD", scaled, gain), bias)
        return self._cast("narrow", result, self._dtype)

    def _mean(self, suffix: str, x: Any) -> Any:
        """The mean over the last axis, which keeps size 1."""
        last = 1 << (len(x.shape) - 1)
        return self._add(suffix, self._network.add_reduce(x, self._trt.ReduceOperation.AVG, last, True))

    def _root(self, x: Any, epsilon: float) -> Any:
        shifted = self._elementwise(
            "add_epsilon", "SUM", x, self._scalar("epsilon", epsilon, len(x.shape), torch.float32)
        )
        return self._add("sqrt", self._network.add_unary(shifted, self._trt.UnaryOperation.SQRT))

    def linear(self, x: Any, weight: Linear) -> Any:
        self._enter(weight.name)
        return self._product(weight, x)

    def split_heads(self, qkv: Any, heads: int, kv_heads: int) -> tuple[Any, Any, Any]:
        total = heads + 2 * kv_heads
        layer = self._network.add_shuffle(qkv)
        layer.reshape_dims = self._trt.Dims((0, 0, total, qkv.shape[-1] // total))
        layer.second_transpose = self._trt.Permutation([0, 2, 1, 3])
        rows = self._add("heads", layer)  # [batch, heads + 2 kv_heads, tokens, head_size]
        return (
            self._slice("q", rows, 1, 0, heads),
            self._slice("k", rows, 1, heads, kv_heads),
            self._slice("v", rows, 1, heads + kv_heads, kv_heads),
        )

    def rotary(self, q: Any, k: Any) -> tuple[Any, Any]:
        # Queries stay in float32, because they are multiplied by the softmax scale next.
        return self._rotate("rotary_q", q), self._cast("narrow_k", self._rotate("rotary_k", k), self._dtype)

    def attention(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        # The mask is an input: TensorRT's key lengths give wrong tokens on a cache of fixed capacity.
        head_size, heads = q.shape[-1], q.shape[1]
        # The attention layer has no scale. Rounded to BF16 a scale would flip near ties, so Q is scaled in float32.
        wide = self._cast("wide_q", q, self._trt.float32)
        scaled = self._elementwise("scale_q", "PROD", wide, self._scalar("scale", head_size**-0.5, 4, torch.float32))
        keys, values, mask = self._cached(layer, k, v)
        softmax, kind = self._trt.AttentionNormalizationOp.SOFTMAX, self._trt.CausalMaskKind.NONE
        narrow = self._cast("narrow_q", scaled, self._dtype)
        attention = self._network.add_attention_v2(narrow, keys, values, softmax, kind)
        attention.mask = mask
        attention.decomposable = True  # without it FP32 never builds, and BF16 not on every GPU
        out = self._add("attention", attention)  # [batch, heads, tokens, head_size]
        merge = self._network.add_shuffle(out)
        merge.first_transpose = self._trt.Permutation([0, 2, 1, 3])
        merge.reshape_dims = self._trt.Dims((0, 0, heads * head_size))
        return self._add("merge_heads", merge)

    def activation(self, kind: str, x: Any) -> Any:
        if kind not in ACTIVATIONS:
            raise ConfigError("unknown activation", got=repr(kind), expected=" | ".join(ACTIVATIONS))
        wide = self._cast("wide", x, self._trt.float32) if kind == "silu" else x  # two layers, rounded once
        function = getattr(self._trt.ActivationType, ACTIVATIONS[kind])
        y = self._add(ACTIVATIONS[kind].lower(), self._network.add_activation(wide, function))
        if kind == "silu":
            y = self._elementwise("silu", "PROD", wide, y)
        return self._cast("narrow", y, self._dtype)

    def multiply(self, a: Any, b: Any) -> Any:
        return self._elementwise("multiply", "PROD", a, b)

    def add(self, a: Any, b: Any) -> Any:
        return self._elementwise("add", "SUM", a, b)

    def all_reduce(self, x: Any) -> Any:
        return self._collective("all_reduce", x, "ALL_REDUCE", "SUM")

    def all_gather(self, x: Any) -> Any:
        # TensorRT concatenates along the first axis, so the last axis is moved there and back.
        if len(self._group) == 1:
            return x
        front = self._transpose("columns_first", x, (2, 0, 1))
        return self._transpose("columns_last", self._collective("all_gather", front, "ALL_GATHER", "NONE"), (1, 2, 0))

    def receive(self, tokens: Any, hidden_size: int) -> Any:
        # The hidden states are the network's first input, instead of token ids.
        return tokens

    def send(self, x: Any) -> Any:
        # The hidden states are the network's first output, instead of logits.
        return x

    def last_tokens(self, x: Any) -> Any:
        # An input names the rows: ``last_token_ids [batch, wanted]``.
        layer = self._network.add_gather(x, self._inputs[io.LAST_TOKENS], 1)
        layer.num_elementwise_dims = 1
        return self._add("last_tokens", layer)  # [batch, wanted, hidden]

    def logits(self, x: Any, vocab_size: int) -> Any:
        kept = x if x.shape[-1] == vocab_size else self._slice("vocabulary", x, 2, 0, vocab_size)
        return self._cast("logits", kept, self._trt.float32)

    def _rotate(self, suffix: str, x: Any) -> Any:
        wide = self._cast(f"{suffix}_wide", x, self._trt.float32)
        layer = self._network.add_rotary_embedding(wide, *self._rotary, False, x.shape[-1])
        layer.set_input(3, self._inputs[io.POSITION_IDS])
        return self._add(suffix, layer)

    def _cached(self, layer: int, k: Any, v: Any) -> tuple[Any, Any, Any]:
        """All keys and values after this step, and the mask of those that each token attends to."""
        if not self._kv_scales:
            return self._written("k", layer, k), self._written("v", layer, v), self._inputs[io.MASK]
        scales = self._kv_scales[layer]
        keys, values = self._joined("k", layer, k, scales.keys), self._joined("v", layer, v, scales.values)
        if self._joined_mask is None:
            self._joined_mask = self._concatenate(
                "join_masks", self._inputs[io.CACHED_MASK], self._inputs[io.NEW_MASK], 3
            )
        return keys, values, self._joined_mask

    def _written(self, kind: str, layer: int, update: Any) -> Any:
        """The whole cache with the new keys or values written: an output, bound to the input's address."""
        cache, starts = self._inputs[io.cache_name(kind, layer)], self._inputs[io.WRITE_INDICES]
        written = self._network.add_kv_cache_update(cache, update, starts, self._trt.KVCacheMode.LINEAR)
        tensor = self._add(f"cache_{kind}", written)
        tensor.name = io.present_name(kind, layer)
        self.presents.append(tensor)
        return tensor

    def _joined(self, kind: str, layer: int, update: Any, scale: ToOriginal) -> Any:
        """The quantized cache and the new tokens, concatenated and dequantized; the new ones also become an output."""
        cache, values = self._inputs[io.cache_name(kind, layer)], scale.stored(torch.float32).reshape(-1, 1)
        wide = self._cast(f"wide_{kind}", update, self._trt.float32)
        new = self._quantize(f"quantize_{kind}", wide, values, cache.dtype)
        new.name = io.update_name(kind, layer)
        self.presents.append(new)
        joined = self._concatenate(f"join_{kind}", cache, new, 2)
        return self._dequantize(f"dequantize_{kind}", joined, values, self._dtype)

    def _collective(self, suffix: str, x: Any, operation: str, reduction: str) -> Any:
        if len(self._group) == 1:
            return x
        kinds, reductions = self._trt.CollectiveOperation, self._trt.ReduceOperation
        layer = self._network.add_dist_collective(
            x, getattr(kinds, operation), getattr(reductions, reduction), -1, self._group
        )
        out = self._add(suffix, layer)
        layer.num_ranks = len(self._group)
        # A collective that is read back shows only its number of ranks, so the rest is kept in its metadata.
        layer.metadata = json.dumps(
            {"operation": operation.lower(), "reduce": reduction.lower(), "groups": self._group}
        )
        return out
