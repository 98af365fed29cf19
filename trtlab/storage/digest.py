"""Digests of whole tensors, computed at reading speed: any altered byte is found, and its tensor named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from trtlab.hardware import cores
from trtlab.storage.lazy import LazyTensor, raw_bytes

MOST_THREADS = 8  # of them, each has one tensor in memory


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal; most processors have instructions for it."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def digests(
    tensors: Mapping[str, LazyTensor], *, on_tensor: Callable[[LazyTensor], object] | None = None
) -> dict[str, str]:
    """The digest of each tensor by its name, several at a time; ``on_tensor`` is called after each."""
    names = sorted(tensors, key=lambda name: -tensors[name].nbytes)  # the largest first, so that none is left alone
    pool = ThreadPoolExecutor(min(cores(), MOST_THREADS))
    results: dict[str, str] = {}
    try:
        for name, result in zip(names, pool.map(lambda name: digest(tensors[name].read()), names), strict=True):
            results[name] = result
            if on_tensor is not None:
                on_tensor(tensors[name])
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt the rest is not read
    return {name: results[name] for name in tensors}


def digested(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The same tensors, and a table that gets the digest of each one when it is read."""
    table: dict[str, str] = {}

    def recording(name: str, tensor: LazyTensor) -> LazyTensor:
        def read(value: Tensor) -> Tensor:
            table[name] = digest(value)
            return value

        return tensor.map(read)

    return {name: recording(name, tensor) for name, tensor in tensors.items()}, table
