"""Memory in large pages for what a CPU reads in every step. Knows tensors, no weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK = 64 * 2**20  # bytes that are asked for at a time: NumPy asks Linux for large pages from 4 MiB on
LINE = 64  # bytes; each tensor begins at a line of the cache


class LargePages:
    """Copies of tensors, one behind the other in arrays of NumPy's, which Linux maps in pages of 2 MiB.

    Torch's own memory and mapped files lie in pages of 4 KiB. Reading every weight in a step then spends much of its
    time on finding pages, above all in a virtual machine, which looks them up twice.
    """

    def __init__(self) -> None:
        self._room = np.empty(0, np.uint8)

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous copy, in its own dtype or in ``dtype``."""
        kind = dtype or tensor.dtype
        copy = self._take(tensor.numel() * kind.itemsize).view(kind).view(tensor.shape)
        return copy.copy_(tensor)

    def _take(self, nbytes: int) -> Tensor:
        if nbytes > len(self._room):
            memory = np.empty(max(CHUNK, nbytes + LINE), np.uint8)  # what is not written takes no memory
            self._room = memory[-memory.ctypes.data % LINE :]
        taken, self._room = self._room[:nbytes], self._room[-(-nbytes // LINE) * LINE :]
        return torch.from_numpy(taken)
