"""What a path means: absolute, ``~`` expanded, and links followed only within one model's files. Reads no content."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from trtlab.errors import CheckpointError, TrtlabError

PathLike = str | os.PathLike[str]
COPY_AGAIN = "copy the whole folder again"


def absolute_path(path: PathLike, *, error: type[TrtlabError] = CheckpointError) -> Path:
    """The path from the root, with ``~`` expanded, so that a later change of directory does not matter.

    Raises:
        TrtlabError: Of the class ``error``, for anything but a path, an empty one, or the home of an unknown user.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise error("expected a path", got=f"{type(path).__name__} {path!r:.60}", remedy="give a str or a pathlib.Path")
    text = os.fspath(path)
    if not text.strip():
        raise error("expected a path, got an empty one", remedy='give "." for the current folder')
    expanded = os.path.expanduser(text)  # noqa: PTH111 - Path.expanduser raises RuntimeError
    if expanded.startswith("~"):
        raise error(
            f"{text} begins with the home of an unknown user", remedy=f"give ./{text} for a folder of that name"
        )
    whole = Path(expanded).absolute()
    if ".." not in whole.parts:
        return whole
    # What the system understands by "..": behind a link it is not the name before it.
    parent = Path(os.path.realpath(whole.parent))
    return Path(os.path.realpath(whole)) if whole.name == ".." else parent / whole.name


def require_folder(folder: Path, *, remedy: str, error: type[TrtlabError] = CheckpointError) -> None:
    """Raise an error when this is no folder."""
    with reading(folder, remedy=remedy, error=error):
        status = _status(folder)
        if status is None:
            target = f", a link to {shown(folder.readlink())}, which is missing" if folder.is_symlink() else ""
            raise error(f"{shown(folder)} is not a folder: there is nothing of that name{target}", remedy=remedy)
        if not stat.S_ISDIR(status.st_mode):
            raise error(f"{shown(folder)} is not a folder: it is a file", remedy=remedy)


def has_file(file: Path, *, error: type[TrtlabError] = CheckpointError) -> bool:
    """Whether a model's folder has a file of this name.

    Raises:
        TrtlabError: Of the class ``error``, when something of this name is there that must not or cannot be read: see
            ``require_file``.
    """
    with reading(file, error=error):
        try:
            os.lstat(file)
        except (FileNotFoundError, NotADirectoryError):
            return False
    require_file(file, error=error)
    return True


def require_file(file: Path, *, remedy: str = COPY_AGAIN, error: type[TrtlabError] = CheckpointError) -> None:
    """Raise an error when a model's folder has no file of this name that may be read.

    A link is followed only into the same model's files: those of its folder, and the ``blobs`` beside the ``snapshots``
    of Hugging Face's cache. A folder, a pipe or a device is not read.
    """
    with reading(file, remedy=remedy, error=error):
        status = _status(file)
        if status is None:
            if file.is_symlink():
                raise error(f"{shown(file)} is a link to {shown(file.readlink())}, which is missing", remedy=COPY_AGAIN)
            raise error(f"{shown(file)} is missing", remedy=remedy)
        target = Path(os.path.realpath(file))
        if not _is_inside_model(file, target):
            raise error(
                f"{shown(file)} is a link to {shown(target)}, outside of the model's folder: it is not followed",
                remedy="if that file belongs to the model, put it into the folder instead of the link",
            )
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise error(f"{shown(file)} is {kind}", expected="a file", remedy=remedy)
        file.open("rb").close()  # the only sure test of a permission


def files_state(place: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and modification time of each file of settings or weights in a model's folder, or of its one file."""
    with reading(place):
        inside = sorted(place.iterdir()) if place.is_dir() else ()
        files = [file for file in inside if file.suffix in STATE_SUFFIXES or file.name in STATE_NAMES] or [place]
        states = [(file.name, file.stat()) for file in files if file.exists()]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


STATE_NAMES = ("config.json", "params.json")
STATE_SUFFIXES = (".safetensors", ".bin", ".pth")


@contextlib.contextmanager
def reading(file: Path, *, remedy: str = COPY_AGAIN, error: type[TrtlabError] = CheckpointError) -> Iterator[None]:
    """Turn the system's refusal to open or read a path within the block into an error that names it."""
    try:
        yield
    except OSError as cause:
        remedy = "change its permissions, or run as a user who may read it" if cause.errno in _FORBIDDEN else remedy
        raise error(f"{shown(file)} cannot be read: {cause.strerror or cause}", remedy=remedy) from cause
    except ValueError as cause:  # a NUL, or a character that the file system cannot store
        raise error(f"{shown(file)} cannot be the name of a file: {cause}", remedy=remedy) from cause


@contextlib.contextmanager
def writing(path: Path, *, error: type[TrtlabError] = CheckpointError) -> Iterator[None]:
    """Turn the system's refusal to write a path within the block into an error that names it."""
    try:
        yield
    except (OSError, ValueError) as cause:  # ValueError: a NUL, or a character that the file system cannot store
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise error(f"{shown(path)} cannot be written: {reason}", remedy="choose a writable place") from cause


_FORBIDDEN = (1, 13)  # EPERM, EACCES


def shown(path: Path) -> str:
    """A path as an error shows it: printable, and its end cut when it is long."""
    text = str(path)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:300]}... ({len(text)} characters)"


def _status(path: Path) -> os.stat_result | None:
    """What the system says of a path, links followed; None when there is nothing."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_inside_model(file: Path, target: Path) -> bool:
    """Whether the target of a link lies in the folder of ``file``, or among the blobs of the same cached model."""
    home = Path(os.path.realpath(file.parent))
    blobs = (snapshots.parent / "blobs" for snapshots in home.parents if snapshots.name == "snapshots")
    return target.is_relative_to(home) or target.parent in blobs
