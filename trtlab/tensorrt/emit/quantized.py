"""Emits linear layers, dense and quantized: constants as they are stored, with quantize and dequantize layers.

Weight-only weights are dequantized to the network's type. Where activations are quantized too, both operands are
quantized and dequantized in float32 before the product: TensorRT's pattern for an 8-bit kernel, and exact.
"""

from __future__ import annotations

from functools import singledispatchmethod
from typing import Any

import torch

from trtlab.config.model import ModelConfig
from trtlab.errors import EngineError
from trtlab.model.quantized_weights import Float8Linear, Int4Float8Linear, Int8Linear, WeightOnly
from trtlab.model.scales import INT8, ToOriginal, ToQuantized
from trtlab.model.weights import Dense
from trtlab.tensorrt.emit.layers import NetworkLayers

# Families of algorithms that no TensorRT layer expresses.
REFUSED = {"awq_fp8": "TensorRT has no product of INT4 weights, read as FP8, with FP8 activations"}
IN_TORCH = 'build with plan=False, and run it with backend="torch"'
SMALLEST = 1e-6  # lower bound of a token's largest magnitude, so that its scale is not zero


def check_algorithm(config: ModelConfig) -> None:
    """Raise EngineError for a quantization that no TensorRT network can express, before anything is emitted."""
    algorithm = config.quantization.algorithm
    if algorithm is not None and algorithm.family in REFUSED:
        raise EngineError(f"{algorithm.name} does not become a plan: {REFUSED[algorithm.family]}", remedy=IN_TORCH)


def quantized_types(config: ModelConfig) -> set[str]:
    """The types, beside the network's own, that decide on which GPUs a plan of this model runs."""
    quant = config.quantization
    return {"float8_e4m3fn"} if "FP8" in (quant.quant_algo, quant.kv_cache_quant_algo) else set()


class QuantizedLinears(NetworkLayers):
    """One method for each type of weight; each returns ``[batch, tokens, out]`` in the network's type."""

    @singledispatchmethod
    def _product(self, weight: object, x: Any) -> Any:
        raise TypeError(f"linear() has no emission for weights of type {type(weight).__name__}")

    @_product.register
    def _dense(self, weight: Dense, x: Any) -> Any:
        matrix = self._weight(weight.name, weight.weight, (1, *weight.shape))  # [1, out, in]
        if len(matrix.shape) == 2:  # tied weights: the constant is the token table, without a batch axis
            matrix = self._reshape("as_batch", matrix, (1, *weight.shape))
        return self._with_bias(self._matmul(x, matrix), weight.bias, self._torch_dtype)

    @_product.register
    def _weight_only(self, weight: WeightOnly, x: Any) -> Any:
        """The constant is dequantized, with one scale per row or per group of columns."""
        if weight.prequant is not None:
            gain = self._weight(f"{self._scope}.prequant", weight.prequant, (1, 1, weight.shape[1]))
            x = self._elementwise("prequant", "PROD", x, gain)
        shape = (1, *weight.shape)
        if weight.weight.dtype == torch.uint8:
            constant = self._constant(weight.name, pack_columns(weight.integers), shape, "int4")
        else:
            constant = self._constant(weight.name, weight.integers, shape)
        scale = weight.scale.value  # [out, groups]
        size = ToOriginal(scale.abs()).stored(self._torch_dtype)
        matrix = self._dequantize("dequantize_weight", constant, size, self._dtype)
        if bool((scale < 0).any()):
            matrix = self._signed(matrix, scale, shape)
        return self._with_bias(self._matmul(x, matrix), weight.bias, self._torch_dtype)

    def _signed(self, matrix: Any, scale: torch.Tensor, shape: tuple[int, ...]) -> Any:
        """The matrix with the signs of its groups' scales, negative ones too in a GGUF file; TensorRT takes none."""
        groups = (1, *scale.shape)
        signs = self._constant(f"{self._scope}.signs", scale.sign().to(self._torch_dtype), (*groups, 1))
        grouped = self._reshape("groups", matrix, (*groups, shape[-1] // groups[-1]))
        return self._reshape("signed_weight", self._elementwise("signs", "PROD", grouped, signs), shape)

    @_product.register
    def _int8(self, weight: Int8Linear, x: Any) -> Any:
        """Static scale: a quantize layer. Scale per token: each row is divided by its scale and quantized with 1."""
        wide = self._cast("wide", x, self._trt.float32)
        for suffix, operation, factor in (("smoother", "DIV", weight.smoother), ("prequant", "PROD", weight.prequant)):
            if factor is not None:
                constant = self._constant(f"{self._scope}.{suffix}", factor.float(), (1, 1, weight.shape[1]))
                wide = self._elementwise(suffix, operation, wide, constant)
        row_scale = None
        if weight.input_scale is None:
            wide, row_scale = self._rows_to_integers(wide)
            input_scale = ToOriginal(torch.ones(1))
        else:
            input_scale = to_original(weight.input_scale)
        restored = self._rounded("input", wide, input_scale, self._trt.int8)
        weight_scale = ToOriginal(weight.output_scale.value / input_scale.value)
        y = self._matmul(restored, self._eight_bits(weight, weight_scale))
        if row_scale is not None:
            y = self._elementwise("times_row_scale", "PROD", y, row_scale)
        return self._cast("narrow", self._with_bias(y, weight.bias, torch.float32), self._dtype)

    @_product.register
    def _float8(self, weight: Float8Linear, x: Any) -> Any:
        wide = self._cast("wide", x, self._trt.float32)
        restored = self._rounded("input", wide, weight.input_scale, self._trt.fp8)
        y = self._matmul(restored, self._eight_bits(weight, weight.weight_scale))
        return self._cast("narrow", self._with_bias(y, weight.bias, torch.float32), self._dtype)

    @_product.register
    def _int4_float8(self, weight: Int4Float8Linear, x: Any) -> Any:
        raise EngineError(f"{weight.name} is W4A8: {REFUSED['awq_fp8']}", remedy=IN_TORCH)

    def _rows_to_integers(self, wide: Any) -> tuple[Any, Any]:
        """Each token times 127 over its largest magnitude, and the inverse of that factor ``[batch, tokens, 1]``."""
        operations, last = self._trt.ReduceOperation, 1 << (len(wide.shape) - 1)
        magnitude = self._add("abs", self._network.add_unary(wide, self._trt.UnaryOperation.ABS))
        largest = self._add("row_max", self._network.add_reduce(magnitude, operations.MAX, last, True))
        floor = self._scalar("smallest", SMALLEST, 3, torch.float32)
        largest = self._elementwise("at_least", "MAX", largest, floor)
        limit = self._scalar("limit", INT8.high, 3, torch.float32)
        scaled = self._elementwise("scale_row", "PROD", wide, self._elementwise("to_integers", "DIV", limit, largest))
        return scaled, self._elementwise("row_scale", "DIV", largest, limit)

    def _eight_bits(self, weight: Int8Linear | Float8Linear, scale: ToOriginal) -> Any:
        """The constant ``[1, out, in]`` dequantized to float32, with one scale for all or one per row."""
        constant = self._constant(weight.name, weight.weight, (1, *weight.shape))
        values = scale.stored(torch.float32).reshape(-1, 1)  # [1 or out, 1]
        return self._dequantize("dequantize_weight", constant, values, self._trt.float32)

    def _rounded(self, suffix: str, x: Any, scale: ToOriginal, dtype: Any) -> Any:
        """Float32 ``x`` quantized and dequantized with one scale for all."""
        values = scale.stored(torch.float32).reshape(1, 1)
        q = self._quantize(f"quantize_{suffix}", x, values, dtype)
        return self._dequantize(f"dequantize_{suffix}", q, values, self._trt.float32)

    def _matmul(self, x: Any, matrix: Any) -> Any:
        operation = self._trt.MatrixOperation
        return self._add("matmul", self._network.add_matrix_multiply(x, operation.NONE, matrix, operation.TRANSPOSE))

    def _with_bias(self, y: Any, bias: torch.Tensor | None, dtype: torch.dtype) -> Any:
        if bias is None:
            return y
        constant = self._constant(f"{self._scope}.bias", bias.to(dtype), (1, 1, *bias.shape))
        return self._elementwise("add_bias", "SUM", y, constant)


def to_original(scale: ToOriginal | ToQuantized) -> ToOriginal:
    """The scale in TensorRT's direction: stored number times scale is the original."""
    return scale if isinstance(scale, ToOriginal) else scale.inverse


def pack_columns(q: torch.Tensor) -> torch.Tensor:
    """Pack integers -8 to 7 ``[out, in]`` in pairs along in, the first in the low nibble: TensorRT's order."""
    flat = torch.nn.functional.pad(q.flatten(), (0, q.numel() % 2)).to(torch.int16) & 15
    return (flat[0::2] | (flat[1::2] << 4)).to(torch.uint8)
