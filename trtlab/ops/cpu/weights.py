"""Weights as a CPU reads them: as they are stored where a loop can, else laid out for torch's product.

BF16, E4M3, INT8 and INT4 numbers stay so, for reading them is most of the time that a step of few tokens takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trtlab.errors import ConfigError
from trtlab.hardware import cache_bytes
from trtlab.model.quantized_weights import Float8Linear, Int4Float8Linear, Int8Linear, WeightOnly, tensor_bytes
from trtlab.model.scales import ToOriginal, ToQuantized, dequantize, to_float8
from trtlab.model.weights import Dense, Embedding, Linear, ModelWeights, Norm, map_linears
from trtlab.ops.quantized_linear import linear

Array = NDArray[Any]
Narrow = WeightOnly | Int8Linear | Float8Linear | Int4Float8Linear  # what a loop reads, besides BF16

LARGE = 2**20  # elements; below this, oneDNN's layout saves less than its call costs
FEW = 32  # tokens; from here on widening the weights for torch's product costs less than it saves
FEW_OF_CACHED = 2  # of a weight that a cache holds in float32, too, where reading it costs nothing
BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}  # what numpy has no type for, as its bits


def has_loops() -> bool:
    """Whether the compiled loops can run: they need Numba, which follows a new Python with some delay."""
    return find_spec("numba") is not None


def array_of(tensor: Tensor) -> Array:
    """The same memory as an array; types that numpy lacks as unsigned integers."""
    bits = BITS.get(tensor.dtype)
    return tensor.numpy() if bits is None else tensor.view(bits).numpy()


@dataclass(frozen=True)
class Gain(Norm):
    """An RMSNorm whose gain ``[hidden]`` is there as a float32 array too."""

    array: Array


@dataclass(frozen=True)
class Looped:
    """A linear layer that a loop reads as it is stored: ``loop(x, *arrays, out)``. ``source`` serves more tokens.

    With ``input_scale`` the input becomes E4M3 first.
    """

    source: Dense | LaidOutDense | Narrow
    few: int  # tokens up to which the loop is the faster one
    shape: tuple[int, int]  # outputs and inputs
    loop: Callable[..., None]
    arrays: tuple[Array, ...]
    bias: Array | None
    prequant: Array | None
    input_scale: ToOriginal | None = None

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.source.name

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, all scales and the bias."""
        return tensor_bytes(self.source)

    def __call__(self, x: Array) -> Array:
        """``[tokens, in]`` to ``[tokens, out]``, for few tokens."""
        out = self._product(x)
        if self.bias is not None:
            out += self.bias
        return out

    def _product(self, x: Array) -> Array:
        if self.prequant is not None:
            x = x * self.prequant
        if self.input_scale is not None:
            x = to_float8(torch.from_numpy(x), self.input_scale).float().numpy()
        out = np.empty((len(x), self.shape[0]), np.float32)
        self.loop(x, *self.arrays, out)
        return out


@dataclass(frozen=True)
class LoopedInt8(Looped):
    """A linear layer whose input becomes INT8 too: the same numbers, bit for bit, as torch's product gives."""

    smoother: Array | None = None
    static: ToOriginal | ToQuantized | None = None  # without it each token has a scale of its own

    def _product(self, x: Array) -> Array:
        from trtlab.ops.cpu import products as cpu_products

        weight, scale = self.arrays
        if self.smoother is not None:
            x = x / self.smoother
        if self.prequant is not None:
            x = x * self.prequant
        numbers, sums = np.empty_like(x), np.empty((len(x), self.shape[0]), np.int32)
        row_scale = np.ones((len(x), 1), np.float32)
        if self.static is None:
            cpu_products.int8_rows(x, numbers, row_scale)
        else:
            cpu_products.int8_by(x, self.static.value.item(), isinstance(self.static, ToOriginal), numbers)
        self.loop(numbers, weight, sums)
        found: Array = sums.astype(np.float32) * row_scale * scale
        return found


@linear.register
def _looped(weight: Looped, x: Tensor) -> Tensor:
    return linear(weight.source, x)


@dataclass(frozen=True)
class LaidOutDense:
    """A float32 linear layer whose weight lies in oneDNN's own layout, so that no call lays it out again."""

    name: str
    weight: Tensor
    shape: tuple[int, int]
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        elements = self.shape[0] * self.shape[1] + (0 if self.bias is None else self.shape[0])
        return elements * torch.float32.itemsize


@linear.register
def _laid_out_dense(weight: LaidOutDense, x: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.weight, weight.bias, "none", [], "")
    return y


def cpu_weights(weights: ModelWeights, *, loops: bool, round_dense: bool = False) -> ModelWeights:
    """The same weights as a CPU reads them fastest, for ``CpuOps`` with ``loops``, for ``TorchOps`` without.

    With ``loops`` quantized linears stay as they are stored, and a dense one whose numbers all fit BF16 is
    kept so; ``round_dense`` rounds the others. When the last-level cache holds all small ones in float32, several
    tokens read those so. Else a linear is float32, in oneDNN's layout when it is large, column by column when it is
    small.
    """
    if round_dense and not loops:
        raise ConfigError("fast_cpu_kernels needs Numba, which is not here", remedy="pip install numba")

    cached = 2 * _small_bytes(weights) <= cache_bytes()  # half of it is for the rest

    def prepared(weight: Linear) -> object:
        if isinstance(weight, Dense) and loops and (round_dense or _fits_bfloat16(weight.weight)):
            half = weight.weight.to(torch.bfloat16).contiguous()
            bias = None if weight.bias is None else weight.bias.float()
            stored = Dense(weight.name, half, bias)
            looped = _looped_linear(stored)
            if not cached or half.numel() >= LARGE:
                return looped
            return dataclasses.replace(looped, source=_laid_out(_widened(stored)), few=FEW_OF_CACHED)
        wide: Linear = _widened(weight)
        if isinstance(wide, Dense):
            return _laid_out(wide)
        return _looped_linear(wide) if isinstance(wide, Narrow) and loops else wide

    found: ModelWeights = _widened(map_linears(weights, prepared), loops=loops)
    return found


def _small_bytes(weights: ModelWeights) -> int:
    """Bytes of all small dense weights in float32."""
    found: list[int] = []

    def look(weight: Linear) -> Linear:
        if isinstance(weight, Dense) and weight.weight.numel() < LARGE:
            found.append(weight.weight.numel() * torch.float32.itemsize)
        return weight

    map_linears(weights, look)
    return sum(found)


def _fits_bfloat16(tensor: Tensor) -> bool:
    """Whether BF16 holds every number of a weight exactly, as it does when a BF16 checkpoint was widened."""
    if tensor.dtype != torch.float32:
        return tensor.dtype == torch.bfloat16
    bits = tensor.contiguous().view(torch.int32)
    return all(not (rows & 0xFFFF).any() for rows in (bits[:1], bits))  # one row settles it for most others


def _widened(part: Any, *, loops: bool = False) -> Any:
    """The same with every 16-bit number as float32; with ``loops`` norms as arrays, and embeddings as they are."""
    if isinstance(part, Tensor):
        return part.float() if part.dtype in (torch.bfloat16, torch.float16) else part
    if isinstance(part, tuple):
        return tuple(_widened(one, loops=loops) for one in part)
    if not dataclasses.is_dataclass(part) or isinstance(part, Looped | LaidOutDense):
        return part
    if loops and type(part) is Norm:
        gain = part.weight.float().contiguous()
        return Gain(part.name, gain, part.epsilon, gain.numpy())
    if loops and isinstance(part, Embedding):
        return part
    fields = {field.name: _widened(getattr(part, field.name), loops=loops) for field in dataclasses.fields(part)}
    return dataclasses.replace(part, **fields)  # type: ignore[type-var]


def _looped_linear(weight: Dense | Narrow) -> Looped:
    from trtlab.ops.cpu import products as cpu_products

    if isinstance(weight, Int8Linear):
        return _looped_int8(weight)
    loop, prequant, input_scale = cpu_products.linear, None, None
    if isinstance(weight, Dense):
        stored, scale, loop = weight.weight, torch.ones(len(weight.weight)), cpu_products.linear_bf16
    elif isinstance(weight, WeightOnly):
        stored, scale, prequant = weight.weight, weight.scale.value, weight.prequant
        if stored.dtype == torch.uint8:
            stored, loop = stored.view(torch.int8), cpu_products.linear_int4
        else:
            scale = scale[:, 0]
    else:
        stored, input_scale = _float8(weight), weight.input_scale
        scale = (weight.input_scale.value * weight.weight_scale.value).expand(len(stored))
        prequant = weight.groups.prequant if isinstance(weight, Int4Float8Linear) else None
    arrays = array_of(stored.contiguous()), scale.contiguous().numpy()
    return Looped(weight, FEW, weight.shape, loop, arrays, _numbers(weight.bias), _numbers(prequant), input_scale)


def _looped_int8(weight: Int8Linear) -> LoopedInt8:
    from trtlab.ops.cpu import products as cpu_products

    return LoopedInt8(
        weight,
        FEW,
        weight.shape,
        cpu_products.linear_int8,
        (weight.weight.contiguous().numpy(), weight.output_scale.value.contiguous().numpy()),
        _numbers(weight.bias),
        _numbers(weight.prequant),
        smoother=_numbers(weight.smoother),
        static=weight.input_scale,
    )


def _numbers(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else tensor.float().contiguous().numpy()


def _float8(weight: Float8Linear | Int4Float8Linear) -> Tensor:
    """The E4M3 weight ``[out, in]``; W4A8's INT4 is turned into it once, not at each token."""
    if isinstance(weight, Float8Linear):
        return weight.weight
    groups = weight.groups
    return to_float8(dequantize(groups.integers, groups.scale.value.float()), weight.weight_scale)


def _laid_out(weight: Dense) -> Dense | LaidOutDense:
    tensor = weight.weight
    if tensor.numel() < LARGE or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return dataclasses.replace(weight, weight=tensor.t().contiguous().t())
    with torch.inference_mode(False), torch.no_grad():
        laid_out = torch.ops.mkldnn._reorder_linear_weight(tensor)
    return LaidOutDense(weight.name, laid_out, (tensor.shape[0], tensor.shape[1]), weight.bias)
