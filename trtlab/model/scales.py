"""Arithmetic that all algorithms share: largest magnitudes, rounding, ranges, scales, packing. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
EXACT_TERMS = 1024  # the sum of 1,024 products of two INT8 numbers is at most 2^24, which float32 holds exactly


@dataclass(frozen=True)
class ToOriginal:
    """A scale from the quantized to the original number, ``x = q * scale`` (TensorRT's direction)."""

    value: Tensor

    def quantize(self, x: Tensor) -> Tensor:
        """``x / scale``, not rounded yet."""
        return x / self.value

    def dequantize(self, q: Tensor) -> Tensor:
        """``q * scale``."""
        return q.to(self.value.dtype) * self.value

    def stored(self, dtype: torch.dtype) -> Tensor:
        """The scale in a storage dtype; a scale too small for it becomes its smallest normal number, never zero."""
        return self.value.clamp(min=torch.finfo(dtype).tiny).to(dtype)

    @property
    def inverse(self) -> ToQuantized:
        """The same scale in the other direction."""
        return ToQuantized(1.0 / self.value)


@dataclass(frozen=True)
class ToQuantized:
    """A scale from the original to the quantized number, ``q = x * scale`` (as TensorRT-LLM's ``scale_to_int``)."""

    value: Tensor

    def quantize(self, x: Tensor) -> Tensor:
        """``x * scale``, not rounded yet."""
        return x * self.value

    @property
    def inverse(self) -> ToOriginal:
        """The same scale in the other direction."""
        return ToOriginal(1.0 / self.value)


@dataclass(frozen=True)
class IntRange:
    """The range of integers that a format holds, both ends included."""

    low: int
    high: int

    def clamp(self, x: Tensor) -> Tensor:
        """``x`` saturated to the range."""
        return x.clamp(self.low, self.high)


INT8 = IntRange(-128, 127)
INT8_SYMMETRIC = IntRange(-127, 127)
INT4 = IntRange(-8, 7)


def amax(x: Tensor, dim: int | tuple[int, ...] | None = None, *, keepdim: bool = False) -> Tensor:
    """The largest magnitude along ``dim``, or of the whole tensor; NaN if there is one. Makes no copy of ``x``."""
    dims: tuple[int, ...] = () if dim is None else (dim,) if isinstance(dim, int) else dim
    return torch.maximum(x.amax(dims, keepdim=keepdim), -x.amin(dims, keepdim=keepdim))


def all_finite(x: Tensor) -> bool:
    """Whether ``x`` holds neither NaN nor infinity; much faster on a CPU than ``isfinite(x).all()``."""
    return bool(torch.isfinite(amax(x)))


def positive(largest: Tensor) -> Tensor:
    """Magnitudes with 1 in place of 0, because a scale of 0 would divide by zero; zeros quantize to zeros anyway."""
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def half_even(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties to even (torch.round, CUDA's ``cvt.rni``, TensorRT's quantize layer)."""
    return torch.round(x)


def half_away(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties away from zero (C's ``round``, TensorRT-LLM's weight-only quantizer)."""
    whole = torch.trunc(x)
    return torch.where((x - whole).abs() >= 0.5, whole + torch.sign(x), whole)


def to_int(x: Tensor, scale: ToOriginal | ToQuantized, limits: IntRange, rounding: Rounding = half_even) -> Tensor:
    """``x`` scaled, rounded and saturated to ``limits``, in int8 storage."""
    return limits.clamp(rounding(scale.quantize(x))).to(torch.int8)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations ``[tokens, in]`` to int8, with one scale for each token ``[tokens, 1]`` to the original.

    A scale is at least 1e-6 / 127.
    """
    largest = amax(x, -1, keepdim=True).clamp(min=1e-6)
    return to_int(x, ToQuantized(INT8.high / largest), INT8), largest / INT8.high


def to_float8(x: Tensor, scale: ToOriginal) -> Tensor:
    """``x / scale`` in E4M3, ties to even; magnitudes above 448 become 448, where a plain cast gives NaN."""
    return scale.quantize(x).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def pack_int4(q: Tensor) -> Tensor:
    """Pack integers -8 to 7 ``[out, in]`` two in a byte along out: uint8 ``[ceil(out / 2), in]``.

    The low nibble is the even row; an odd last row is paired with zeros. The order is ModelOpt's and TensorRT-LLM's.
    """
    if q.shape[0] % 2:
        q = torch.cat([q, q.new_zeros(1, q.shape[1])])
    nibbles = q.to(torch.int16) & 15
    return (nibbles[0::2] | (nibbles[1::2] << 4)).to(torch.uint8)


def unpack_int4(packed: Tensor, rows: int) -> Tensor:
    """The inverse of ``pack_int4``: int8 ``[rows, in]``."""
    low = (packed & 15).to(torch.int8)
    high = (packed >> 4).to(torch.int8)
    nibbles = torch.stack([low, high], 1).flatten(0, 1)[:rows]  # [rows, in], 0 to 15
    return (nibbles << 4) >> 4  # the arithmetic shift back extends the sign


def by_group(x: Tensor, groups: int) -> Tensor:
    """``[out, in]`` as ``[out, groups, in / groups]``."""
    return x.reshape(x.shape[0], groups, -1)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Integers ``[out, in]`` times scales ``[out, groups]`` to the original: ``[out, in]``."""
    return (by_group(q.to(scale.dtype), scale.shape[1]) * scale[..., None]).flatten(1)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T`` of INT8 matrices with exact INT32 sums: ``[m, k]`` and ``[n, k]`` to ``[m, n]``.

    It works in the same way on every device: float32 products over slices of k that are short enough to be exact,
    added in INT32.
    """
    slices = zip(torch.split(a, EXACT_TERMS, 1), torch.split(b, EXACT_TERMS, 1), strict=True)
    products = [(left.float() @ right.float().T).to(torch.int32) for left, right in slices]
    return products[0] if len(products) == 1 else torch.stack(products).sum(0, dtype=torch.int32)
