"""A model folder in memory: what a case edits, and what is written to disk and compared afterwards."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Link:
    """A symbolic link; ``{outside}`` in it, as in JSON, is a folder beside the model that does not belong to it."""

    target: str


class Directory:
    """An empty folder where a file is expected."""


class Pipe:
    """A named pipe where a file is expected: whoever opens it waits for ever."""


Entry = bytes | Link | Directory | Pipe
Files = dict[str, Entry]  # by path within the folder


def write(folder: Path, files: Files, outside: Path) -> None:
    """Write a folder; an entry whose path the file system refuses (a name of 300 characters) is left out."""
    folder.mkdir(parents=True)
    for name, entry in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, entry, outside)
        except (OSError, ValueError):
            continue


def _write(path: Path, entry: Entry, outside: Path) -> None:
    if isinstance(entry, bytes):
        path.write_bytes(entry.replace(b"{outside}", str(outside).encode()) if path.suffix == ".json" else entry)
    elif isinstance(entry, Link):
        path.symlink_to(entry.target.replace("{outside}", str(outside)))
    elif isinstance(entry, Directory):
        path.mkdir()
    else:
        os.mkfifo(path)


def read(folder: Path) -> Files:
    """The files of a folder that trtlab or transformers wrote."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, size and time of everything in a folder, to see whether something was changed."""
    found = {}
    for where, folders, names in os.walk(folder):
        for name in (*folders, *names):
            status = os.lstat(Path(where) / name)
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            found[os.path.relpath(Path(where) / name, folder)] = (status.st_mode, size, status.st_mtime_ns)
    return found
