"""Computes quantized linear layers in torch, exactly as each algorithm defines them; contains no fast kernels."""

from __future__ import annotations

from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor

from trtlab.model.quantized_weights import Float8Linear, Int4Float8Linear, Int8Linear, WeightOnly
from trtlab.model.scales import FLOAT8, INT8, ToOriginal, amax, dequantize, int_matmul, quantize_rows, to_float8, to_int
from trtlab.model.weights import Dense


@singledispatch
def linear(weight: object, x: Tensor) -> Tensor:
    """The product ``[tokens, out]`` of ``x`` ``[tokens, in]``, in the dtype of ``x``; chosen by the weight's type."""
    raise TypeError(f"linear() has no implementation for weights of type {type(weight).__name__}")


@linear.register
def _dense(weight: Dense, x: Tensor) -> Tensor:
    return F.linear(x, weight.weight.to(x.dtype), weight.bias)


@linear.register
def _weight_only(weight: WeightOnly, x: Tensor) -> Tensor:
    """Dequantize the weight, then multiply: a fused kernel computes the same without storing the dequantized weight."""
    if weight.prequant is not None:
        x = x * weight.prequant.to(x.dtype)
    return F.linear(x, dequantize(weight.integers, weight.scale.value).to(x.dtype), weight.bias)


@linear.register
def _int8(weight: Int8Linear, x: Tensor) -> Tensor:
    wide = x.float()
    if weight.smoother is not None:
        wide = wide / weight.smoother
    if weight.prequant is not None:
        wide = wide * weight.prequant.float()
    if weight.input_scale is None:
        q, row_scale = quantize_rows(wide)
    else:
        q = to_int(wide, weight.input_scale, INT8)
        row_scale = 1 + 0 * amax(wide, -1, keepdim=True)  # NaN for a token with infinity or NaN: INT8 has neither
    y = int_matmul(q, weight.weight).float() * row_scale * weight.output_scale.value
    return _with_bias(y, weight.bias, x.dtype)


@linear.register
def _float8(weight: Float8Linear, x: Tensor) -> Tensor:
    q = to_float8(x.float(), weight.input_scale)
    y = q.float() @ weight.weight.float().T * (weight.input_scale.value * weight.weight_scale.value)
    return _with_bias(y, weight.bias, x.dtype)


@linear.register
def _int4_float8(weight: Int4Float8Linear, x: Tensor) -> Tensor:
    groups = weight.groups
    assert groups.prequant is not None, f"W4A8 weight {groups.name} has no prequant scale"
    q = to_float8(x.float() * groups.prequant.float(), weight.input_scale)
    w = to_float8(dequantize(groups.integers, groups.scale.value.float()), weight.weight_scale)
    y = q.float() @ w.float().T * (weight.input_scale.value * weight.weight_scale.value)
    return _with_bias(y, weight.bias, x.dtype)


def _with_bias(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias.float()).to(dtype)


def encode_cache(x: Tensor, scale: ToOriginal, dtype: torch.dtype) -> Tensor:
    """Quantize K or V ``[tokens, kv_heads, head_size]`` for the cache; scale ``[1]`` or ``[kv_heads]``.

    As TensorRT-LLM, it multiplies by the reciprocal of the scale and rounds ties to even.
    """
    by_head = ToOriginal(scale.value[:, None])
    if dtype == FLOAT8:
        return to_float8(x.float(), by_head)
    return to_int(x.float(), by_head.inverse, INT8)


def decode_cache(stored: Tensor, scale: ToOriginal, dtype: torch.dtype) -> Tensor:
    """Dequantize K or V ``[slots, kv_heads, tokens, head_size]`` of a quantized cache."""
    return (stored.float() * scale.value[:, None, None]).to(dtype)
