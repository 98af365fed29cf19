"""How many bytes a linear's weight takes under each ``quant_algo``: sizes of TensorRT-LLM's tensors, no arithmetic."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from types import MappingProxyType

from trtlab.errors import ConfigError

ATTENTION = ("attention.qkv", "attention.dense")
MLP = ("mlp.fc", "mlp.gate", "mlp.proj")
LINEARS = ATTENTION + MLP
ROW_PARALLEL = ("attention.dense", "mlp.proj")  # no norm in front of them takes the inverse of a smoothing factor


@dataclass(frozen=True)
class WeightFormat:
    """The tensors of one quantized linear ``[out, in]``; every other weight stays in the model's dtype.

    ``row_scales`` and ``column_factors`` name the linears with one factor an output row or an input column,
    ``group_tensors`` counts tensors of one factor a group of inputs, ``scalars`` single float32 numbers besides the
    one scale that ``tensor_scale`` gives each linear without ``row_scales``.
    ``factor_bytes=None`` means that factors are in the model's dtype. Source: TensorRT-LLM's checkpoint format.
    """

    bits: int
    linears: tuple[str, ...] = LINEARS
    row_scales: tuple[str, ...] = ()
    column_factors: tuple[str, ...] = ()
    group_tensors: int = 0
    tensor_scale: bool = False
    scalars: int = 0
    factor_bytes: int | None = None
    keeps_end_layers: bool = False  # the first and the last layer are not quantized

    def nbytes(self, part: str, shape: tuple[int, ...], itemsize: int, group_size: int) -> int:
        """Bytes of the linear ``part`` with its scales; ``itemsize`` is that of the model's dtype."""
        rows, columns = shape
        factors = rows if part in self.row_scales else 0
        factors += columns if part in self.column_factors else 0
        factors += self.group_tensors * rows * -(-columns // group_size)
        scalars = self.scalars + (self.tensor_scale and part not in self.row_scales)
        weight = -(-rows * columns * self.bits // 8)
        return weight + factors * (self.factor_bytes or itemsize) + scalars * 4


def _smoothed(row_scales: tuple[str, ...], scalars: int) -> WeightFormat:
    return WeightFormat(
        8,
        row_scales=row_scales,
        column_factors=ROW_PARALLEL,
        tensor_scale=True,
        scalars=scalars,
        factor_bytes=4,
    )


WEIGHT_FORMATS: abc.Mapping[str, WeightFormat] = MappingProxyType(
    {
        "W8A16": WeightFormat(8, row_scales=LINEARS),
        "W4A16": WeightFormat(4, row_scales=LINEARS),
        "W4A16_AWQ": WeightFormat(4, column_factors=LINEARS, group_tensors=1),
        "W4A8_AWQ": WeightFormat(4, column_factors=LINEARS, group_tensors=1, scalars=2),
        "W4A16_GPTQ": WeightFormat(4, group_tensors=2),  # scale and zero point
        "W8A8_SQ_PER_CHANNEL": _smoothed(LINEARS, 1),
        "W8A8_SQ_PER_TENSOR_PLUGIN": _smoothed(("attention.qkv",), 2),
        "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": _smoothed(LINEARS, 2),
        "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN": _smoothed(("attention.qkv",), 1),
        "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": _smoothed(LINEARS, 1),
        "FP8": WeightFormat(8, tensor_scale=True, scalars=1),
        "FP8_PER_CHANNEL_PER_TOKEN": WeightFormat(
            8, linears=MLP, row_scales=MLP, factor_bytes=4, keeps_end_layers=True
        ),
    }
)
KV_CACHE_BYTES: abc.Mapping[str, int] = MappingProxyType({"INT8": 1, "FP8": 1})


def weight_format(quant_algo: str | None) -> WeightFormat | None:
    """The format of an algorithm by TensorRT-LLM's name, None for no quantization; ConfigError lists the known."""
    if quant_algo is not None and quant_algo not in WEIGHT_FORMATS:
        raise ConfigError("unknown quant_algo", got=repr(quant_algo), expected=" | ".join(WEIGHT_FORMATS))
    return WEIGHT_FORMATS[quant_algo] if quant_algo is not None else None


def kv_itemsize(kv_cache_quant_algo: str | None, itemsize: int) -> int:
    """Bytes of one number in the KV cache; ``itemsize`` is that of the model's dtype."""
    if kv_cache_quant_algo is not None and kv_cache_quant_algo not in KV_CACHE_BYTES:
        expected = " | ".join([*KV_CACHE_BYTES, "None"])
        raise ConfigError("unknown kv_cache_quant_algo", got=repr(kv_cache_quant_algo), expected=expected)
    return KV_CACHE_BYTES[kv_cache_quant_algo] if kv_cache_quant_algo is not None else itemsize
