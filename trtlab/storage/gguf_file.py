"""Reads a GGUF file: its metadata at once, its tensors lazily, each dequantized when it is read.

The header is read here, and not by the ``gguf`` package, whose reader makes several Python objects of every number and
string of the vocabulary (seconds for a real model) and does not stop at the end of a damaged file. The package knows
the blocks of the quantized types.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtlab.errors import CheckpointError, MissingDependency
from trtlab.storage.lazy import LazyTensor, Stamp, explained, file_stamp, require_unchanged
from trtlab.storage.paths import require_file
from trtlab.validation import listed, shorten

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SPLIT_COUNT = "split.count"
ALIGNMENT = "general.alignment"
MOST_DIMENSIONS = 4
# By the number of the type in the file, as the format's specification has them.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in the file: in ``rows`` of ``row_bytes`` bytes from ``start``."""

    kind: str
    """ggml's name of its type: ``Q4_1``."""
    shape: tuple[int, ...]
    start: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Rows of all dimensions but the last."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufFile:
    """The metadata of a file, and its tensors by their names there."""

    path: Path
    metadata: Mapping[str, Any]
    """Numbers, texts, and lists of texts; a list of numbers is an array."""
    stored: Mapping[str, StoredTensor]
    stamp: Stamp

    def tensors(self) -> dict[str, LazyTensor]:
        """Lazy tensors: float32, float16 and bfloat16 as they are, quantized ones dequantized to float32."""
        return {name: self._lazy(tensor) for name, tensor in self.stored.items()}

    def _lazy(self, tensor: StoredTensor) -> LazyTensor:
        dtype = FLOATS.get(tensor.kind, torch.float32)
        whole = partial(self._read, tensor, 0, tensor.rows)
        return LazyTensor(
            tensor.shape, dtype, whole, read_rows=partial(self._read, tensor) if len(tensor.shape) == 2 else None
        )

    def _read(self, tensor: StoredTensor, start: int, length: int) -> Tensor:
        data = self.read_bytes(tensor, start, length)
        if tensor.kind in FLOATS:
            values = torch.from_numpy(data).view(FLOATS[tensor.kind])
        else:
            with np.errstate(all="ignore"):  # of a scale that is not finite; who computes with it tells
                values = torch.from_numpy(gguf_package().dequantize(data, _ggml_type(tensor.kind)))
        return values if len(tensor.shape) == 2 else values.reshape(tensor.shape)

    def read_bytes(self, tensor: StoredTensor, start: int, length: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """``length`` rows of a tensor from row ``start``, as they are stored: ``[length, row_bytes]``."""
        require_unchanged(self.path, self.stamp)
        offset = tensor.start + start * tensor.row_bytes
        with explained(self.path):
            return np.fromfile(self.path, np.uint8, length * tensor.row_bytes, offset=offset).reshape(length, -1)


def gguf_package() -> Any:
    """The module ``gguf``; MissingDependency with the command that installs it."""
    try:
        import gguf
    except ImportError as error:
        raise MissingDependency("reading a GGUF file needs gguf", remedy="pip install gguf") from error
    return gguf


def _ggml_type(kind: str) -> Any:
    return gguf_package().GGMLQuantizationType[kind]


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file and read its header.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, one of several that make a model, or holds a type that
            is not supported, which is named.
        MissingDependency: The package ``gguf`` is not installed.
    """
    require_file(path, remedy="give the path of a .gguf file")
    gguf_package()
    stamp = file_stamp(path)
    with explained(path), path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(
                f"{path.name} is no GGUF file: it does not begin with GGUF", remedy="give a model in GGUF"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _Header(content, path.name)
            metadata = header.metadata()
            stored = header.tensors(metadata)
    _refuse_split(path, metadata)
    return GgufFile(path, metadata, stored, stamp)


def _refuse_split(path: Path, metadata: Mapping[str, Any]) -> None:
    count = metadata.get(SPLIT_COUNT, 1)
    if type(count) is not int or count > 1:
        raise CheckpointError(
            f"{path.name} is one of {shorten(count)} files that make a model, which is not supported",
            remedy="join them: llama-gguf-split --merge FIRST_FILE ONE_FILE",
        )


class _Header:
    """Reads the header of a file from its start.

    Raises CheckpointError for a version that is not supported, ValueError where it is damaged or ends too early.
    """

    def __init__(self, content: mmap.mmap, name: str) -> None:
        self.content = content
        self.place = len(MAGIC)
        version = self._number("I")
        if version not in VERSIONS:
            swapped = version & 0xFFFF == 0
            got = "in the byte order of big-endian machines" if swapped else f"of version {version}"
            raise CheckpointError(
                f"{name} is {got}, which is not supported",
                expected="version 2 or 3, little-endian",
                remedy="convert the model to GGUF again, or give its Hugging Face folder",
            )
        self.tensor_count, self.key_count = self._number("Q"), self._number("Q")

    def metadata(self) -> dict[str, Any]:
        """All keys with their values."""
        values: dict[str, Any] = {}
        for _ in range(self.key_count):
            key = self._text()
            if key in values:
                raise ValueError(f"the key {shorten(key)} is there twice")
            values[key] = self._value(self._number("I"))
        return values

    def tensors(self, metadata: Mapping[str, Any]) -> dict[str, StoredTensor]:
        """Where each tensor lies, by name."""
        alignment = metadata.get(ALIGNMENT, 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{ALIGNMENT} is {shorten(alignment)}, expected a power of two")
        entries = list(self._entries())
        base = -(-self.place // alignment) * alignment
        refused = sorted({kind for _, _, kind, _ in entries if kind not in FLOATS and kind not in BLOCKS})
        if refused:
            raise CheckpointError(
                f"tensors of type {listed(refused)} are not supported",
                expected=" | ".join((*FLOATS, *BLOCKS)),
                remedy="quantize the model to one of these, or give its Hugging Face folder",
            )
        stored: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in entries:
            if name in stored:
                raise ValueError(f"the tensor {shorten(name)} is there twice")
            stored[name] = tensor = StoredTensor(kind, shape, base + offset, _row_bytes(name, shape, kind))
            end = tensor.start + tensor.rows * tensor.row_bytes
            if end > len(self.content):
                raise ValueError(f"{shorten(name)} ends at byte {end:,}, and the file at {len(self.content):,}")
        return stored

    def _entries(self) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
        kinds = {int(kind): kind.name for kind in gguf_package().GGMLQuantizationType}
        for _ in range(self.tensor_count):
            name, dimensions = self._text(), self._number("I")
            if not 1 <= dimensions <= MOST_DIMENSIONS:
                raise ValueError(f"{shorten(name)} has {dimensions} dimensions")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            number = self._number("I")
            yield name, shape, kinds.get(number, f"number {number}"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            item, count = self._number("I"), self._number("Q")
            if item == STRING:
                return [self._text() for _ in range(count)]
            return np.frombuffer(self._take(count * struct.calcsize(_format(item))), np.dtype("<" + _format(item)))
        return self._number(_format(kind))

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack("<" + kind, self._take(struct.calcsize(kind)))
        return value

    def _text(self) -> str:
        return self._take(self._number("Q")).decode()

    def _take(self, count: int) -> bytes:
        start, self.place = self.place, self.place + count
        if self.place > len(self.content):
            raise ValueError(f"its header goes on behind the end of the file, at byte {len(self.content):,}")
        return self.content[start : self.place]


def _format(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a value of type {kind}, which is not supported")
    return SCALARS[kind]


def _row_bytes(name: str, shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a row, which holds whole blocks."""
    block, block_bytes = gguf_package().GGML_QUANT_SIZES[_ggml_type(kind)]
    if 0 in shape or shape[-1] % block:
        raise ValueError(f"{shorten(name)} of shape {list(shape)} does not hold whole blocks of {block} ({kind})")
    return int(shape[-1] // block * block_bytes)
