"""Writes folders and safetensors files; a killed process leaves the complete old one or the complete new one."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtlab.errors import CheckpointError, TrtlabError
from trtlab.storage.json_files import read_object
from trtlab.storage.lazy import SAFETENSORS_DTYPES, LazyTensor, raw_bytes
from trtlab.storage.paths import absolute_path, writing
from trtlab.storage.scratch import FolderLock, remove_folder, scratch_folder


@contextlib.contextmanager
def replacing(folder: Path, *, ours: Callable[[str], bool], marker: str, error: type[TrtlabError]) -> Iterator[Path]:
    """A new folder to fill, which replaces ``folder`` in one step when the block ends without an error.

    After an exception (a full disk, an interrupt) or a kill the old folder is unchanged. A killed process leaves a
    hidden folder that ends in ``.partial``; the next call for the same folder removes it. Where the system cannot
    exchange two folders, a kill between two renames leaves the old folder hidden: ``finish_replacement``, which whoever
    opens or replaces the folder next calls, puts it back.

    Args:
        folder: The folder to write. An existing folder is replaced only when it is empty, or when ``ours`` accepts
            every name in it and its config.json has the key ``marker``.
        ours: Whether a file of this name may be replaced.
        marker: A key of config.json that identifies the kind of folder.
        error: The class of error to raise; nothing is written before it.
    """
    folder = absolute_path(folder, error=error)
    with writing(folder, error=error):
        finish_replacement(folder, error=error)
        _require_replaceable(folder, ours, marker, error)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch, lock = scratch_folder(folder.parent, f".{folder.name}-", ".partial")
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
        remove_folder(scratch)
        lock.close()


def _require_replaceable(folder: Path, ours: Callable[[str], bool], marker: str, error: type[TrtlabError]) -> None:
    """Raise an error for a file, a broken link, and a folder with anything that is not ours."""
    if not folder.exists():
        if folder.is_symlink():
            raise error(f"{folder} is a link to {folder.readlink()}, which is missing", remedy="remove the link")
        return
    if not folder.is_dir():
        raise error(f"{folder} is a file, not a folder", remedy="choose another name, or remove the file")
    names = sorted(entry.name for entry in folder.iterdir())
    obstacles = [name for name in names if not ours(name)] or ([] if _has_key(folder, marker) else names)
    if obstacles:
        raise error(
            f"{folder} is not a folder that this call may replace",
            got=f"it holds {', '.join(obstacles[:3])}",
            remedy="choose a new folder",
        )


def _has_key(folder: Path, key: str) -> bool:
    try:
        return key in read_object(folder / "config.json", remedy="")
    except CheckpointError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def finish_replacement(folder: Path, *, error: type[TrtlabError]) -> None:
    """Put back the old folder that a process hid when it was killed between the two renames of ``replacing``.

    Raises an error of the class ``error`` where this user may not.
    """
    hidden = _hidden(folder)
    if not os.path.lexists(hidden):
        return
    with contextlib.closing(FolderLock(folder.parent, wait=True)):
        try:
            _settle(folder)
        except OSError as cause:
            raise error(
                f"{folder} was being replaced when its process was killed; its content is in {hidden.name} beside it",
                got=cause.strerror,
                remedy=f"rename {hidden} to {folder.name}, as a user who may",
            ) from cause


def _hidden(folder: Path) -> Path:
    """The place of the old folder between the two renames."""
    return folder.parent / f".{folder.name}.partial-old"


def _settle(folder: Path) -> None:
    """Under the parent's lock: put the hidden old folder back where nothing has taken its place, else remove it."""
    if os.path.lexists(folder):
        remove_folder(_hidden(folder))
    elif os.path.lexists(_hidden(folder)):
        _hidden(folder).rename(folder)


def _swap(scratch: Path, folder: Path) -> None:
    """Replace ``folder`` by ``scratch``; the old content stays at ``scratch``, or is removed."""
    if not os.path.lexists(folder):
        scratch.rename(folder)
    elif not _exchange(scratch, folder):
        with contextlib.closing(FolderLock(folder.parent, wait=True)):
            _settle(folder)
            try:
                folder.rename(_hidden(folder))
                scratch.rename(folder)
            finally:
                _settle(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system cannot."""
    if os.name != "posix":
        return False
    library, paths, swap = ctypes.CDLL(None), (os.fsencode(one), os.fsencode(other)), 2  # RENAME_EXCHANGE, RENAME_SWAP
    if hasattr(library, "renameat2"):  # Linux
        here = -100  # AT_FDCWD
        return bool(library.renameat2(here, paths[0], here, paths[1], swap) == 0)
    return hasattr(library, "renamex_np") and bool(library.renamex_np(*paths, swap) == 0)  # macOS


_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class TensorFile:
    """A safetensors file whose tensors are written in any order; their shapes must be known, as the header comes first.

    The library's own writer needs every tensor at once. Format: eight bytes of header length, the JSON header, the
    tensors' bytes. Wide dtypes come first, so that each tensor is aligned. Use it as a context manager.
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
        """The names of the tensors that are not yet written, in file order."""
        return sorted(self._missing, key=lambda name: (-self._missing[name][1].itemsize, name))

    def put(self, name: str, value: Tensor) -> None:
        """Write one tensor to its place; CheckpointError when its shape or dtype is not that of the header."""
        shape, dtype = self._missing[name]
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise CheckpointError(
                f"{name} changed while {self._path.name} was written",
                got=f"{value.dtype} {list(value.shape)}",
                expected=f"{dtype} {list(shape)}",
            )
        self._file.seek(self._data_start + self._starts[name])
        self._file.write(raw_bytes(value))
        del self._missing[name]

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            assert not self._missing, f"{self._path.name} lacks tensors: {list(self._missing)[:3]}"
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], *, on_tensor: Callable[[LazyTensor], object] | None = None
) -> None:
    """Write a safetensors file with one tensor in memory at a time; ``on_tensor`` is called after each."""
    with TensorFile(path, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}) as file:
        for name in file.order:
            file.put(name, tensors[name].read())
            if on_tensor is not None:
                on_tensor(tensors[name])
