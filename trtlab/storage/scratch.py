"""Temporary folders that outlive no process: those of processes that were killed are removed by the next one."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from pathlib import Path


class FolderLock:
    """A lock on a folder for one process at a time; the system releases it when that process ends, however it ends.

    ``acquired`` is False while another process has the lock, and where the system has no such locks.
    """

    def __init__(self, folder: Path, *, wait: bool) -> None:
        self._descriptor, self.acquired = -1, False
        with contextlib.suppress(ImportError, OSError):  # missing on Windows and on some file systems
            import fcntl

            self._descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            self.acquired = True

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def scratch_folder(parent: Path, prefix: str, suffix: str = "") -> tuple[Path, FolderLock]:
    """A new folder in ``parent``, locked until this process ends or closes the lock.

    First removes the folders of the same prefix and suffix whose process was killed; that of a process which still
    runs is locked, and stays.
    """
    for leftover in parent.glob(f"{glob.escape(prefix)}*{glob.escape(suffix)}"):
        with contextlib.closing(FolderLock(leftover, wait=False)) as lock:
            if lock.acquired:
                remove_folder(leftover)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
        lock = FolderLock(folder, wait=True)
        if folder.is_dir():
            return folder, lock
        lock.close()  # another process took it for a leftover, before it was locked


def remove_folder(path: Path) -> None:
    """Remove a folder as far as this user may; of a link, the link and not what it points to."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)
