"""Prepares weights for a CPU: kept as stored where a loop can read them, else arranged for torch's product.

BF16, E4M3, INT8 and INT4 numbers keep their type, because a step of few tokens spends most of its time reading them.
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
from trtlab.ops.cpu.large_pages import LargePages
from trtlab.ops.quantized_linear import linear

Array = NDArray[Any]
Narrow = WeightOnly | Int8Linear | Float8Linear | Int4Float8Linear  # the weights that a loop reads, besides BF16

LARGE = 2**20  # elements; below this, oneDNN's layout saves less than its call costs
FEW = 32  # tokens; above this, widening the weights for torch's product costs less than it saves
FEW_OF_CACHED = 2  # tokens, for a weight that the CPU's cache also holds in float32, where reading it costs nothing
BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}  # integers of the size of types numpy lacks


def has_loops() -> bool:
    """Whether the compiled loops can run: they need Numba, which supports a new Python version only some time later."""
    return find_spec("numba") is not None


def array_of(tensor: Tensor) -> Array:
    """A NumPy array over the tensor's memory; types that NumPy lacks become unsigned integers."""
    bits = BITS.get(tensor.dtype)
    return tensor.numpy() if bits is None else tensor.view(bits).numpy()


@dataclass(frozen=True)
class Gain(Norm):
    """An RMSNorm whose gain ``[hidden]`` is also kept as a float32 array."""

    array: Array


@dataclass(frozen=True)
class Looped:
    """A linear layer whose stored numbers a loop reads: ``loop(x, *arrays, out)``; ``source`` is for more tokens.

    With ``input_scale`` the input is quantized to E4M3 first. With ``widen``, more tokens are multiplied by torch with
    the float32 matrix that ``widen(*arrays, matrix)`` writes: the numbers of ``dequantize``, in one pass.
    """

    source: Dense | ArrangedDense | Narrow
    few: int  # up to this many tokens the loop is faster
    shape: tuple[int, int]  # outputs and inputs
    loop: Callable[..., None]
    arrays: tuple[Array, ...]
    bias: Array | None
    prequant: Array | None
    input_scale: ToOriginal | None = None
    widen: Callable[..., None] | None = None

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.source.name

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, its scales and the bias."""
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
    """A linear layer whose input is quantized to INT8 too; the result is that of torch's product, bit for bit."""

    smoother: Array | None = None
    static: ToOriginal | ToQuantized | None = None  # None: each token has its own scale

    def _product(self, x: Array) -> Array:
        from trtlab.ops.cpu import products as cpu_products

        weight, scale = self.arrays
        if self.smoother is not None:
            x = x / self.smoother
        if self.prequant is not None:
            x = x * self.prequant
        numbers, sums = np.empty_like(x), np.empty((len(x), self.shape[0]), np.int32)
        row_scale = np.empty((len(x), 1), np.float32)
        if self.static is None:
            cpu_products.int8_rows(x, numbers, row_scale)
        else:
            divides = isinstance(self.static, ToOriginal)
            cpu_products.int8_by(x, self.static.value.item(), divides, numbers, row_scale)
        self.loop(numbers, weight, sums)
        result: Array = sums.astype(np.float32) * row_scale * scale
        return result


@linear.register
def _looped(weight: Looped, x: Tensor) -> Tensor:
    if weight.widen is None:
        return linear(weight.source, x)
    matrix = torch.empty(weight.shape)
    weight.widen(*weight.arrays, matrix.numpy())
    if weight.prequant is not None:
        x = x * torch.from_numpy(weight.prequant)
    return linear(Dense(weight.name, matrix, weight.source.bias), x)


@dataclass(frozen=True)
class ArrangedDense:
    """A float32 linear layer whose weight is in oneDNN's own layout, so that no call has to convert it."""

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
def _arranged_dense(weight: ArrangedDense, x: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.weight, weight.bias, "none", [], "")
    return y


def cpu_weights(weights: ModelWeights, *, loops: bool, round_dense: bool = False) -> ModelWeights:
    """Convert weights to the form that a CPU reads fastest.

    With ``loops`` quantized linear layers stay as they are stored, and a dense one is kept in BF16 if this holds all
    its numbers exactly; both are copied to large pages. If the last-level cache has room for all small dense layers in
    float32, steps of several tokens read them there. Any other layer becomes float32, in oneDNN's layout if large,
    column by column if small.

    Args:
        weights: The weights of one rank.
        loops: Whether the compiled loops will read them: for ``CpuOps``, else for ``TorchOps``.
        round_dense: Whether to round the other dense layers to BF16 as well.

    Raises:
        ConfigError: for ``round_dense`` without ``loops``.
    """
    if round_dense and not loops:
        raise ConfigError("fast_cpu_kernels needs Numba, which is not installed", remedy="pip install numba")

    cached = 2 * _small_bytes(weights) <= cache_bytes()  # half of the cache is left for other data
    pages = LargePages()

    def prepared(weight: Linear) -> object:
        if isinstance(weight, Dense) and loops and (round_dense or _fits_bfloat16(weight.weight)):
            half = pages.copy(weight.weight, torch.bfloat16)
            bias = None if weight.bias is None else weight.bias.float()
            stored = Dense(weight.name, half, bias)
            looped = _looped_linear(stored)
            if not cached or half.numel() >= LARGE:
                return looped
            return dataclasses.replace(looped, source=_arranged(_widened(stored)), few=FEW_OF_CACHED)
        wide: Linear = _widened(weight)
        if isinstance(wide, Dense):
            return _arranged(wide)
        if not (isinstance(wide, Narrow) and loops):
            return wide
        looped = _looped_linear(_in_large_pages(wide, pages))
        return wide if _holds_nan(looped.arrays[0]) else looped

    result: ModelWeights = _widened(map_linears(weights, prepared), loops=loops)
    return _with_shared_table(weights, result)


def _with_shared_table(weights: ModelWeights, result: ModelWeights) -> ModelWeights:
    """``result`` with one copy of a tied table: the lookup reads that of the head."""
    table, head = weights.embedding, weights.lm_head
    looped: object = result.lm_head
    copy = looped.source if isinstance(looped, Looped) else None
    if table is None or not isinstance(head, Dense) or not isinstance(copy, Dense):
        return result
    same = (table.weight.data_ptr(), table.weight.dtype) == (head.weight.data_ptr(), copy.weight.dtype)
    return dataclasses.replace(result, embedding=dataclasses.replace(table, weight=copy.weight)) if same else result


def _in_large_pages(part: Any, pages: LargePages) -> Any:
    """A quantized weight whose matrices are copied to large pages."""
    if isinstance(part, Tensor):
        return pages.copy(part) if part.dim() == 2 else part
    if not dataclasses.is_dataclass(part):
        return part
    fields = {field.name: _in_large_pages(getattr(part, field.name), pages) for field in dataclasses.fields(part)}
    return dataclasses.replace(part, **fields)  # type: ignore[type-var]


def _small_bytes(weights: ModelWeights) -> int:
    """Bytes of all small dense weights in float32."""
    sizes: list[int] = []

    def measure(weight: Linear) -> Linear:
        if isinstance(weight, Dense) and weight.weight.numel() < LARGE:
            sizes.append(weight.weight.numel() * torch.float32.itemsize)
        return weight

    map_linears(weights, measure)
    return sum(sizes)


def _fits_bfloat16(tensor: Tensor) -> bool:
    """Whether BF16 holds every number of a weight exactly, as after a BF16 checkpoint was converted to float32."""
    if tensor.dtype != torch.float32:
        return tensor.dtype == torch.bfloat16
    bits = tensor.contiguous().view(torch.int32)
    return all(not (rows & 0xFFFF).any() for rows in (bits[:1], bits))  # the first row rules out most others


def _widened(part: Any, *, loops: bool = False) -> Any:
    """Convert all 16-bit numbers to float32; with ``loops`` norms become arrays, and embeddings stay unchanged."""
    if isinstance(part, Tensor):
        return part.float() if part.dtype in (torch.bfloat16, torch.float16) else part
    if isinstance(part, tuple):
        return tuple(_widened(item, loops=loops) for item in part)
    if not dataclasses.is_dataclass(part) or isinstance(part, Looped | ArrangedDense):
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
    loop, widen, prequant, input_scale = cpu_products.linear, None, None, None
    if isinstance(weight, Dense):
        stored, scale, loop = weight.weight, torch.ones(len(weight.weight)), cpu_products.linear_bf16
    elif isinstance(weight, WeightOnly):
        stored, scale, prequant = weight.weight, weight.scale.value, weight.prequant
        if stored.dtype == torch.uint8:
            stored, loop, widen = stored.view(torch.int8), cpu_products.linear_int4, cpu_products.widen_int4
        else:
            scale, loop, widen = scale[:, 0], cpu_products.linear_w8, cpu_products.widen_w8
    else:
        stored, input_scale = _float8(weight), weight.input_scale
        scale = (weight.input_scale.value * weight.weight_scale.value).expand(len(stored))
        prequant = weight.groups.prequant if isinstance(weight, Int4Float8Linear) else None
    arrays = array_of(stored.contiguous()), scale.contiguous().numpy()
    vectors = _numbers(weight.bias), _numbers(prequant)
    return Looped(weight, FEW, weight.shape, loop, arrays, *vectors, input_scale, widen)


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


def _holds_nan(stored: Array) -> bool:
    """Whether E4M3 numbers hold NaN, which the loops do not know: a check of each number would take half their speed.

    In an 8-bit cache there is none, see ``PagedCache.encoded``.
    """
    return stored.dtype == np.uint8 and bool(((stored & 0x7F) == 0x7F).any())


def _numbers(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else tensor.float().contiguous().numpy()


def _float8(weight: Float8Linear | Int4Float8Linear) -> Tensor:
    """The E4M3 weight ``[out, in]``; W4A8's INT4 numbers are converted to it once, not for each token."""
    if isinstance(weight, Float8Linear):
        return weight.weight
    groups = weight.groups
    return to_float8(dequantize(groups.integers, groups.scale.value.float()), weight.weight_scale)


def _arranged(weight: Dense) -> Dense | ArrangedDense:
    tensor = weight.weight
    if tensor.numel() < LARGE or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return dataclasses.replace(weight, weight=tensor.t().contiguous().t())
    with torch.inference_mode(False), torch.no_grad():
        arranged = torch.ops.mkldnn._reorder_linear_weight(tensor)
    return ArrangedDense(weight.name, arranged, (tensor.shape[0], tensor.shape[1]), weight.bias)
