"""Maps TensorRT's data types to torch's and to the words that this package uses for both. Needs no TensorRT."""

from __future__ import annotations

from typing import Any

import torch

# TensorRT's member of trt.DataType -> our word, which is torch's wherever torch has one.
WORDS = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT8": "int8",
    "INT4": "int4",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
MEMBERS = {word: member for member, word in WORDS.items()}
FLOATS = ("float32", "float16", "bfloat16")


def word(dtype: Any) -> str:
    """The word for a ``trt.DataType`` member; a type that nothing here emits keeps TensorRT's name in lower case."""
    return WORDS.get(dtype.name, str(dtype.name).lower())


def to_trt(trt: Any, name: str) -> Any:
    """The ``trt.DataType`` member for a word such as ``"bfloat16"``."""
    return getattr(trt.DataType, MEMBERS[name])


def to_torch(name: str) -> torch.dtype:
    """The torch type for a word; torch has no INT4, so its values are stored one per byte as INT8."""
    dtype = torch.int8 if name == "int4" else getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def from_torch(dtype: torch.dtype) -> str:
    """The word for a torch type, ``"float16"`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def nbytes(name: str, elements: int) -> int:
    """Bytes that ``elements`` values take in TensorRT: two INT4 values share a byte."""
    return (elements + 1) // 2 if name == "int4" else elements * to_torch(name).itemsize


def unpack_int4(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Unpack INT4 values (-8 to 7) to one per INT8, from bytes that hold two each, the first in the low nibble."""
    bytes_ = packed.reshape(-1).view(torch.int8)  # [elements / 2]
    low, high = (bytes_ << 4) >> 4, bytes_ >> 4  # the arithmetic shift carries the sign
    return torch.stack((low, high), dim=-1).reshape(shape)
