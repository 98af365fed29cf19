"""Writes folders and safetensors files so that a killed process leaves the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtlab.errors import CheckpointError, TrtlabError
from trtlab.storage.json_files import read_object
from trtlab.storage.lazy import SAFETENSORS_DTYPES, LazyTensor

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def replacing(folder: Path, *, ours: Callable[[str], bool], marker: str, error: type[TrtlabError]) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``folder`` in one step when the block ends without an error.

    An existing folder is replaced only when it is empty, or when every name in it satisfies ``ours`` and its
    config.json has the key ``marker``; otherwise ``error`` is raised before anything is written. After an exception
    (a full disk, an interrupt) the old folder is as it was. After a kill it is too; what the killed process had
    written, a hidden folder that ends in ``.partial``, goes with the next call.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would replace what a link points to
    foreign = _foreign(folder, ours, marker)
    if foreign:
        raise error(
            f"{folder} is not a folder that this call may replace",
            got=f"it holds {', '.join(foreign[:3])}",
            remedy="choose a new folder",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch, lock = _scratch_beside(folder)
    except OSError as cause:
        raise error(f"{folder} cannot be written: {cause.strerror}", remedy="choose a writable place") from cause
    try:
        scratch.chmod(0o777 & ~_umask())
        yield scratch
        _swap(scratch, folder)
    except OSError as cause:
        raise error(
            f"{folder} could not be written: {cause.strerror or cause}",
            remedy="nothing was changed; free some space or choose another place",
        ) from cause
    finally:
        if scratch.is_symlink():  # the folder was a link: what it points to stays
            scratch.unlink()
        shutil.rmtree(scratch, ignore_errors=True)
        lock.close()


def _scratch_beside(folder: Path) -> tuple[Path, _Locked]:
    """A new hidden folder beside ``folder``, locked while this process lives; what dead ones left there is removed."""
    with contextlib.closing(_Locked(folder.parent, wait=True)):
        for left in folder.parent.glob(f".{glob.escape(folder.name)}-*.partial"):
            with contextlib.closing(_Locked(left, wait=False)) as lock:
                if lock.held:
                    shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".partial", dir=folder.parent))
        return scratch, _Locked(scratch, wait=False)


class _Locked:
    """A folder that one process at a time may hold; the system lets go of it when that process ends, however it ends.

    ``held`` is false while another one has it, and where the system cannot tell.
    """

    def __init__(self, folder: Path, *, wait: bool) -> None:
        self._descriptor, self.held = -1, False
        with contextlib.suppress(ImportError, OSError):  # Windows has no such locks, some file systems neither
            import fcntl

            self._descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            self.held = True

    def close(self) -> None:
        """Let go."""
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _foreign(folder: Path, ours: Callable[[str], bool], marker: str) -> list[str]:
    """What in a folder forbids that it be replaced."""
    if not folder.is_dir():
        return [f"a file of that name, {folder.name}"] if folder.exists() else []
    names = sorted(entry.name for entry in folder.iterdir())
    return [name for name in names if not ours(name)] or (names if names and not _has_key(folder, marker) else [])


def _has_key(folder: Path, key: str) -> bool:
    try:
        return key in read_object(folder / "config.json", remedy="")
    except CheckpointError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap(scratch: Path, folder: Path) -> None:
    """Put ``scratch`` in the place of ``folder``; the old content is left at ``scratch``."""
    if not folder.exists():
        scratch.rename(folder)
        return
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    at_cwd, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if exchange is not None and exchange(at_cwd, os.fsencode(scratch), at_cwd, os.fsencode(folder), flag) == 0:
        return
    aside = scratch.with_name(scratch.name + "-old")  # no exchange on this system: two renames
    folder.rename(aside)
    scratch.rename(folder)
    shutil.rmtree(aside)


_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class TensorFile:
    """A safetensors file whose tensors come in any order: their shapes are known, so the header goes first.

    The library's own writer needs every tensor at once. Format: eight bytes of header length, the JSON header, the
    tensors' bytes. Widest dtypes lie first, so that each tensor is aligned. Use it as a context manager.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._path = path
        self._missing = dict(shapes)
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self.order:
            shape, dtype = shapes[name]
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
            self._starts[name] = offset
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._data_start = 8 + len(encoded)
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little"))
        self._file.write(encoded)

    @property
    def order(self) -> list[str]:
        """The names still missing, in the order of their places in the file."""
        return sorted(self._missing, key=lambda name: (-self._missing[name][1].itemsize, name))

    def put(self, name: str, value: Tensor) -> None:
        """Write one tensor to its place; CheckpointError when it is not of the shape and dtype announced."""
        shape, dtype = self._missing[name]
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise CheckpointError(
                f"{name} changed while {self._path.name} was written",
                got=f"{value.dtype} {list(value.shape)}",
                expected=f"{dtype} {list(shape)}",
            )
        self._file.seek(self._data_start + self._starts[name])
        self._file.write(_bytes(value))
        del self._missing[name]

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            assert not self._missing, f"{self._path.name} lacks {list(self._missing)[:3]}"
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], *, on_tensor: Callable[[LazyTensor], object] | None = None
) -> None:
    """A safetensors file, one tensor in memory at a time; ``on_tensor`` is called after each."""
    with TensorFile(path, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}) as file:
        for name in file.order:
            file.put(name, tensors[name].read())
            if on_tensor is not None:
                on_tensor(tensors[name])


def _bytes(value: Tensor) -> memoryview:
    """The raw bytes of a tensor, without a copy when it is contiguous."""
    flat = value.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
