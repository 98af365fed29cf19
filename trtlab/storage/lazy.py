"""Lazy tensors: shape and dtype are known at once, and only the bytes that are used are read, when they are used."""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from trtlab.errors import CheckpointError, TrtlabError
from trtlab.storage.paths import reading, require_file

SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class LazyTensor:
    """Shape and dtype of a tensor, and a function that reads it. Each ``read()`` reads again: nothing is cached."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    parts: tuple[LazyTensor, ...] = ()  # joined by rows; a slice reads only its own parts
    read_rows: Callable[[int, int], Tensor] | None = None  # from the first row, so many; of a file without a mapping

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def narrow(self, dim: int, start: int, length: int) -> LazyTensor:
        """A contiguous slice along one dimension; of a stored tensor only the pages of the slice are read."""
        if dim == 0 and self.parts:
            return cat(tuple(_overlapping(self.parts, start, length)))
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        if dim == 0 and self.read_rows is not None:
            return LazyTensor(shape, self.dtype, partial(self.read_rows, start, length))
        return LazyTensor(shape, self.dtype, lambda: self.read().narrow(dim, start, length))

    def pad(self, dim: int, size: int) -> LazyTensor:
        """The tensor with zeros appended along ``dim``, ``size`` in all."""
        if size == self.shape[dim]:
            return self
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])

        def read() -> Tensor:
            padded = torch.zeros(shape, dtype=self.dtype)
            padded.narrow(dim, 0, self.shape[dim]).copy_(self.read())
            return padded

        return LazyTensor(shape, self.dtype, read)

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same values in another dtype."""
        if dtype == self.dtype:
            return self
        rows = self.read_rows
        read_rows = None if rows is None else lambda start, length: rows(start, length).to(dtype)
        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype), read_rows=read_rows)

    def map(self, function: Callable[[Tensor], Tensor]) -> LazyTensor:
        """The result of a function that keeps shape and dtype."""
        return LazyTensor(self.shape, self.dtype, lambda: function(self.read()))

    def meta(self) -> Tensor:
        """A tensor of this shape and dtype without data."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def in_memory(tensor: Tensor) -> LazyTensor:
    """A lazy tensor from one in memory; gradients are dropped."""
    values = tensor.detach()
    return LazyTensor(tuple(values.shape), values.dtype, lambda: values)


def raw_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor in row order, without a copy where it lies so in memory."""
    flat = value.cpu().contiguous().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a lone element may have another stride, which view() refuses
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def cat(parts: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    """Join parts along one dimension; a single part is returned unchanged."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    shape = (*first.shape[:dim], sum(p.shape[dim] for p in parts), *first.shape[dim + 1 :])
    by_rows = tuple(parts) if dim == 0 else ()
    return LazyTensor(shape, first.dtype, lambda: torch.cat([p.read() for p in parts], dim), by_rows)


def _overlapping(parts: Sequence[LazyTensor], start: int, length: int) -> Iterator[LazyTensor]:
    for part in parts:
        first, stop = max(0, start), min(part.shape[0], start + length)
        if first < stop:
            yield part if stop - first == part.shape[0] else part.narrow(0, first, stop - first)
        start -= part.shape[0]


Stamp = tuple[int, int, int]
CALLS = re.compile(r"GLOBAL|unrecognized function|Can only (create|build)|must be imported")  # in torch's refusals


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file; the file is mapped for each read and released after it.

    Raises CheckpointError when the file is missing, truncated or holds a dtype that torch does not have.
    """
    require_file(path)
    stamp = file_stamp(path)
    with explained(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {name: _stored(path, stamp, name, s.get_shape(), s.get_dtype()) for name, s in slices.items()}


def _stored(path: Path, stamp: Stamp, name: str, shape: Sequence[int], kind: str) -> LazyTensor:
    if kind not in SAFETENSORS_DTYPES:
        raise CheckpointError(f"{name} in {path.name} has dtype {kind}", expected=" | ".join(SAFETENSORS_DTYPES))

    def read() -> Tensor:
        require_unchanged(path, stamp)
        with explained(path), safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return LazyTensor(tuple(shape), SAFETENSORS_DTYPES[kind], read)


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one ``torch.save`` file, loaded as data only.

    The file stays mapped, and its pages are read when they are used. A file of torch before 1.6, which is no zip file,
    cannot be mapped: its tensors are held in memory.

    Raises CheckpointError when the file is missing or damaged, when its pickle would run code, and for a tensor without
    plain values (sparse, quantized by torch, or on the meta device).
    """
    require_file(path)
    stamp = file_stamp(path)
    return {
        name: LazyTensor(tuple(value.shape), value.dtype, partial(_loaded, path, stamp, value))
        for name, value in _load_pickle(path).items()
    }


def _loaded(path: Path, stamp: Stamp, value: Tensor) -> Tensor:
    require_unchanged(path, stamp)
    return value


def _load_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    with explained(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on kinds of tensors: those that are not plain are refused below
        try:
            loaded = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
        except pickle.UnpicklingError as error:
            if CALLS.search(str(error)) is None:  # torch's own words advise to load it with code
                raise ValueError("its pickle is damaged") from error
            raise CheckpointError(
                f"{path.name} is refused: its pickle holds more than tensors, and loading it would run code",
                remedy="if you trust it, convert it to safetensors",
            ) from error
    if not isinstance(loaded, dict) or any(not isinstance(name, str) for name in loaded):
        raise CheckpointError(f"{path.name} does not hold a dict of tensors", remedy="copy the model's own file again")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if loaded and not tensors:
        raise CheckpointError(
            f"{path.name} does not hold a dict of tensors: it has {', '.join(list(loaded)[:5])}",
            remedy="a training tool wrote it: store the model's own state_dict() alone",
        )
    for name, value in tensors.items():
        if not _is_plain(value):
            kind = "on the meta device" if value.is_meta else "quantized" if value.is_quantized else "sparse or nested"
            raise CheckpointError(f"{name} in {path.name} is {kind}", remedy="store it as a plain tensor")
    return {name: value.detach() for name, value in tensors.items()}


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor has a shape and a number at each place of it."""
    return value.layout == torch.strided and not (value.is_meta or value.is_quantized or value.is_nested)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn anything that a reader of weight files raises within the block into an error that names the file."""
    try:
        yield
    except TrtlabError:
        raise
    except OSError:
        with reading(path):
            raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path.name} cannot be read: {reason:.300}", remedy="the file is truncated or damaged: copy it again"
        ) from error


def file_stamp(path: Path) -> Stamp:
    """Inode, size and modification time of a file: another file of the same name has another stamp."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def require_unchanged(path: Path, stamp: Stamp) -> None:
    try:
        changed = file_stamp(path) != stamp
    except OSError as cause:
        raise CheckpointError(
            f"{path} is gone: it was there when its folder was opened ({cause.strerror})",
            remedy="put it back, or open the folder at its new place",
        ) from cause
    if changed:
        raise CheckpointError(f"{path} has changed since it was opened", remedy="open its folder again")
